"""The copies of a run's small files, where the run lives in a bucket: this machine writes them in a directory of its own and sends them there.

The checkpoints are written there directly. A run that went on elsewhere is ahead of this directory: its files are fetched.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlm_jax import distributed, lock, storage
from mlm_jax.config import InputError
from mlm_jax.storage import Place

PREPARED = ("run.json", "code", "tokenizer", "audit.html", "config.json")  # the last: a folder with a configuration is a run
ROWS = ("wandb_id", "metrics.jsonl", "history.jsonl")
ENDED = ("evaluation.json", "samples.txt", "hf")
SHOWN = ("report.html", "loss.png")

_HOME = ".home"  # of a directory with copies: where the run lives
_OWNER = ".owner"  # of a run in a bucket: which process has begun to train it last
_FETCHED = (
    "run.json",
    "code",
    "tokenizer",
    "audit.html",
    "evaluation.json",
    "samples.txt",
    "wandb_id",
    "metrics.jsonl",
    "config.json",
    "history.jsonl",
)


def enter(folder: Path, home: Place, *, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    """Sees to it that the run in `home` can be written, and that `folder` is up to date with it; for every process, of which one fetches.

    The history of a run only grows. So `folder` is behind where the one in the bucket is not how its own begins.

    Raises:
      InputError: the bucket cannot be used, or `folder` has files of another run, or of this one, which has gone from the bucket.
      NotReached: what is there could not be fetched; the next start does it.
    """
    claimed = (folder / _HOME).read_text(encoding="utf-8").strip() if (folder / _HOME).is_file() else ""
    if isinstance(home, Path):
        if claimed:
            raise InputError("--out", str(folder), f"has copies of the run in {claimed}", f"Go on with --out {claimed}, or name another directory")
        return
    storage.check_writable(home)
    if not distributed.leads():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name != "tokens" and path.name[0] != ".") if folder.is_dir() else []
    if others and claimed != str(home):
        reason = f"its copies are made in {folder}, which holds {others[0]} of {claimed or 'something else'}"
        raise InputError("--out", str(home), reason, "Start it in another working directory, or name another folder of the bucket")
    history = folder / "history.jsonl"
    if not (home / "config.json").exists():
        if history.exists():
            raise InputError("--out", str(home), f"no run is there any more, but {folder} has copies of it", f"Remove {folder} to begin anew")
        return
    there = (home / history.name).read_bytes() if (home / history.name).exists() else b""
    if (folder / "config.json").is_file() and (history.read_bytes() if history.is_file() else b"").startswith(there):
        return
    say(f"fetches the run from {home}")
    claim(folder, home)
    for name in ("config.json", *PREPARED, *ROWS, *ENDED, *SHOWN):  # without a configuration it is behind, wherever this is cut off
        _take_away(folder / name)
    storage.fetch(home, _FETCHED, folder)


def claim(folder: Path, home: Place) -> None:
    """Notes that `folder` has copies of the run in `home`."""
    if not isinstance(home, Path):
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(folder / _HOME, f"{home}\n")


def take(home: Place) -> str:
    """Notes in the bucket that from now on this process makes the run; returns the note, for `check_taken`. Raises NotReached where that fails."""
    note = lock.here()
    if not isinstance(home, Path):
        storage.write_text(home / _OWNER, note)
    return note


def check_taken(home: Place, note: str) -> None:
    """Sees to it that no other process has taken the run over since: whoever began last goes on alone.

    Raises:
      InputError: another one has.
      NotReached: the bucket could not be read.
    """
    if isinstance(home, Path):
        return
    there = storage.read_text(home / _OWNER)
    if there != note:
        raise InputError("--out", str(home), f"taken over by {lock.words(there)}", "Let one machine at a time use it")


def send(folder: Path, home: Place, names: Sequence[str]) -> None:
    """Sends what is new or changed of these files and folders to the bucket. Raises NotReached where that fails."""
    if not isinstance(home, Path):
        storage.send(folder, names, home)


def remove(folder: Path, home: Place, names: Sequence[str]) -> None:
    """Takes these files and folders away, in the bucket first. Raises NotReached where that fails."""
    if not isinstance(home, Path):
        storage.remove(home, names)
    for name in names:
        _take_away(folder / name)


def _take_away(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
