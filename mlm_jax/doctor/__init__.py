"""Is this machine, its bucket, or a whole pod fit to train? Each check says what it saw and, where that will not do, the remedy.

What can be told without JAX is looked at in the process that asks. The rest is left to a process of its own: it joins the others of a pod, looks at
the devices and lets them compute together. It may hang, or end at once, as XLA does over a flag that it does not know, and the findings so far are
there all the same.

`findings` is what both share, `examine` looks at everything, `packages`, `machine`, `tpu`, `place` and `devices` each at what they are named for, and
`processes` is the other process.
"""
