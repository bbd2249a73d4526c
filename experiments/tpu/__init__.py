"""The family's experiments with the settings that suit one slice of TPUs, and what they will take there.

They are the runs of the files that they begin from: same name, same batches, same loss but for rounding, so that a run may go on on another slice.
"""
