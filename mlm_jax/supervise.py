"""A run that is started again whenever it fails, until it is done: `mlm-jax run EXPERIMENT --supervise`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlm_jax import status

COMMAND = (sys.executable, "-m", "mlm_jax.cli")
TRIES = 5  # failures in a row without progress after which it gives up
LONGEST_WAIT_S = 60.0

_TAIL_BYTES = 1 << 16  # of metrics.jsonl; a row is far shorter


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # of a log on a full disk
        print(f"mlm-jax: {line}", file=sys.stderr, flush=True)


def run(
    argv: Sequence[str],
    progress: Callable[[], int],
    *,
    command: Sequence[str] = COMMAND,
    tries: int = TRIES,
    say: Callable[[str], None] = _say,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Runs `command` with `argv`, again and again until it is done; returns its last exit status, 128 + n where signal n ended it.

    It is not started again where it is done, where its input was bad, after SIGTERM, SIGINT or SIGHUP, which go on to it, and after `tries`
    failures in a row between which `progress` did not grow: after the first it starts in 1 s, then in 2, 4, ..., 60 s.
    """
    child: subprocess.Popen[bytes] | None = None
    asked: deque[int] = deque()  # signals on their way to the child
    stop = False

    def forward() -> None:
        with contextlib.suppress(IndexError):
            while child:
                child.send_signal(asked.popleft())

    def ask(number: int, _: Any) -> None:
        nonlocal stop
        stop = True
        asked.append(number)
        forward()

    # argparse takes abbreviations; the child must not supervise again.
    argv = [arg for arg in argv if not (arg.startswith("--su") and "--supervise".startswith(arg))]
    furthest, failures = progress(), 0
    with _handled(ask):
        while True:
            started = clock()
            # A group of its own: what is typed at the terminal comes once, from here.
            child = subprocess.Popen([*command, *argv], stdin=subprocess.DEVNULL, process_group=0)
            forward()
            while (returned := child.poll()) is None:
                time.sleep(0.05)  # child.wait() would not see a signal that comes just before its system call until the child ends
            child = None
            ended = returned if returned >= 0 else status.SIGNALLED - returned
            if stop or ended in (status.DONE, status.BAD_INPUT):
                return ended
            reached = progress()
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            how = f"ended with status {ended}" if returned >= 0 else f"was ended by {signal.Signals(-returned).name}"
            words = f"the run {how} after {clock() - started:.0f} s, at step {reached}"
            if failures == tries:
                say(f"{words}; that was failure {failures} in a row without a new step, so it is not started again")
                return ended
            wait = min(2.0 ** (failures - 1), LONGEST_WAIT_S)
            say(f"{words}; it starts again in {wait:.0f} s")
            until = clock() + wait
            while not stop and (left := until - clock()) > 0:
                sleep(min(left, 0.2))  # sleep itself goes on after a signal
            if stop:
                return ended


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Has `handler` called at the signals that ask to stop, but for those that are ignored (nohup ignores SIGHUP)."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def newest_step(run: Path) -> int:
    """The newest step that a run directory has figures or a checkpoint of; 0 where there is none."""
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(-min(_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the first of these lines may be a part of one, the last not yet whole
                steps.append(int(json.loads(line)["step"]))
    return max(steps, default=0)
