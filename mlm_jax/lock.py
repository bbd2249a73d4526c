"""One run at a time in a run directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlm_jax import storage
from mlm_jax.config import InputError

NAME = ".lock"  # who holds it stands in the file, which is there as long as the run, and after a kill

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems that have none, such as some mounted buckets


@contextlib.contextmanager
def hold(folder: Path, *, field: str = "--out", say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Iterator[None]:
    """Keeps every other process out of `folder`; it is made where it is missing, and taken away again where nothing was put into it.

    The kernel lets the lock go with the process, however that ends. Where the file system has no locks, it says so and goes on.

    Raises:
      InputError: another process holds it, or nothing can be written there.
      OSError: the disk is full, which may pass.
    """
    path = folder / NAME
    try:
        new = not folder.exists()
        file = _lock(path, field, say)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if folder.is_file():
            raise InputError(field, str(folder), "is a file", "Name a directory") from e
        remedy = f"Name a directory that can be written to with {field}"
        raise InputError(field, str(folder), f"cannot be written to ({os.strerror(e.errno or 0)})", remedy) from e
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is let go: who waits for this file sees that it is gone
        os.close(file)
        if new:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()


def _lock(path: Path, field: str, say: Callable[[str], None]) -> int:
    """The open and locked file `path`, with this process in it. Raises OSError, or InputError where another process holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            owner = words(os.pread(file, 4096, 0))
            os.close(file)
            remedy = f"Wait for it, stop it, or name another directory with {field}"
            raise InputError(field, str(path.parent), f"in use by {owner}", remedy) from None
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                os.close(file)
                raise
            say(f"note: the file system of {path.parent} has no locks; see to it that no other run uses this directory")
            break
        os.close(file)  # who held it has just taken it away
    try:
        with storage.named(path):
            os.ftruncate(file, 0)
            os.write(file, here().encode())
    except OSError:
        os.close(file)
        raise
    return file


def here() -> str:
    """This process, at this time, as one line of JSON."""
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}) + "\n"


def words(owner: str | bytes) -> str:
    """A line of `here`, in words."""
    try:
        said = json.loads(owner)
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, TypeError, KeyError):  # it has not written yet
        return "another process"
