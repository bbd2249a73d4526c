"""How a command ended, for whoever started it.

    0        done
    1        the work failed
    2        the input was wrong: one line names field, value, reason and remedy
    75       stopped on request (SIGTERM or SIGINT) after saving: the same command goes on
    76       another process of the run is gone, or a step took too long (the watchdog): the same command, in every process, goes on
    128 + n  ended at once: by signal n, by a second request to stop, or (134) by JAX or its exchanges where another process is gone

Source: 75 and 76 are EX_TEMPFAIL and EX_PROTOCOL of sysexits.h.
"""

DONE = 0
FAILED = 1
BAD_INPUT = 2
STOPPED = 75
LOST = 76
SIGNALLED = 128  # and the number of the signal
