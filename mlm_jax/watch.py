"""What watches over a run from beside its loop: a step that takes too long, another process that is gone."""

import contextlib
import faulthandler
import itertools
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from mlm_jax import distributed, status
from mlm_jax.stopping import Stopped

LEAST_LIMIT_S, LIMIT_IN_STEPS = 600.0, 20  # where nothing else is asked for: the larger of that and of so many times a recent step
SILENCE_S = 0.35 * distributed.HEARTBEAT_TIMEOUT_S  # a process that says nothing for so long is gone: noticed with time to say so before JAX ends all
_EVERY_S = 5.0  # how often the processes say where they are
_RECENT = 50  # steps


class Position(NamedTuple):
    """Where a process is, as it says itself."""

    said: int  # so many times; it grows as long as the process lives
    finished: int  # the last step that it has finished
    begun: int  # the last step that it has turned to
    left: bool = False  # it watches no longer

    def packed(self) -> str:
        return " ".join(str(int(value)) for value in self)

    @classmethod
    def unpacked(cls, line: str) -> "Position":
        said, finished, begun, left = map(int, line.split())
        return cls(said, finished, begun, bool(left))


def _end(exit_status: int) -> None:
    """Ends this process, whatever its main thread does."""
    distributed.leave(exit_status)
    os._exit(exit_status)


class Watchdog:
    """Ends this process, with status 76 and every thread's Python stack on stderr, where a step takes too long.

    The loop calls `begin` when it turns to a step and `beat` when one is finished; where none is under way, as in a validation or a save, there
    is no limit. Where there are several processes it names those that are behind, and where one of them has been silent for SILENCE_S and no step
    was finished here for as long, it ends this process then, whatever that does.
    """

    def __init__(
        self,
        limit_s: float,
        *,
        say: Callable[[str], None] = lambda line: print(f"mlm-jax: {line}", file=sys.stderr, flush=True),
        end: Callable[[int], object] = _end,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit_s` is how long a step may take; 0: 20 times the median of recent steps, at least 600 s, and the first as long as it takes."""
        self._asked_limit_s, self._say, self._end, self._clock = limit_s, say, end, clock
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds
        self._since = clock()  # when the last step was finished, or the first after that begun
        self._finished = self._begun = 0
        self._left = False
        self._several = jax.process_count() > 1
        self._others: Others | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._since = self._clock()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self._several:
            self._others = Others(jax.process_index(), jax.process_count(), self._clock)
            # A thread of its own: where process 0 does not answer, it waits without end.
            self._threads.append(threading.Thread(target=self._talk, name="watchdog: the other processes", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._left = kind in (None, Stopped)  # whoever fails is soon gone
        self._over.set()
        for thread in self._threads:
            thread.join(_EVERY_S)

    def begin(self, step: int) -> None:
        """The loop turns to `step`, all before which are begun."""
        if self._begun == self._finished:
            self._since, self._finished = self._clock(), step - 1
        self._begun = step

    def beat(self, step: int) -> None:
        """`step` is finished."""
        now = self._clock()
        self._recent.append(now - self._since)
        self._since, self._finished = now, step

    @property
    def limit_s(self) -> float:
        """How long a step may take now."""
        if self._asked_limit_s or not self._recent:
            return self._asked_limit_s or math.inf
        return max(LEAST_LIMIT_S, LIMIT_IN_STEPS * statistics.median(self._recent))

    def check(self) -> None:
        """Ends the process where the step takes too long."""
        under_way = self._begun != self._finished  # looked at first: a step that begins now has its time from now on
        took, limit_s = self._clock() - self._since, self.limit_s
        gone = self._others is not None and took > SILENCE_S and self._others.gone()
        slow = under_way and took > limit_s
        if not slow and not gone:
            return
        here, for_s = Position(0, self._finished, self._begun), SILENCE_S if gone else min(SILENCE_S, took / 2)
        who = f"; {self._others.words(here, for_s)}" if self._others else ""
        limit = f"the limit is {limit_s:.0f} s, train.step_timeout sets another" if slow else "another process is gone"
        try:
            faulthandler.dump_traceback(2, all_threads=True)
            what = f"no step was finished for {took:.0f} s after step {self._finished} ({limit}){who}"
            self._say(f"{what}; the same command goes on from the last save")
        finally:  # also where nothing can be written to stderr
            self._end(status.LOST)

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            self.check()

    def _talk(self) -> None:
        assert self._others
        for said in itertools.count(1):
            over = self._over.is_set()
            position = Position(said, self._finished, self._begun, self._left)
            # What JAX raises where it comes to nothing needs no word: the silence tells.
            with contextlib.suppress(RuntimeError, ValueError):
                distributed.publish("position", position.packed())
                self._others.hear({process: Position.unpacked(line) for process, line in distributed.published("position").items()})
            if over:
                return
            self._over.wait(self._every_s)

    @property
    def _every_s(self) -> float:
        return min(_EVERY_S, self.limit_s / 20, SILENCE_S / 8)


class Others:
    """What this process knows of the others of its run."""

    def __init__(self, process: int, processes: int, clock: Callable[[], float]) -> None:
        self._process, self._clock = process, clock
        now = clock()
        self._answered = now  # when process 0 has answered last
        self._heard: dict[int, tuple[Position, float]] = {i: (Position(0, 0, 0), now) for i in range(processes)}  # and when that was new

    def hear(self, positions: Mapping[int, Position]) -> None:
        """Takes note of what each process has said last."""
        now = self._clock()
        self._answered = now
        self._heard |= {i: (position, now) for i, position in positions.items() if position != self._heard[i][0]}

    def gone(self) -> bool:
        """A process has been silent for SILENCE_S. One that has not spoken yet may still compile, but process 0 answers from its start on."""
        return self._unanswered_s() > SILENCE_S or any(self._heard[i][0].said for i in self.silent(SILENCE_S))

    def silent(self, for_s: float) -> dict[int, float]:
        """The other processes that have said nothing for `for_s` seconds and not left, and for how long; process 0 alone if it does not answer."""
        if (unanswered_s := self._unanswered_s()) > for_s:
            return {0: unanswered_s}
        now = self._clock()
        others = {i: now - at for i, (position, at) in self._heard.items() if i != self._process and not position.left}
        return {i: silence for i, silence in others.items() if silence > for_s}

    def _unanswered_s(self) -> float:
        """How long process 0, which carries the news, has not answered."""
        return 0.0 if self._process == 0 else self._clock() - self._answered

    def words(self, here: Position, for_s: float) -> str:
        """Which processes hold the others up, in words; this one is at `here`, and silence is one of `for_s` seconds."""
        if silent := self.silent(for_s):
            each = ", ".join(f"process {i} has not been heard of for {silence:.0f} s" for i, silence in list(silent.items())[:8])
            return each + (f", and {len(silent) - 8} more" if len(silent) > 8 else "")
        positions = {i: position for i, (position, _) in self._heard.items() if not position.left} | {self._process: here}
        at = {i: (position.finished, position.begun) for i, position in positions.items()}
        last = min(at.values())
        behind = [i for i, found in sorted(at.items()) if found == last]
        if len(behind) == len(at):
            return "all processes are at the same step"
        names = ", ".join(map(str, behind[:8])) + (f" and {len(behind) - 8} more" if len(behind) > 8 else "")
        begun = max(begun for _, begun in at.values())
        return f"process{'es' if len(behind) > 1 else ''} {names} of {len(at)} began step {last[1]} last, the furthest began step {begun}"
