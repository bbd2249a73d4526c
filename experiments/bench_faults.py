"""What becomes of a run that is killed, stopped, has a full disk or a damaged checkpoint, loses a process, or goes on on other devices or hosts.

Run      python -m experiments.bench_faults [--only kill] [--seed 0] [--out DIR]        (half an hour on two cores)
Work     a GPT-2 of 118,592 parameters, 60 steps and a checkpoint every 5, on the CPU. Each start is `mlm-jax train` in processes of its own. A
         fault comes once the run trains, when a step drawn from the seed is written and up to a second later; then the same command goes on.
         A kill counts as inside a save where it left a checkpoint half-written or without its list of files. The disk is a tmpfs of 32 MiB
         in a mount namespace; where none may be made, the row says so
Columns  how often, which exit statuses (128 + n: signal n) and what one of the runs said; steps that were taken before and again after; and how the
         end compares with that of an undisturbed run. Identical: every step once in metrics.jsonl, all of its figures but the measured, and
         the parameters and the optimizer's state of the last checkpoint, bit for bit. Else the largest relative difference of a step's loss,
         and of the logits of 4 x 32 tokens over the largest logit; the limit is 1e-5
Result   see README.md; exit status 1 where a row fails
"""

import argparse
import contextlib
import dataclasses
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mlm_jax import checkpoint, runs, sharding
from mlm_jax import train as training
from mlm_jax.config import MeshConfig
from mlm_jax.history import read_history
from mlm_jax.metrics import MEASURED, read_metrics
from mlm_jax.model import gpt2
from mlm_jax.status import SIGNALLED, STOPPED

ROOT = Path(__file__).parents[1]
STEPS = 60
KILLS, KILLS_IN_SAVES, TERMS = 30, 10, 10
LIMIT = 1e-5
START_S = 600.0  # what a start may take to train, and to end
PEERS_S = 120.0  # what the other processes may take to end when one is gone
DISK_BYTES = 32 << 20
GONE = {76, 134}  # the exit statuses of a process whose peer is gone: the watchdog's, and JAX's own end
EXPERIMENT = """from mlm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

CONFIG = Config(
    name="faults",
    model=ModelConfig(n_layers=2, n_heads=2, d_model=64, d_ff=256, context_len=32),
    data=DataConfig(source={source!r}, tokenizer="byte"),
    optim=OptimConfig(peak_lr=1e-3, end_lr=1e-4, warmup_steps=10),
    train=TrainConfig(steps={steps}, batch_size=8, eval_every=20, eval_windows=8, save_every=5),
    sample=SampleConfig(num=1, max_tokens=8),
)
"""


class Failed(Exception):
    """A run did something else than it should."""


class NotRun(Exception):
    """This machine does not let a fault be provoked."""


@dataclasses.dataclass
class Row:
    """What is found of one fault."""

    provoked: Counter[str] = dataclasses.field(default_factory=Counter)
    statuses: Counter[int] = dataclasses.field(default_factory=Counter)  # of the processes that met the fault
    said: dict[str, str] = dataclasses.field(default_factory=dict)  # for each kind of fault a line
    again: int = 0  # steps
    compared: str = "identical"
    problems: list[str] = dataclasses.field(default_factory=list)

    def check(self, ok: bool, problem: str) -> None:
        """Notes and says a problem."""
        if not ok:
            self.problems.append(problem)
            say(f"  FAILED: {problem}")

    def cells(self) -> list[str]:
        """The row of the table, without the name of the fault."""
        verdict = f"FAILED: {self.problems[0]}" if self.problems else self.compared
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.provoked.items())
        statuses = ", ".join(f"{status} ({n})" for status, n in sorted(self.statuses.items()))
        return [kinds, statuses, next(iter(self.said.values()), "-")[:200], str(self.again), verdict[:300]]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- a run, as its files tell ----


def losses(run: Path) -> dict[int, float]:
    """The loss of each step that is written, of a run that may be under way. Raises Failed where a step is there twice."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row] if (run / "metrics.jsonl").is_file() else []
    found = {row["step"]: row["loss"] for row in rows}
    if len(found) < len(rows):
        raise Failed(f"{run.name}: a step is twice in metrics.jsonl")
    return found


def starts(run: Path) -> list[int]:
    """The step at which each start of a run went on."""
    return [row["start"] for row in read_history(run) if "start" in row]


def is_saving(run: Path) -> bool:
    """A checkpoint is half-written, or has no list of files yet."""
    folders = [path for path in (run / "checkpoints").iterdir() if "tmp" in path.name or path.name.isdigit()]
    return any("tmp" in path.name or not (path / checkpoint.FILES).is_file() for path in folders)


def figures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with what is the same in two runs of the same thing."""
    kept = [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]
    return [row for row in kept if row.keys() != {"step"}]


def different_figures(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """How the rows of one metrics.jsonl differ from those of another; "" where they do not."""
    steps = [row["step"] for row in ours if "loss" in row]
    if steps != list(range(1, STEPS + 1)):
        return f"metrics.jsonl has not every step from 1 to {STEPS} once, but {steps}"
    pairs = zip(figures(ours), figures(theirs), strict=False)
    first = next((f"{a} instead of {b}" for a, b in pairs if a != b), "")
    return first or ("" if len(figures(ours)) == len(figures(theirs)) else "metrics.jsonl has another number of rows")


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint, by their names."""
    config = runs.read_config(run)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    abstract = training.abstract_state(config, gpt2.GPT2(config.model), mesh)
    wanted = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (abstract.params, training.progress(abstract)))
    found = checkpoint.restore(run / "checkpoints" / str(STEPS), *wanted)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]}


def different_arrays(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """The first array that is not the same bit for bit; "" where all are."""
    if ours.keys() != theirs.keys():
        return f"other arrays: {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
    return next((f"{name} of the last checkpoint differs" for name in theirs if ours[name].tobytes() != theirs[name].tobytes()), "")


def final_logits(run: Path) -> np.ndarray:
    """Those of the final model, for a batch that is always the same."""
    model, params, tokenizer = runs.load(run)
    tokens_BT = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (4, model.config.context_len), np.int32)
    return np.asarray(model.apply({"params": params}, tokens_BT))


# ---- starts ----


class Disk(NamedTuple):
    """A small disk that only its own processes see by its path."""

    path: Path
    seen: Path  # where the rest of the machine finds it
    enter: list[str]  # the command by which a process sees it

    def fill(self, leave: int = 0) -> None:
        """Leaves `leave` bytes free, a multiple of 4096."""
        with (self.seen / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as e:
                if e.errno != errno.ENOSPC:
                    raise
            file.truncate(max(0, os.fstat(file.fileno()).st_size - leave))

    def clear(self) -> None:
        """Takes away what fills it."""
        (self.seen / "filler").unlink()


class Start:
    """One start of a run, by one process or several."""

    def __init__(self, run: Path, processes: Sequence[subprocess.Popen[bytes]], said: Sequence[Path]) -> None:
        self.run, self.processes, self._said = run, processes, said
        self.before = max(losses(run), default=0)  # the last step written before
        self._n_before = len(starts(run))

    def began(self) -> bool:
        """It has written a step."""
        found = starts(self.run)
        return len(found) > self._n_before and max(losses(self.run), default=0) > found[-1]

    def wait(self, until: Callable[[], bool]) -> bool:
        """Waits until that is so, or a process has ended; returns whether it is so and none has. Raises Failed where it takes too long."""
        deadline = time.monotonic() + START_S
        while self.alive():
            if until():
                return self.alive()
            if time.monotonic() > deadline:
                raise Failed(f"{self.run.name}: nothing happens for {START_S:g} s; it said: {self.said()[-300:]}")
            time.sleep(0.005)
        return False

    def reaches(self, steps: int, later_s: float = 0.0) -> bool:
        """Waits until it has begun and written so many steps, and `later_s` seconds more; returns whether it still runs."""
        if not self.wait(lambda: self.began() and max(losses(self.run)) >= starts(self.run)[-1] + steps):
            return False
        until = time.monotonic() + later_s
        return self.wait(lambda: time.monotonic() > until)

    def alive(self) -> bool:
        """All of its processes run."""
        return all(process.poll() is None for process in self.processes)

    def end(self, timeout: float = START_S) -> list[int]:
        """The exit status of each process, when all have ended. Raises Failed where one hangs."""
        deadline = time.monotonic() + timeout
        for i, process in enumerate(self.processes):
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired as e:
                raise Failed(f"{self.run.name}: process {i} has not ended after {timeout:g} s; it said: {self.said(i)[-300:]}") from e
        return [SIGNALLED - process.returncode if process.returncode < 0 else process.returncode for process in self.processes]

    def again(self) -> int:
        """The steps that it took though they had been taken before."""
        return max(0, self.before - starts(self.run)[-1]) if self.began() else 0

    def said(self, process: int = 0) -> str:
        return self._said[process].read_text(errors="replace")

    def lines(self, *words: str, process: int = 0) -> list[str]:
        """The lines that it said with one of these words."""
        return [line for line in self.said(process).splitlines() if any(word in line for word in words)]


class Bench:
    """The experiment, its undisturbed runs, and all that was started."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder.absolute(), seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self._started: list[subprocess.Popen[bytes]] = []
        draw = random.Random(0)
        words = "the a model reads writes text and learns from it in steps of one token".split()
        text, self.experiment = self.folder / "text.txt", self.folder / "faults.py"
        text.write_text("".join(draw.choice(words) + draw.choice([" ", " ", " ", ".\n"]) for _ in range(4000)), encoding="utf-8")
        self.experiment.write_text(EXPERIMENT.format(source=str(text), steps=STEPS), encoding="utf-8")

    def draw(self, *what: object) -> random.Random:
        """The random numbers for something."""
        return random.Random(f"{self.seed} {what}")

    def start(self, run: Path, *, processes: int = 1, devices: int = 1, changes: Sequence[str] = (), disk: Disk | None = None) -> Start:
        """Starts a run, or starts it again; `devices` each process."""
        told = disk.path / run.name if disk else run
        command = [*(disk.enter if disk else []), sys.executable, "-m", "mlm_jax.cli", "train", str(self.experiment), "--out", str(told)]
        command += [word for change in changes for word in ("--set", change)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": path}
        coordinator = f"127.0.0.1:{_free_port()}"
        started, said = [], []
        (self.folder / "said").mkdir(exist_ok=True)
        begun = Start(run, started, said)
        for i in range(processes):
            group = ["--coordinator", coordinator, "--processes", str(processes), "--process", str(i)] if processes > 1 else []
            said.append(self.folder / "said" / f"{run.name}.{len(self._started)}")
            with said[-1].open("wb") as file:
                process = subprocess.Popen([*command, *group], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            started.append(process)
            self._started.append(process)
        return begun

    def undisturbed(self, **how: Any) -> Path:
        """A run that nothing happened to, started that way; made once."""
        run = self.folder / "-".join(["undisturbed", *(f"{n}_{name}" for name, n in how.items() if name != "changes")])
        if not run.exists():
            finish(self.start(run, **how))
        return run

    def stop_all(self) -> None:
        """Ends what still runs."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def finish(start: Start) -> None:
    """Waits for the end of a run that should come to it. Raises Failed where it does not."""
    statuses = start.end()
    if any(statuses):
        raise Failed(f"{start.run.name}: undisturbed it ended with {statuses}: {start.said()[-300:]}")


def check_identical(row: Row, run: Path, reference: Path) -> None:
    """Notes how the end of the run differs from that of the undisturbed one."""
    found = different_figures(*(read_metrics(path / "metrics.jsonl") for path in (run, reference)))
    found = found or different_arrays(final_arrays(run), final_arrays(reference))
    row.check(not found, f"{run.name}: {found}")


def check_close(row: Row, run: Path, reference: Path) -> None:
    """Notes how far the end of the run is from that of the undisturbed one."""
    ours, theirs = losses(run), losses(reference)
    row.check(sorted(ours) == list(range(1, STEPS + 1)), f"{run.name}: metrics.jsonl has not every step once, but {sorted(ours)}")
    loss = max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in ours)
    a, b = final_logits(run), final_logits(reference)
    logits = float(abs(a - b).max() / abs(b).max())
    row.compared = f"loss {loss:.1e}, logits {logits:.1e}"
    row.check(max(loss, logits) <= LIMIT, f"{row.compared}, more than {LIMIT:g}")


def check_one_line(row: Row, start: Start, kind: str) -> None:
    """Notes what a run that ended early said, which should be one line; Orbax's threads may add some of their own."""
    lines = start.lines("mlm-jax: ")
    row.check(len(lines) == 1, f"{start.run.name}: not one line: {start.said()[-300:]}")
    row.said.setdefault(kind, lines[0][lines[0].index("mlm-jax: ") :] if lines else "-")


# ---- the faults ----


def kill(bench: Bench, row: Row) -> None:
    """SIGKILL at any moment, and while a checkpoint is written."""
    reference, draw = bench.undisturbed(), bench.draw("kill")
    in_saves, others = "inside a save", "at other moments"
    row.provoked.update({in_saves: 0, others: 0})
    for n in range(KILLS):  # far more runs than are needed
        run = bench.folder / f"kill-{n}"
        while True:
            start = bench.start(run)
            enough = row.provoked.total() >= KILLS and row.provoked[in_saves] >= KILLS_IN_SAVES
            steps, later_s, in_save = draw.randint(1, 12), draw.uniform(0, 1), draw.random() < 0.5
            reached = not enough and (
                start.reaches(steps) and start.wait(lambda: is_saving(run)) if in_save else start.reaches(steps, later_s)  # noqa: B023
            )
            if in_save:
                time.sleep(later_s / 20)
            if not reached or not start.alive():
                finish(start)
                row.again += start.again()
                break
            newest = max(checkpoint.steps_in(run / "checkpoints"), default=0)
            start.processes[0].kill()
            row.statuses.update(start.end())
            row.again += start.again()
            row.provoked[in_saves if is_saving(run) else others] += 1
            say(f"  kill: {dict(row.provoked)}, at step {max(losses(run))}, checkpoint {newest}")
        row.said.setdefault("kill", next(iter(start.lines("going on from step")), "-"))
        check_identical(row, run, reference)
        if enough:
            break
    row.check(row.provoked.total() >= KILLS and row.provoked[in_saves] >= KILLS_IN_SAVES, f"too few kills: {dict(row.provoked)}")


def sigterm(bench: Bench, row: Row) -> None:
    """SIGTERM at any moment."""
    reference, draw = bench.undisturbed(), bench.draw("sigterm")
    row.provoked["SIGTERM"] = 0
    for n in range(TERMS):
        run = bench.folder / f"sigterm-{n}"
        while True:
            start = bench.start(run)
            enough = row.provoked["SIGTERM"] >= TERMS
            if enough or not start.reaches(draw.randint(1, 12), draw.uniform(0, 0.5)) or max(losses(run)) > STEPS - 10:
                finish(start)
                row.again += start.again()
                break
            stop(row, start)
        check_identical(row, run, reference)
        if enough:
            break


def stop(row: Row, start: Start, process: int = 0) -> None:
    """Sends SIGTERM to one of the processes, and notes how all end."""
    start.processes[process].send_signal(signal.SIGTERM)
    statuses = start.end()
    saved = max(checkpoint.steps_in(start.run / "checkpoints"), default=0)
    row.provoked["SIGTERM"] += 1
    row.statuses.update(statuses)
    row.again += start.again()
    check_one_line(row, start, "SIGTERM")
    row.check(set(statuses) == {STOPPED} and max(losses(start.run)) == saved, f"{start.run.name}: stopped with {statuses}, step {saved} is saved")
    say(f"  SIGTERM: {statuses}, step {saved} is saved")


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    """A tmpfs in a mount namespace of its own. Raises NotRun where none may be made."""
    path.mkdir(exist_ok=True)
    root = os.geteuid() == 0
    mount = ["sh", "-c", f'mount -t tmpfs -o size={DISK_BYTES} none "$0" && echo mounted && exec sleep infinity', str(path)]
    try:
        command = ["unshare", "--mount", *([] if root else ["--user", "--map-root-user"]), *mount]
        holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as e:
        raise NotRun(f"unshare: {e.strerror}") from e
    with holder:
        try:
            if not holder.stdout.readline():  # pyright: ignore[reportOptionalMemberAccess]  # a pipe
                raise NotRun(" ".join(holder.stderr.read().split()))  # pyright: ignore[reportOptionalMemberAccess]
            enter = ["nsenter", "--target", str(holder.pid), "--mount", *([] if root else ["--user", "--preserve-credentials"])]
            yield Disk(path, Path(f"/proc/{holder.pid}/root{path}"), enter)
        finally:
            holder.kill()


def disk_full(bench: Bench, row: Row) -> None:
    """No room for a checkpoint, for metrics.jsonl, or for a start."""
    draw = bench.draw("disk-full")
    with small_disk(bench.folder / "disk") as disk:
        reference = bench.undisturbed()
        for kind, leave, changes in (
            ("a save", 1 << 16, []),
            ("metrics.jsonl", 0, ["train.save_every=0"]),  # nothing else is written but the curve
            ("a start", 0, []),
        ):
            run = disk.seen / kind.replace(" ", "-")
            for _ in range(2):
                start = bench.start(run, changes=changes, disk=disk)
                if not start.reaches(draw.randint(1, 12)):
                    raise Failed(f"{run.name}: ended before its disk was full: {start.said()[-300:]}")
                if kind == "a start":
                    start.processes[0].send_signal(signal.SIGTERM)
                    start.end()
                    row.again += start.again()
                    disk.fill()
                    start = bench.start(run, changes=changes, disk=disk)
                else:
                    disk.fill(leave)
                statuses = start.end()
                row.provoked[kind] += 1
                row.statuses.update(statuses)
                row.again += start.again()
                row.check(0 not in statuses, f"{run.name}: ended with {statuses} on a full disk")
                check_one_line(row, start, kind)
                say(f"  {kind}: {statuses}, {row.said[kind]}")
                disk.clear()
            start = bench.start(run, changes=changes, disk=disk)
            finish(start)
            row.again += start.again()
            check_identical(row, run, reference)
            shutil.rmtree(run)  # the disk is small


def _pieces(folder: Path, part: str) -> list[Path]:
    """The files that hold bytes of the arrays of a part."""
    return sorted(path for path in (folder / part).rglob("*") if path.is_file() and "/c/" in path.as_posix())


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def _flip(raw: bytes, draw: random.Random) -> bytes:
    changed = bytearray(raw)
    changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _remove(path: Path) -> Path:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


def _unsealed(folder: Path, damage: Callable[[Path], Path]) -> Path:
    (folder / checkpoint.FILES).unlink()
    return damage(folder)


def _swap(draw: random.Random, folder: Path) -> Path:
    """Exchanges a parameter's file with one of the optimizer's of the same size."""
    a = draw.choice(_pieces(folder, "params"))
    b = next(path for path in _pieces(folder, "progress") if path.stat().st_size == a.stat().st_size and path.read_bytes() != a.read_bytes())
    raw = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(raw)
    return a


def _stale(folder: Path, draw: random.Random) -> Path:
    """Puts the file of the checkpoint before in place of one."""
    path = draw.choice(_pieces(folder, "params"))
    older = sorted((other for other in folder.parent.iterdir() if other.name.isdigit()), key=lambda other: int(other.name))[-2]
    return Path(shutil.copyfile(older / path.relative_to(folder), path))


def _empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


# What is done to the folder of a checkpoint; returns what has to be named, the folder itself where that is empty.
DAMAGES: dict[str, Callable[[Path, random.Random], Path]] = {
    "a piece cut short": lambda f, draw: _rewrite(draw.choice(_pieces(f, "params")), lambda raw: raw[: len(raw) // 2]),
    "an empty piece": lambda f, draw: _rewrite(draw.choice(_pieces(f, "progress")), lambda raw: b""),
    "a flipped bit of a parameter": lambda f, draw: _rewrite(draw.choice(_pieces(f, "params")), lambda raw: _flip(raw, draw)),
    "a flipped bit of a moment": lambda f, draw: _rewrite(draw.choice(_pieces(f, "progress")), lambda raw: _flip(raw, draw)),
    "a piece of zeros": lambda f, draw: _rewrite(draw.choice(_pieces(f, "params")), lambda raw: bytes(len(raw))),
    "appended bytes": lambda f, draw: _rewrite(draw.choice(_pieces(f, "params")), lambda raw: raw + b"\0"),
    "two files exchanged": lambda f, draw: _swap(draw, f),
    "a piece of the checkpoint before": _stale,
    "a missing piece": lambda f, draw: _remove(draw.choice(_pieces(f, "progress"))),
    "a missing array": lambda f, draw: _remove(draw.choice(sorted((f / "params").glob("blocks.*")))),
    "no parameters": lambda f, draw: _remove(f / "params"),
    "no progress": lambda f, draw: _remove(f / "progress"),
    "no metadata": lambda f, draw: _remove(f / "params" / "_METADATA"),
    "garbled metadata": lambda f, draw: _rewrite(f / "progress" / "_METADATA", lambda raw: draw.randbytes(len(raw))),
    "garbled metadata of the checkpoint": lambda f, draw: _rewrite(f / "_CHECKPOINT_METADATA", lambda raw: b"garbage"),
    "a list of files cut short": lambda f, draw: _rewrite(f / checkpoint.FILES, lambda raw: raw[:-5]),
    "a garbled list of files": lambda f, draw: _rewrite(f / checkpoint.FILES, lambda raw: draw.randbytes(len(raw))),
    "no list, a piece cut short": lambda f, draw: _unsealed(f, lambda f: DAMAGES["a piece cut short"](f, draw)),
    "no list, a missing array": lambda f, draw: _unsealed(f, lambda f: DAMAGES["a missing array"](f, draw)),
    "an empty folder": lambda f, draw: _empty_folder(f),
}
NO_LIST, HALF, ALL = "no list of files alone", "a half-written checkpoint beside it", "both checkpoints cut short"


def corruption(bench: Bench, row: Row) -> None:
    """The newest checkpoint of a stopped run is damaged."""
    reference, half = bench.undisturbed(), bench.folder / "half-way"
    row.provoked["kinds"] = 0
    start = bench.start(half)
    if not start.reaches(27):
        raise Failed(f"half-way: it ended too early: {start.said()[-300:]}")
    start.processes[0].send_signal(signal.SIGTERM)
    start.end()
    older, newest = checkpoint.steps_in(half / "checkpoints")
    for n, kind in enumerate([*DAMAGES, NO_LIST, HALF, ALL]):
        run = Path(shutil.copytree(half, bench.folder / f"corruption-{n}"))
        folder, draw = run / "checkpoints" / str(newest), bench.draw("corruption", kind)
        lines, used = [], newest
        if kind == NO_LIST:
            (folder / checkpoint.FILES).unlink()
            lines = [f"checkpoint {newest} had no {checkpoint.FILES}: "]
        elif kind == HALF:
            shutil.copytree(folder, folder.with_name(f"{newest + 5}.orbax-checkpoint-tmp"))
            shutil.rmtree(folder.with_name(f"{newest + 5}.orbax-checkpoint-tmp") / "progress")
        else:
            damage = DAMAGES["a piece cut short" if kind == ALL else kind]
            damaged = {newest: damage(folder, draw)} | ({older: damage(folder.with_name(str(older)), draw)} if kind == ALL else {})
            used = 0 if kind == ALL else older
            for step, path in damaged.items():
                name = path.relative_to(run / "checkpoints" / str(step)).as_posix()
                lines.append(f"checkpoint {step} is damaged: {'it is empty' if name == '.' else name}")
        start = bench.start(run)
        finish(start)
        said = start.lines("checkpoint ")
        row.provoked["kinds"] += 1
        row.statuses.update(start.end())
        row.again += start.again()
        row.said[kind] = said[0] if said else "-"
        say(f"  {kind}: {row.said[kind]}")
        row.check(len(said) == len(lines) and all(map(str.startswith, said, lines)), f"{kind}: said {said}, not {lines}")
        row.check(starts(run)[-1] == used, f"{kind}: went on from step {starts(run)[-1]}, not {used}")
        row.check((run / "checkpoints" / f"{newest}.damaged").is_dir() == (used != newest), f"{kind}: nothing, or the wrong thing, was moved aside")
        check_identical(row, run, reference)


def peers(bench: Bench, row: Row, n: int) -> None:
    """One of `n` processes is killed: the first, and another."""
    reference, draw = bench.undisturbed(processes=n), bench.draw("peers", n)
    for victim in (0, draw.randrange(1, n)):
        run = bench.folder / f"peer-{n}-{victim}"
        start = bench.start(run, processes=n)
        if not start.reaches(draw.randint(1, 40), draw.uniform(0, 0.5)):
            raise Failed(f"{run.name}: it ended too early: {start.said()[-300:]}")
        start.processes[victim].kill()
        row.provoked[f"process {victim}"] += 1
        killed = time.monotonic()
        statuses = start.end(PEERS_S)
        seconds = time.monotonic() - killed
        others = [status for i, status in enumerate(statuses) if i != victim]
        row.statuses.update(others)
        row.check(set(others) <= GONE, f"{run.name}: the others ended with {others}")
        i = (victim + 1) % n
        lines = start.lines("mlm-jax: ", process=i) or start.lines("fatal error", process=i)  # JAX's own
        row.said.setdefault(f"process {victim}", lines[0] if lines else "-")
        say(f"  process {victim} of {n} was killed at step {max(losses(run))}: the others ended with {others} after {seconds:.0f} s")
        row.again += start.again()
        start = bench.start(run, processes=n)
        finish(start)
        row.again += start.again()
        check_identical(row, run, reference)


def elsewhere(bench: Bench, row: Row, name: str, ways: Sequence[dict[str, Any]]) -> None:
    """The run is stopped, and goes on another way, from the first of `ways` to the last."""
    reference, draw = bench.undisturbed(**ways[0]), bench.draw(name)
    run = bench.folder / name
    for n, way in enumerate(ways):
        start = bench.start(run, **way)
        if n + 1 < len(ways):
            if not start.reaches(draw.randint(6, 13)):
                raise Failed(f"{name}: it ended too early: {start.said()[-300:]}")
            stop(row, start, draw.randrange(len(start.processes)))
        else:
            finish(start)
            row.again += start.again()
    check_close(row, run, reference)


def on_mesh(data: int, fsdp: int) -> dict[str, Any]:
    return {"devices": data * fsdp, "changes": (f"mesh.data={data}", f"mesh.fsdp={fsdp}")}


FAULTS: dict[str, Callable[[Bench, Row], None]] = {
    "kill": kill,
    "sigterm": sigterm,
    "disk-full": disk_full,
    "corruption": corruption,
    "peer-2": lambda bench, row: peers(bench, row, 2),
    "peer-4": lambda bench, row: peers(bench, row, 4),
    "mesh": lambda bench, row: elsewhere(bench, row, "mesh", [on_mesh(2, 4), on_mesh(1, 4), on_mesh(2, 1), on_mesh(1, 1), on_mesh(2, 4)]),
    "hosts": lambda bench, row: elsewhere(bench, row, "hosts", [{"processes": n} for n in (1, 2, 4, 2, 1)]),
}


def measure(bench: Bench, name: str) -> Row | None:
    """The row of one fault, which whatever goes wrong is part of; None where this machine does not allow it."""
    say(name)
    before, row = time.monotonic(), Row()
    try:
        FAULTS[name](bench, row)
    except NotRun as e:
        say(f"  not run: {e}")
        print(f"| {name} | not run: {e} | | | | |", flush=True)
        return None
    except Exception as e:  # also of reading what a run left
        row.check(False, f"{type(e).__name__}: {' '.join(str(e).split())}")
    finally:
        bench.stop_all()
    print(f"| {name} | {' | '.join(cell.replace('|', '/').replace(str(bench.folder), 'DIR') for cell in row.cells())} |", flush=True)
    say(f"  {time.monotonic() - before:.0f} s")
    return row


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", action="append", choices=FAULTS, help="one of the faults; repeatable (default: all)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, metavar="DIR", help="where the runs go, and stay (default: a temporary directory)")
    args = arguments.parse_args()
    if args.out and args.out.exists():
        arguments.error(f"--out {args.out} exists")
    with contextlib.ExitStack() as stack:
        bench = Bench(args.out or Path(stack.enter_context(tempfile.TemporaryDirectory())), args.seed)
        print("| fault | how often | exit statuses | what one run said | steps taken again | the end |\n|---|---|---|---|---|---|")
        rows = {name: measure(bench, name) for name in args.only or FAULTS}
        if found := rows.get("corruption"):
            print("\n| damage | what the run said |\n|---|---|")
            for kind, line in found.said.items():
                print(f"| {kind} | {line} |")
    return int(any(row and row.problems for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
