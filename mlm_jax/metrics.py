"""What a run measures: metrics.jsonl, model FLOPs utilisation, and the progress line."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from mlm_jax.config import InputError, ModelConfig

# Peak dense bfloat16 FLOP/s of one JAX device, by the start of its device_kind.
# Source: cloud.google.com/tpu/docs (system architecture pages, per chip; v2 and v3 devices are half a chip); NVIDIA data sheets.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device; None where it is not known (a CPU, say)."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def flops_per_token(config: ModelConfig, n_params: int) -> float:
    """Model FLOPs of one trained token, forward and backward: 6 per parameter, and 12 L T D for attention.

    Source: Chowdhery et al. 2022 (PaLM), appendix B. Rematerialisation is not counted, nor is the causal half taken off.
    """
    return 6 * n_params + 12 * config.n_layers * config.context_len * config.d_model


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each step once, also over restarts."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Opens `path` for appending, without the rows after step `resume_at` that an interrupted run left."""
        rows = [row for row in read_metrics(path) if row["step"] <= resume_at] if path.exists() else []
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, which a kill of the process leaves in the file."""
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut off by a kill is left out.

    Raises:
      InputError: a line in the middle is not a JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            ok = isinstance(row, dict) and isinstance(row.get("step"), int)
        except json.JSONDecodeError:
            row, ok = {}, False
        if ok:
            rows.append(row)
        elif number < len(lines):
            raise InputError(f"{path}:{number}", "", "not a JSON object with a step", "Remove the line")
    return rows


class Progress:
    """A line that says how far the work is: redrawn in place on a terminal, printed every ten seconds elsewhere."""

    def __init__(self, total: int, done: int = 0, out: Any = None) -> None:
        """`out` is a text stream, without one sys.stderr; `done` of `total` steps were done before."""
        self.total, self.first = total, done
        self.out = sys.stderr if out is None else out
        self.live = self.out.isatty()
        self.started = time.monotonic()
        self.shown = -float("inf")

    def show(self, done: int, facts: str, *, always: bool = False) -> None:
        """Says how many steps are done, and `facts`; not more often than is readable, unless `always`."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 10) and not always:
            return
        self.shown = now
        seconds = (now - self.started) / max(done - self.first, 1) * (self.total - done)
        line = f"step {done:>{len(str(self.total))}}/{self.total}  {facts}  ETA {duration(seconds)}"
        self.out.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        self.out.flush()

    def note(self, line: str) -> None:
        """Prints a line that stays."""
        self.out.write(f"\r\x1b[K{line}\n" if self.live else line + "\n")
        self.out.flush()


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m20s or 5h07m."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02}m"
