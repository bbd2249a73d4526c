"""history.jsonl: every start of a run, what was changed then, and where its time went; goodput, over all starts."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlm_jax import storage
from mlm_jax.metrics import duration, read_rows


class History:
    """Appends to history.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, step: int, *, lost_s: float, **facts: Any) -> None:
        """The run goes on at `step`; `lost_s` seconds went to steps that have to be taken again."""
        if self._path.is_file() and not (raw := self._path.read_bytes()).endswith(b"\n"):
            os.truncate(self._path, raw.rfind(b"\n") + 1)  # without the line that a full disk or a kill cut off
        self._write({"start": step, "lost_s": round(lost_s, 3), **facts})

    def spent(self, step: int, seconds: Mapping[str, float]) -> None:
        """Where the time since the last start went; what was written of it before counts no more."""
        self._write({"step": step, "seconds": {name: round(value, 3) for name, value in seconds.items()}})

    def _write(self, row: dict[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with storage.named(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": at, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Goodput(NamedTuple):
    """Where the wall time of a run went, from its first start to what was written last."""

    seconds: dict[str, float]  # "steps": those that count, without waiting; "lost steps": taken again after a kill; "down": between two starts

    @property
    def share(self) -> float:
        """The part of the wall time in which the devices took steps that count."""
        return self.seconds["steps"] / max(sum(self.seconds.values()), 1e-9)

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        rest = ", ".join(f"{name} {s / total:.1%}" for name, s in self.seconds.items() if name != "steps" and s >= total / 2000)
        return f"{self.share:.1%} of {duration(total)}" + (f"; {rest}" if rest else "")


def read_history(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's history.jsonl; none where there is no such file. Raises InputError where it is damaged."""
    path = run / "history.jsonl"
    return read_rows(path) if path.is_file() else []


def goodput(rows: Sequence[Mapping[str, Any]], taken: Iterable[Mapping[str, Any]]) -> Goodput | None:
    """The goodput of a run by the rows of its history, and of its steps in metrics.jsonl; None without a history.

    Durations are measured by clocks that only go forward. The time between two starts is that between two dates, and where the clock was set back
    between them, nothing.
    """
    if not rows:
        return None
    total: Counter[str] = Counter()
    spent: dict[str, float] = {}  # since the last start
    lost = down = 0.0
    for before, row in itertools.pairwise([rows[0], *rows]):
        if "start" in row:
            gap = max((datetime.fromisoformat(row["at"]) - datetime.fromisoformat(before["at"])).total_seconds(), 0.0)
            lost, down = lost + min(row["lost_s"], gap), down + max(gap - row["lost_s"], 0.0)
            total.update(spent)
        spent = row.get("seconds", {})
    total.update(spent)
    steps = min(
        sum(row["step_s"] - row["idle_s"] for row in taken if "step_s" in row), total["steps"]
    )  # what was restored from an older checkpoint counts as lost
    rest = {name: seconds for name, seconds in total.items() if name != "steps"}
    return Goodput({"steps": steps, "lost steps": lost + total["steps"] - steps, "down": down, **rest})
