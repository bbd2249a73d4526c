"""Checkpoints of a run: written in the background, in place only when whole, restored onto whatever mesh is in use; on disk or in a bucket.

A checkpoint is `checkpoints/<step>/` with two parts: "params", and "progress" (the optimizer's state and the step). It says of itself what
it was trained with (`about`). Once it is written, files.json beside them lists the size and the checksum of every file, so that damage is
found and named before anything is read. A damaged checkpoint is moved aside, never deleted.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mlm_jax import distributed, storage
from mlm_jax.config import InputError
from mlm_jax.storage import Place

FILES = "files.json"
CHUNK_BYTES = 16 << 20  # dozens of pieces may be on their way to the disk at once
SLICE_BYTES = 1 << 16  # of an array that several devices hold, each writes a part; one writes it all where the parts would be smaller than that
_ABOUT = "_CHECKPOINT_METADATA"  # Orbax's own file, which holds what we say beside what it does
_COMMITTED = "commit_success.txt"  # Orbax's last file: in a bucket nothing else tells a whole checkpoint from a half-written one
_whole: dict[str, dict[str, storage.File]] = {}  # the files of checkpoints found whole: while they stay so, nothing is read again to be checked


class NotSaved(RuntimeError):
    """A checkpoint could not be written."""


class NotRestored(RuntimeError):
    """A checkpoint that is whole could not be read."""


class Checkpoints:
    """The checkpoints that a run writes into one folder; a context manager, which waits for what is being written when it ends.

    Half-written checkpoints that a killed run left are removed at the start, so there must be one writer at a time. `newest` is the step of the
    newest whole checkpoint that was there at the start, None without one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        about: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        """Makes the folder, after damaged checkpoints in it have been moved aside as `newest_whole` does.

        The newest `keep` checkpoints stay in it, those whose step is a multiple of `keep_every`, and the `keep_best` with the lowest validation
        loss. `about` is what each says of itself: values of JSON.
        """
        self.folder, self._about = storage.place(folder), dict(about or {})
        self.newest = newest_whole(folder, say=say)
        self._kept: Any = _Kept(keep, keep_every, keep_best, _losses(self.folder) if keep_best else {})  # Any: Orbax's protocol names its own types
        self._orbax = ocp.training.Checkpointer(
            storage.address(self.folder), context=_layout(), preservation_policy=self._kept, cleanup_tmp_directories=True
        )
        self._ends = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._shown_before = sys.unraisablehook

    def __enter__(self) -> "Checkpoints":
        self._shown_before, sys.unraisablehook = sys.unraisablehook, self._show
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            sys.unraisablehook = self._shown_before
            self._ends.shutdown()
            with contextlib.suppress(Exception):  # it raises again what has been raised of a save that failed
                self._orbax.close()

    def _show(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Prints an exception that nobody could take, but for TensorStore's of writes whose save has failed at another: their loop is closed."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._shown_before(unraisable)

    def save(self, step: int, params: Any, progress: Any, *, val_loss: float | None = None) -> None:
        """Starts writing checkpoint `step`, when the one before is whole; JAX arrays are copied before it returns, so that they may be donated.

        NumPy arrays are not, and must stay as they are until this is written. `val_loss` is the validation loss of these parameters, in nats/token.

        Raises:
          NotSaved: the one before could not be written, or this one not be begun.
        """
        self.wait()
        about = self._about | {"step": step}
        if val_loss is not None and math.isfinite(val_loss):
            self._kept.losses[step] = about["val_loss"] = val_loss
        parts = {"params": params, "progress": progress}
        try:
            response = self._orbax.save_checkpointables_async(step, parts, force=True, custom_metadata=about)
        except Exception as e:  # whatever the storage layer raised
            raise self._not_saved(step, e) from e
        self._writing = self._ends.submit(self._end, step, response)

    def wait(self) -> None:
        """Returns when what is being written is whole. Raises NotSaved."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def _end(self, step: int, response: Any) -> None:
        """Waits until checkpoint `step` is written, and seals it."""
        try:
            response.result()
            if distributed.leads():
                _seal(self.folder / str(step))
        except Exception as e:
            raise self._not_saved(step, e) from e

    def _not_saved(self, step: int, reason: Exception) -> NotSaved:
        # What the system said comes late in a long line of TensorStore's, and after a number in Python's.
        said = re.search(r""": ([^:"\[]+) \[(?:os_error_code|tensorstore_spec)=|^\[Errno \d+\] ([^:\n]+)""", str(reason))
        words = said[1] or said[2] if said else storage.first_line(reason)
        return NotSaved(f"checkpoint {step} could not be written to {self.folder}: {words}; those before it are as they were")


class _Kept:
    """Which checkpoints stay; Orbax asks after each save.

    Orbax's own policy for the best would fail at the start over a damaged checkpoint, however old.
    """

    def __init__(self, newest: int, every: int, best: int, losses: dict[int, float]) -> None:
        self.newest, self.every, self.best, self.losses = newest, every, best, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = set(steps[-self.newest :]) | {step for step in steps if self.every and step % self.every == 0}
        stay |= set(_by_loss({step: self.losses[step] for step in steps if step in self.losses})[: self.best])
        return [step in stay for step in steps]


def _by_loss(losses: Mapping[int, float]) -> list[int]:
    """The steps, from the lowest loss up; of equal losses the newer step first."""
    return sorted(losses, key=lambda step: (losses[step], -step))


def _layout() -> ocp.Context:
    """How arrays lie on disk: zarr, uncompressed, in pieces that are written as they come.

    Orbax's own choice gathers the arrays of a process in one store, whose files it holds in memory until the last: a save of GPT-2 1558M
    took 1.9 times its weights, and this takes 1.05 times. Compression saved an eighth of the bytes of float32 weights in three times the time.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt, saving.use_compression, saving.storage_options.chunk_byte_size = False, False, CHUNK_BYTES
    saving.min_slice_bytes_for_replica_parallel = SLICE_BYTES
    context.memory.deepcopy_host_arrays = False
    return context


def _is_news(record: logging.LogRecord) -> bool:
    """False of what Orbax logs of errors that it raises too, in each thread that they pass, with all their tracebacks, and of what asyncio says of
    those that nobody waited for; and of Orbax's warning that nothing is left to do for a checkpoint that `_layout` keeps out of such stores."""
    skipped = str(record.msg).startswith("[process=%s][thread=%s] Skipping merge of OCDBT checkpoints")
    said = record.pathname + record.getMessage() + ("".join(traceback.format_exception(*record.exc_info)) if record.exc_info else "")
    return not skipped and not (record.levelno >= logging.ERROR and "orbax" in said)


def restore(folder: str | os.PathLike[str], params: Any, progress: Any | None = None) -> tuple[Any, Any]:
    """(params, progress) of the checkpoint in `folder`, with the shapes, types and shardings of the given ShapeDtypeStructs; it changes no file.

    Where NumPy arrays are given, of any content, NumPy arrays come back.

    Without `progress` only the parameters are read, and None stands for the rest.

    Raises:
      InputError: the checkpoint is damaged, or does not hold these arrays.
      NotRestored: it is whole, and could not be read, for want of memory, say, or of a connection.
    """
    place = storage.place(folder)
    distributed.together(lambda: _check_whole(place) if distributed.leads() else None)
    wanted = {"params": params} | ({} if progress is None else {"progress": progress})
    try:
        stored = ocp.checkpointables_metadata(storage.address(place)).metadata
    except Exception as e:
        raise _not_restored(place, e) from e
    for part, tree in wanted.items():
        if stored.get(part) is None:
            raise _damaged(place, f"no readable {part}")
        _check_same_arrays(place / part, stored[part], tree)
    try:
        found = ocp.load_checkpointables(storage.address(place), wanted)
    except Exception as e:
        raise _not_restored(place, e) from e
    return found["params"], found.get("progress")


def steps_in(folder: str | os.PathLike[str]) -> list[int]:
    """The steps that have a finished checkpoint in `folder`, oldest first."""
    place = storage.place(folder)
    if not storage.is_in_bucket(place):
        return sorted(int(path.name) for path in place.iterdir() if path.name.isdigit() and path.is_dir()) if place.is_dir() else []
    paths = place.iterdir() if place.exists() else []  # is_dir would say no of a bucket that cannot be reached
    return sorted(int(path.name) for path in paths if path.name.isdigit() and (path / _COMMITTED).exists())


def newest_whole(folder: str | os.PathLike[str], *, say: Callable[[str], None]) -> int | None:
    """The step of the newest whole checkpoint in `folder`, None without one; the same in every process.

    Each newer one is damaged: it is renamed to STEP.damaged, and `say` hears what is wrong with it.
    """
    step = distributed.together(lambda: _newest_whole(storage.place(folder), say) if distributed.leads() else None)
    if not jax.distributed.is_initialized():
        return step
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if step < 0 else step


def _newest_whole(folder: Place, say: Callable[[str], None]) -> int | None:
    damaged: dict[int, str] = {}
    newest = None
    for step in reversed(steps_in(folder)):
        fault = _fault(folder / str(step))
        if fault is None:
            newest = step
            break
        damaged[step] = fault
    instead = "there is none before it" if newest is None else f"checkpoint {newest} is used instead"
    for step, fault in damaged.items():
        places = (folder / f"{step}.damaged{f'.{n}' if n else ''}" for n in itertools.count())
        aside = next(place for place in places if not place.exists())
        storage.move(folder / str(step), aside)
        say(f"checkpoint {step} is damaged: {fault}; it was moved to {aside.name}, {instead}")
    if newest is not None and not (folder / str(newest) / FILES).exists():
        _seal(folder / str(newest))
        say(f"checkpoint {newest} had no {FILES}: its arrays' files have their sizes, but whether a byte had changed could not be told")
    return newest


def about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the checkpoint in `folder` says of itself: its step, its validation loss where there was one, and what `Checkpoints` was given.

    Raises:
      InputError: it cannot be read.
    """
    place = storage.place(folder)
    try:
        return dict(_json(place, _ABOUT)["custom_metadata"] or {})
    except (ValueError, TypeError, KeyError) as e:
        raise _damaged(place, e) from e


def best_step(folder: str | os.PathLike[str]) -> int | None:
    """The step of the checkpoint in `folder` with the lowest validation loss, None where none has one."""
    return next(iter(_by_loss(_losses(storage.place(folder)))), None)


def _losses(folder: Place) -> dict[int, float]:
    """The validation losses of the checkpoints that tell it."""
    losses = {}
    for step in steps_in(folder):
        try:
            losses[step] = about(folder / str(step)).get("val_loss")
        except InputError:  # of an old checkpoint, which nobody asked for
            continue
    return {step: loss for step, loss in losses.items() if loss is not None}


# ---- whether a checkpoint is whole ----


def _seal(folder: Place) -> None:
    """Writes down what the files of a finished checkpoint are."""
    files = {name: file for name, file in storage.files(folder).items() if name != FILES}
    values: dict[str, dict[str, Any]] = {name: {"bytes": file.bytes} for name, file in files.items()}
    if isinstance(folder, Path):
        for name, crc in zip(files, _crc32s([folder / name for name in files]), strict=True):
            values[name]["crc32"] = crc
    else:
        for name, file in files.items():
            values[name]["crc32c"] = file.crc32c
    storage.write_text(folder / FILES, json.dumps(values, indent=1) + "\n")
    _whole[storage.address(folder)] = storage.files(folder)


def _check_whole(folder: Place) -> None:
    """Raises InputError, naming the file, where one is missing, cut short or changed."""
    if fault := _fault(folder):
        raise _damaged(folder, fault)


def _fault(folder: Place) -> str | None:
    """The first file that is not as it was written, in words; None of a whole checkpoint, which is read once for it and not again."""
    files = storage.files(folder)
    if _whole.get(storage.address(folder)) == files:
        return None
    fault = _sealed_fault(folder, files) if FILES in files else _unsealed_fault(folder, files)
    if fault is None:
        _whole[storage.address(folder)] = files
    return fault


def _sealed_fault(folder: Place, files: Mapping[str, storage.File]) -> str | None:
    try:
        values = _json(folder, FILES)
        for name, then in values.items():
            if fault := _size_fault(name, then["bytes"], files):
                return fault
            if "crc32c" in then and files[name].crc32c and files[name].crc32c != then["crc32c"]:
                return f"{name} has other bytes than were written"
        summed = {name: then["crc32"] for name, then in values.items() if "crc32" in then and isinstance(folder, Path)}
        for (name, then), crc in zip(summed.items(), _crc32s([folder / name for name in summed]), strict=True):
            if crc != then:
                return f"{name} has other bytes than were written"
    except ValueError as e:
        return storage.first_line(e)
    except (TypeError, KeyError, AttributeError):
        return f"{FILES} is no list of files"
    return None


def _unsealed_fault(folder: Place, files: Mapping[str, storage.File]) -> str | None:
    """The same of a checkpoint without its list, as a run leaves that is killed before `_seal`: by what Orbax wrote of its arrays."""
    if not files:
        return "it is empty"
    try:
        _json(folder, _ABOUT)
        for part in ("params", "progress"):
            for leaf in _json(folder, f"{part}/_METADATA")["tree_metadata"].values():
                if leaf["value_metadata"]["skip_deserialize"]:  # None, where the optimizer has nothing to keep
                    continue
                array = f"{part}/{'.'.join(str(key['key']) for key in leaf['key_metadata'])}"
                for piece, size in _pieces(_json(folder, f"{array}/zarr.json")).items():
                    if fault := _size_fault(f"{array}/{piece}", size, files):
                        return fault
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        return storage.first_line(e)
    return None


def _json(folder: Place, name: str) -> Any:
    """What a file of JSON holds. Raises ValueError, naming it, where it is missing or holds something else."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ValueError(f"{name} is missing") from e
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e


def _size_fault(name: str, size: int, files: Mapping[str, storage.File]) -> str | None:
    if name not in files:
        return f"{name} is missing"
    return None if files[name].bytes == size else f"{name} has {files[name].bytes} bytes, {size} were written"


def _pieces(array: Mapping[str, Any]) -> dict[str, int]:
    """The files of an array that `_layout` writes, and their sizes in bytes, by its zarr.json.

    A file holds one block of the array, uncompressed, then the blocks' offset and size (8 bytes each) and a checksum of these (4).
    Source: Zarr 3, "Sharding codec" and "Regular grids"; default chunk keys.
    """
    chunk = array["chunk_grid"]["configuration"]["chunk_shape"]
    inner = array["codecs"][0]["configuration"]["chunk_shape"]
    n_inner = math.prod(-(-whole // part) for whole, part in zip(chunk, inner, strict=True))
    size = n_inner * (math.prod(inner) * jnp.dtype(array["data_type"]).itemsize + 16) + 4
    grid = [-(-whole // part) for whole, part in zip(array["shape"], chunk, strict=True)]
    return {"/".join(["c", *map(str, index)]): size for index in np.ndindex(*grid)}


def _crc32s(paths: Sequence[Place]) -> list[int]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_crc32, paths))


def _crc32(path: Place) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _damaged(folder: Place, reason: object) -> InputError:
    remedy = "Remove this folder to go on from the checkpoint before it, or from the start"
    return InputError("checkpoint", str(folder), f"damaged: {storage.first_line(reason)}", remedy)


def _not_restored(folder: Place, reason: Exception) -> Exception:
    """What is wrong where the storage layer raised `reason`: damage only where the files are not, or are not known to be, as they were written."""
    _whole.pop(storage.address(folder), None)
    try:
        fault = _fault(folder) or ("" if (folder / FILES).exists() else reason)
    except Exception:  # of a disk or a bucket that cannot be read at all
        fault = ""
    if fault:
        return _damaged(folder, fault)
    return NotRestored(f"checkpoint {folder} could not be read: {storage.first_line(reason)}; its files are whole")


def _check_same_arrays(part: Place, stored: Any, wanted: Any) -> None:
    """Raises InputError, naming each array that is missing, extra, or of another shape or type."""
    have, want = _arrays(stored), _arrays(wanted)
    names = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    if names:
        wrong = ", ".join(f"{name} {have.get(name, 'missing')} instead of {want.get(name, 'none')}" for name in names)
        raise InputError("checkpoint", str(part), f"does not hold this model's arrays: {wrong}", "Use the configuration it was trained with")


def _arrays(tree: Any) -> dict[str, str]:
    """The type and shape of each array, by its name."""

    def word(key: Any) -> str:
        return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(word(key) for key in path): f"{jnp.dtype(leaf.dtype).name}{tuple(leaf.shape)}" for path, leaf in leaves}
