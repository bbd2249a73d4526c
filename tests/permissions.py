"""For child processes of tests: permissions bind root too."""

import ctypes
import os


def bind() -> None:
    """Root may read and write only what the permissions of files let their owner; anybody else is bound as it is. Holds for this thread and those
    that it starts, and not for a program that it executes.

    Another user would be bound as well, but may not be let into the folders of root where Python and the libraries lie.
    Source: capabilities(7) and capset(2) of Linux; CAP_DAC_OVERRIDE is 1, CAP_DAC_READ_SEARCH is 2.
    """
    if os.geteuid():
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, each twice: capabilities 0 to 31, and 32 to 63
    assert libc.capget(header, sets) == 0
    for i in range(3):
        sets[i] &= ~0b110
    assert libc.capset(header, sets) == 0
