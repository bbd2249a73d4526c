"""One run at a time in a directory, with real processes."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm_jax import lock
from mlm_jax.config import InputError

ROOT = Path(__file__).parents[1]


def python(code: str, *argv: object) -> subprocess.Popen[str]:
    """A child that executes `code`; end its standard input to let it go on."""
    command, pipe = [sys.executable, "-c", code, *map(str, argv)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


HOLD = """
import pathlib, sys
from mlm_jax import lock
with lock.hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A child that holds the lock of `folder`."""
    with python(HOLD, folder) as child:
        assert child.stdout and child.stdout.readline() == "held\n", child.communicate()
        try:
            yield child
        finally:
            child.kill()


def test_a_second_run_in_the_directory_is_refused_with_the_owner_named(tmp_path):
    with owner(tmp_path / "run") as child:
        with pytest.raises(InputError) as e, lock.hold(tmp_path / "run"):
            pass
        who = rf"process {child.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}"
        remedy = "Wait for it, stop it, or name another directory with --out"
        assert re.fullmatch(rf"--out = {re.escape(str(tmp_path))}/run: in use by {who}\. {remedy}\.", str(e.value)), str(e.value)
        with lock.hold(tmp_path / "other"):
            pass
        (tmp_path / "run/.lock").write_bytes(b"")  # taken, and not written into yet
        with pytest.raises(InputError, match="in use by another process"), lock.hold(tmp_path / "run"):
            pass
        child.communicate()
    with lock.hold(tmp_path / "run"):
        assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == os.getpid()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"), lock.hold(tmp_path / "run"):
            pass


def test_a_killed_owner_leaves_the_directory_free(tmp_path):
    with owner(tmp_path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == child.pid  # what it left is no lock
        with lock.hold(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), lock.hold(tmp_path):
            pass


def test_it_leaves_no_file_and_no_directory_of_its_own(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(OSError, match="full"), lock.hold(tmp_path / name):
            raise OSError("disk full")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with lock.hold(tmp_path / "new"):
        (tmp_path / "new/config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


# Takes the lock again and again, and makes a file that must not be there yet.
CONTEND = """
import os, pathlib, sys
from mlm_jax import lock
from mlm_jax.config import InputError
done, folder = 0, pathlib.Path(sys.argv[1])
while done < 100:
    try:
        with lock.hold(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            done += 1
    except InputError as e:
        assert "in use by" in str(e), e
"""


def test_never_two_hold_it_while_others_take_its_file_away(tmp_path):
    children = [python(CONTEND, tmp_path) for _ in range(3)]
    said = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said


@pytest.mark.parametrize("another", [False, True])
def test_a_file_that_its_owner_takes_away_at_that_moment_is_not_what_is_locked(another, tmp_path, monkeypatch):
    flock, path = fcntl.flock, tmp_path / ".lock"

    def too_late(file: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        if another:
            path.touch()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with lock.hold(tmp_path), pytest.raises(InputError, match="in use by process"), lock.hold(tmp_path):
        pass


BOUND_BY_PERMISSIONS = """
import pathlib, sys
from mlm_jax import lock
from mlm_jax.config import InputError
from tests import permissions
permissions.bind()
try:
    with lock.hold(pathlib.Path(sys.argv[1])):
        pass
except InputError as e:
    print(e)
"""


@pytest.mark.parametrize("name", ["run", "run/new"])
def test_a_directory_that_cannot_be_written_to_is_refused(name, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    out, err = python(BOUND_BY_PERMISSIONS, tmp_path / name).communicate(timeout=60)
    remedy = "Name a directory that can be written to with --out"
    assert out == f"--out = {tmp_path / name}: cannot be written to (Permission denied). {remedy}.\n", err


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run: is a file\. Name a directory"), lock.hold(tmp_path / "run"):
        pass


def test_where_the_file_system_has_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with lock.hold(tmp_path, say=said.append):
        pass
    assert said == [f"note: the file system of {tmp_path} has no locks; see to it that no other run uses this directory"]
