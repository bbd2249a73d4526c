"""Checkpoints of a run: written in the background, renamed into place when whole, restored onto whatever mesh is in use.

A checkpoint is `checkpoints/<step>/` with two parts: "params", and "progress" (the optimizer's state and the step). Once it is written,
files.json beside them lists the size and CRC-32 of every file, so that damage is found and named before anything is read.
"""

import json
import logging
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mlm_jax import distributed
from mlm_jax.config import InputError

FILES = "files.json"
CHUNK_BYTES = 16 << 20  # dozens of pieces may be on their way to the disk at once
_CRC_BYTES = 16 << 30  # larger checkpoints are checked by the sizes of their files alone: reading them twice would take minutes


class Checkpoints:
    """The checkpoints that a run writes into one folder; a context manager, which waits for what is being written when it ends.

    Half-written checkpoints that a killed run left are removed at the start, so there must be one writer at a time.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        """Makes the folder; the newest `keep` checkpoints stay in it."""
        self.folder = folder
        newest: Any = ocp.training.preservation_policies.LatestN(keep)  # Any: its own protocol's types disagree with it
        self._orbax = ocp.training.Checkpointer(str(folder.absolute()), context=_layout(), preservation_policy=newest, cleanup_tmp_directories=True)
        self._writing: tuple[Path, Any] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._finish()
        finally:
            self._orbax.close()

    def save(self, step: int, params: Any, progress: Any) -> None:
        """Starts writing checkpoint `step`, when the one before is whole; JAX arrays are copied before it returns, so that they may be donated.

        NumPy arrays are not, and must stay as they are until this is written.
        """
        self._finish()
        self._writing = self.folder / str(step), self._orbax.save_checkpointables_async(step, {"params": params, "progress": progress}, force=True)

    def restore(self, step: int, params: Any, progress: Any | None = None) -> tuple[Any, Any]:
        """(params, progress) of checkpoint `step`, as `restore` returns them."""
        return restore(self.folder / str(step), params, progress)

    def _finish(self) -> None:
        if self._writing:
            folder, response = self._writing
            self._writing = None
            response.result()
            if distributed.leads():
                _seal(folder)


def _layout() -> ocp.Context:
    """How arrays lie on disk: zarr, uncompressed, in pieces that are written as they come.

    Orbax's own choice gathers the arrays of a process in one store, whose files it holds in memory until the last: a save of GPT-2 1558M
    took 1.9 times its weights, and this takes 1.05 times. Compression saved an eighth of the bytes of float32 weights in three times the time.
    """
    logging.getLogger("absl").addFilter(_is_news)
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt, saving.use_compression, saving.storage_options.chunk_byte_size = False, False, CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False
    return context


def _is_news(record: logging.LogRecord) -> bool:
    """False of Orbax's warning that nothing is left to do for a checkpoint that `_layout` keeps out of such stores."""
    return not str(record.msg).startswith("[process=%s][thread=%s] Skipping merge of OCDBT checkpoints")


def restore(folder: Path, params: Any, progress: Any | None = None) -> tuple[Any, Any]:
    """(params, progress) of the checkpoint in `folder`, with the shapes, types and shardings of the given ShapeDtypeStructs; it changes no file.

    Where NumPy arrays are given, of any content, NumPy arrays come back.

    Without `progress` only the parameters are read, and None stands for the rest.

    Raises:
      InputError: the checkpoint is damaged, or does not hold these arrays.
    """
    _check_whole(folder)
    wanted = {"params": params} | ({} if progress is None else {"progress": progress})
    try:
        stored = ocp.checkpointables_metadata(str(folder.absolute())).metadata
    except Exception as e:  # a damaged file surfaces as whatever the storage layer raised
        raise _damaged(folder, e) from e
    for part, tree in wanted.items():
        if stored.get(part) is None:
            raise _damaged(folder, f"no readable {part}")
        _check_same_arrays(folder / part, stored[part], tree)
    try:
        found = ocp.load_checkpointables(str(folder.absolute()), wanted)
    except Exception as e:
        raise _damaged(folder, e) from e
    return found["params"], found.get("progress")


def steps_in(folder: Path) -> list[int]:
    """The steps that have a finished checkpoint in `folder`, oldest first."""
    return sorted(int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdigit()) if folder.is_dir() else []


def _seal(folder: Path) -> None:
    """Writes down what the files of a finished checkpoint are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    values = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size} for path in files}
    if sum(value["bytes"] for value in values.values()) <= _CRC_BYTES:
        for value, crc in zip(values.values(), _crc32s(files), strict=True):
            value["crc32"] = crc
    partial = folder / f".{FILES}.partial"
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / FILES)


def _check_whole(folder: Path) -> None:
    """Raises InputError, naming the file, where one is missing, cut short or changed; a run killed before `_seal` has nothing to check against."""
    if not (folder / FILES).is_file():
        return
    try:
        values = json.loads((folder / FILES).read_text(encoding="utf-8"))
        for name, then in values.items():
            path = folder / name
            if not path.is_file():
                raise _damaged(folder, f"{name} is missing")
            if path.stat().st_size != then["bytes"]:
                raise _damaged(folder, f"{name} has {path.stat().st_size} bytes, {then['bytes']} were written")
        summed = {name: then["crc32"] for name, then in values.items() if "crc32" in then}
        for (name, then), crc in zip(summed.items(), _crc32s([folder / name for name in summed]), strict=True):
            if crc != then:
                raise _damaged(folder, f"{name} has other bytes than were written")
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise _damaged(folder, f"{FILES}: {e}") from e


def _crc32s(paths: Sequence[Path]) -> list[int]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_crc32, paths))


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _damaged(folder: Path, reason: object) -> InputError:
    words = next((line for line in str(reason).splitlines() if line.strip()), type(reason).__name__)[:200]
    return InputError("checkpoint", str(folder), f"damaged: {words}", "Remove this folder to go on from the checkpoint before it, or from the start")


def _check_same_arrays(part: Path, stored: Any, wanted: Any) -> None:
    """Raises InputError, naming each array that is missing, extra or of another shape."""
    have, want = _shapes(stored), _shapes(wanted)
    names = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    if names:
        wrong = ", ".join(f"{name} {have.get(name, 'missing')} instead of {want.get(name, 'none')}" for name in names)
        raise InputError("checkpoint", str(part), f"does not hold this model's arrays: {wrong}", "Use the configuration it was trained with")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def word(key: Any) -> str:
        return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(word(key) for key in path): tuple(leaf.shape) for path, leaf in leaves}
