"""Looks at everything: at what can be told without JAX itself, and by a process of its own, to which it listens, at the rest."""

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mlm_jax.config import InputError
from mlm_jax.doctor.findings import FAILED, REMEDIES, Finding, Stage, Wanted, safely
from mlm_jax.doctor.machine import memory, open_files, runtime
from mlm_jax.doctor.packages import jax_family, libtpu, packages, python
from mlm_jax.doctor.place import disk, out
from mlm_jax.doctor.tpu import advice, tpu_in_use

OTHER = ("-m", "mlm_jax.doctor.processes")  # the process that looks at what needs JAX


def examine(wanted: Wanted, *, root: Path = Path("/"), say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> list[Finding]:
    """Every finding; of several processes, process 0 has those of the others too.

    `root` is where the files of the machine are looked for, such as /dev and /proc.

    Raises:
      InputError: `wanted` makes no sense.
    """
    if wanted.devices is not None and wanted.devices < 1:
        raise InputError("--devices", wanted.devices, "below 1", "Give the number that all processes together should have")
    command, pipe = [sys.executable, *OTHER], subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as other,
    ):
        try:
            _tell(other, wanted)  # it begins meanwhile
            here = local(wanted, root)
            _tell(other, here)
            return here + list(_heard(other, errors, say))
        finally:
            other.kill()


def local(wanted: Wanted, root: Path = Path("/")) -> list[Finding]:
    """The findings of this machine that need neither its devices nor another process."""
    folder = Path("runs" if wanted.in_bucket else wanted.out)
    checks: dict[str, Callable[[], Finding | Iterable[Finding]]] = {
        "python": python,
        "packages": packages,
        "jax": jax_family,
        "libtpu": libtpu,
        "runtime": lambda: runtime(wanted.out),
        "tpu in use": lambda: tpu_in_use(root),
        "open files": open_files,
        "memory": lambda: memory(root),
        "disk": lambda: disk(folder),
        "out": lambda: out(wanted),
    }
    return [finding for name, check in checks.items() for finding in safely(name, check)]


def _tell(other: subprocess.Popen[str], what: Any) -> None:
    assert other.stdin
    with contextlib.suppress(BrokenPipeError):  # it has ended, as will be found
        os.write(other.stdin.fileno(), json.dumps(what).encode() + b"\n")  # its buffer would be written once more when it is closed


def _heard(other: subprocess.Popen[str], errors: IO[str], say: Callable[[str], None]) -> Iterator[Finding]:
    """The findings of the other process, and one more where it hung or ended."""
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert other.stdout
        for line in other.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    stage = Stage("jax", 180.0)
    while True:
        try:
            line = lines.get(timeout=stage.limit)
        except queue.Empty:
            yield Finding(stage.name, FAILED, f"no answer within {stage.limit:g} s", REMEDIES[stage.name])
            return
        if not line:
            ended = other.wait()
            errors.seek(0)
            yield ended_in(stage.name, ended, errors.read())
            return
        kind, said = json.loads(line)
        if kind == "finding":
            yield Finding(*said)
            continue
        stage = Stage(*said)
        if stage.name == "end":
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(stage.limit)
            return
        say(f"doctor: {stage.name} (may take up to {stage.limit:g} s)")


def ended_in(stage: str, ended: int, errors: str) -> Finding:
    """What to say where the process that looked at the devices ended by itself, with these last words."""
    told = [line.strip() for line in errors.splitlines() if line.strip()]
    reasons = [line for line in told if re.search(r"Unknown (command line )?flag|\w(Error|Exception): |already in use|multi-process lockfile", line)]
    last = (reasons or told or ["none"])[-1]
    return Finding(stage, FAILED, f"ended with status {ended}, its last words: {last[-300:]}", advice(stage, last))
