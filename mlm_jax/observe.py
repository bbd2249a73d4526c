"""What the machine does during a run: compilation, memory, the time of each step and its parts, and traces."""

import functools
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from mlm_jax.config import InputError
from mlm_jax.metrics import duration

# ---- compilation ----


class Compilation(NamedTuple):
    """What this process has compiled."""

    compile_s: float = 0.0  # reading from the cache included
    programs: int = 0
    programs_from_cache: int = 0

    def since(self, before: "Compilation") -> "Compilation":
        """What came after `before`."""
        return Compilation(self.compile_s - before.compile_s, self.programs - before.programs, self.programs_from_cache - before.programs_from_cache)

    def __str__(self) -> str:
        return f"{self.programs} programs compiled in {self.compile_s:.1f} s, {self.programs_from_cache} of them taken from the cache"


@functools.cache
def _counts() -> dict[str, float]:
    """Figures that JAX's own events keep up to date."""
    counts = dict.fromkeys(Compilation._fields, 0.0)

    def count(event: str, **_: Any) -> None:
        counts["programs_from_cache"] += event == "/jax/compilation_cache/cache_hits"

    def add(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts["compile_s"] += duration_secs
            counts["programs"] += 1

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(add)
    return counts


def compilation() -> Compilation:
    """What was compiled since the first call of this function."""
    counts = _counts()
    return Compilation(counts["compile_s"], int(counts["programs"]), int(counts["programs_from_cache"]))


def keep_compiled(folder: Path) -> None:
    """Makes JAX keep every compiled program in `folder` and take it from there, unless JAX's own environment variables say otherwise."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compilation_cache.reset_cache()  # that of a run before, in the same process
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


# ---- memory ----


def memory() -> dict[str, int]:
    """Bytes in use now, and at most so far, on the device of this process that has the most; nothing where devices do not tell (a CPU)."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {ours: max(found.get(theirs, 0) for found in stats) for ours, theirs in names.items()} if stats else {}


def need(compiled: Any) -> str:
    """What a compiled program needs on each device, in words."""
    found = compiled.memory_analysis()
    arrays = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return f"{(arrays + found.temp_size_in_bytes) / 2**30:.2f} GiB a device, {found.temp_size_in_bytes / 2**30:.2f} GiB of it temporary"


# ---- time ----


class Dispatched(NamedTuple):
    """A step that the devices were given."""

    step: int
    figures: dict[str, jax.Array]  # what it measures, once it is done
    at: float  # when, by time.monotonic
    finished: Any  # a future of `finish_time`
    data_s: float  # how long the loop waited for the batch


def finish_time(figures: Any) -> float:
    """Waits until the devices have made `figures`; returns when that was. For a thread of its own, so that the loop need not wait to know."""
    jax.block_until_ready(figures)
    return time.monotonic()


class Clock:
    """Splits the time of a run, without a gap, into what it went to."""

    def __init__(self) -> None:
        self._first = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}  # in all: steps, waiting for data, idle, and each `lap`

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def step(self, step: Dispatched) -> dict[str, float]:
        """Waits for the step. Of the seconds since what came before it, `step_s`, its devices had no work for `idle_s`: for want of the batch
        during `data_s`, which is part of that."""
        end = step.finished.result()
        step_s, idle_s = end - self._last, max(step.at - self._last, 0.0)
        data_s = min(step.data_s, idle_s)
        self._last = end
        self._add("steps", step_s - idle_s)
        self._add("waiting for data", data_s)
        self._add("idle", idle_s - data_s)
        return {name: round(seconds, 6) for name, seconds in (("step_s", step_s), ("idle_s", idle_s), ("data_s", data_s))}

    def lap(self, name: str) -> float:
        """The seconds since the last step, or since what came after it: they went to `name`."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._add(name, seconds)
        return seconds

    def __str__(self) -> str:
        total = max(self._last - self._first, 1e-9)
        return f"{duration(total)}: " + ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in self.seconds.items())


class Profile(NamedTuple):
    """The steps of which a trace is written, `first` and `last` included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str, least: int, most: int) -> "Profile":
        """The steps that FIRST:LAST says. Raises InputError unless it does, within `least` to `most`."""
        first, _, last = text.partition(":")
        if not (first.isdecimal() and last.isdecimal() and least <= int(first) <= int(last) <= most):
            if least > most:
                raise InputError("--profile", text, "there are no steps to come", "Leave it out, or start another run with --out")
            example = f"{min(least + 9, most)}:{min(least + 12, most)}"
            reason = f"not FIRST:LAST within the steps that are to come, {least} to {most}"
            raise InputError("--profile", text, reason, f"Write, for example, {example}, both included")
        return cls(int(first), int(last))
