"""What a run measures and where it goes: metrics.jsonl, TensorBoard, Weights & Biases, the progress line; model FLOPs utilisation."""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlm_jax import storage
from mlm_jax.config import Config, InputError, ModelConfig

# What differs between two runs of the same thing: seconds, speeds, bytes.
MEASURED = frozenset(
    "tokens_per_s tokens_per_s_per_device mfu step_s idle_s data_s eval_s save_s compile_s programs programs_from_cache "
    "memory_bytes memory_peak_bytes goodput".split()
)

FLUSH_S = 30.0  # how long TensorBoard's figures may stay in memory


def flops_per_token(config: ModelConfig, n_params: int) -> float:
    """Model FLOPs of one trained token, forward and backward: 6 per parameter, and 12 L T D for attention.

    MFU is this times tokens per second over the peak FLOP/s of all devices.

    Source: Chowdhery et al. 2022 (PaLM), appendix B. Rematerialisation is not counted, nor is the causal half taken off.
    """
    return 6 * n_params + 12 * config.n_layers * config.context_len * config.d_model


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each step once, also over restarts. A number that is not finite, which JSON has not, is null."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Opens `path` for appending, without the rows after step `resume_at` that an interrupted run left; their steps took `lost_s`."""
        found = read_metrics(path) if path.exists() else []
        rows = [row for row in found if row["step"] <= resume_at]
        self.lost_s = float(sum(row.get("step_s", 0) for row in found if row["step"] > resume_at))
        with storage.named(path):
            storage.write_text(path, "".join(map(self._line, rows)))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, which a kill of the process leaves in the file."""
        with storage.named(self._file.name):
            self._file.write(self._line(row))

    def flush(self) -> None:
        """Sees to it that what was written survives the end of the machine."""
        with storage.named(self._file.name):
            self._file.flush()
            os.fsync(self._file.fileno())

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        return json.dumps(finite, allow_nan=False) + "\n"

    def close(self) -> None:
        with storage.named(self._file.name):
            self._file.close()


class TensorBoard:
    """The same figures as event files, which TensorBoard shows: a curve for each number, in the groups train, validation and machine.

    They are written here and now: tensorboardX's SummaryWriter has a thread for it, and waits for ever where the disk was full and that is gone.
    tensorboardX is imported where it is needed: it imports PyTorch, where that is installed, which takes seconds.
    """

    def __init__(self, folder: Path, *, resume_at: int) -> None:
        """What an interrupted run left after step `resume_at` is hidden by a mark in the new file."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # protobuf makes them

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = EventsWriter(str(folder / "events"), f".{resume_at}.{os.getpid()}")  # without that, two files of the same second were one
        self._file.write_event(Event(wall_time=time.time(), step=resume_at + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = -math.inf

    def write(self, row: dict[str, Any]) -> None:
        """Adds one row; it is on disk at the latest with the first that comes FLUSH_S later."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = []
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                group = "machine" if name in MEASURED else "validation" if name.startswith("val_") else "train"
                values.append(Summary.Value(tag=f"{group}/{name}", simple_value=value))
        with storage.named(self._folder):
            self._file.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Puts on disk what was written: a kill leaves it in the file."""
        with storage.named(self._folder):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with storage.named(self._folder):
            self._file.close()


class Wandb:
    """The same figures at Weights & Biases: one run of `project`, also over restarts; steps that are taken again stand there twice."""

    def __init__(self, project: str, config: Config, run: Path) -> None:
        """Raises: InputError: the library is not installed, or does not start."""
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError as e:
            raise InputError("--wandb", project, "Weights & Biases is not installed", 'pip install -e ".[wandb]", or leave --wandb out') from e
        path = run / "wandb_id"
        same = path.read_text() if path.is_file() else secrets.token_hex(8)
        values = dataclasses.asdict(config)
        try:
            self._run = wandb.init(project=project, name=config.name, id=same, resume="allow", dir=str(run), config=values, settings={"silent": True})
        except Exception as e:
            raise InputError("--wandb", project, f"does not start ({e})", "Run `wandb login`, set WANDB_MODE=offline, or leave --wandb out") from e
        path.write_text(same)
        self._run.define_metric("*", step_metric="step")  # its own count of rows cannot go back to a checkpoint

    def write(self, row: dict[str, Any]) -> None:
        """Adds one row; another process sends it."""
        self._run.log({name: value for name, value in row.items() if isinstance(value, int | float)})

    def flush(self) -> None:
        """Does nothing: what was written is the other process's."""

    def close(self) -> None:
        self._run.finish()


class Recorder:
    """All places where a run's figures go. A context manager, which closes them."""

    def __init__(self, run: Path, config: Config, *, resume_at: int, wandb: str = "") -> None:
        """`wandb` names a project; "" is none. Raises InputError where that does not start."""
        self._open = contextlib.ExitStack()
        self._sinks: list[Any] = [Wandb(wandb, config, run)] if wandb else []
        file = MetricsFile(run / "metrics.jsonl", resume_at=resume_at)
        self.lost_s = file.lost_s  # seconds that went to steps which have to be taken again
        self._sinks += [file, TensorBoard(run / "tensorboard", resume_at=resume_at)]
        for sink in self._sinks:
            self._open.callback(sink.close)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # of a run that has failed the first reason is what counts
            self._open.close()

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row, which has a "step", to all."""
        for sink in self._sinks:
            sink.write(row)

    def flush(self) -> None:
        """Puts all rows on disk: steps up to a checkpoint are not taken again."""
        for sink in self._sinks:
            sink.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut off by a kill is left out.

    Raises:
      InputError: a line in the middle is not a JSON object with a step.
    """
    return read_rows(path, lambda row: isinstance(row.get("step"), int), "a JSON object with a step")


def read_rows(path: Path, is_one: Callable[[dict[str, Any]], bool] = lambda row: True, what: str = "a JSON object") -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a last line that was cut off by a kill is left out.

    Raises:
      InputError: a line in the middle is not `what`, as `is_one` tells.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and is_one(row):
            rows.append(row)
        elif number < len(lines):
            raise InputError(f"{path}:{number}", "", f"not {what}", "Remove the line")
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
