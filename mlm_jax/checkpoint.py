"""Checkpoints of a run: written in the background, renamed into place when whole, restored onto whatever mesh is in use.

A checkpoint is `checkpoints/<step>/` with two parts: "params", and "progress" (the optimizer's state and the step).
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mlm_jax.config import InputError


class Checkpoints:
    """The checkpoints in one folder; a context manager, which waits for what is being written when it ends."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(folder.absolute(), preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._orbax.close()

    def save(self, step: int, params: Any, progress: Any) -> None:
        """Starts writing checkpoint `step`; the arrays are copied before it returns, so that they may be donated."""
        self._orbax.save_checkpointables_async(step, {"params": params, "progress": progress}, force=True)

    def restore(self, step: int, params: Any, progress: Any | None = None) -> tuple[Any, Any]:
        """(params, progress) of checkpoint `step`, with the shapes, types and shardings of the given ShapeDtypeStructs.

        Raises:
          InputError: the checkpoint is damaged, or does not hold these arrays.
        """
        wanted = {"params": params} | ({} if progress is None else {"progress": progress})
        where = str(self.folder / str(step))
        for part, tree in wanted.items():
            _check_same_arrays(where, part, self._stored(step, part), tree)
        try:
            found = self._orbax.load_checkpointables(step, wanted)
        except Exception as e:  # a damaged file surfaces as whatever the storage layer raised
            raise _damaged(where, e) from e
        return found["params"], found.get("progress")

    def _stored(self, step: int, part: str) -> Any:
        where = str(self.folder / str(step))
        try:
            return self._orbax.checkpointables_metadata(step).metadata[part]
        except Exception as e:
            raise _damaged(where, e) from e


def _damaged(where: str, error: Exception) -> InputError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    return InputError("checkpoint", where, f"cannot be read ({reason})", "Remove this folder to go on from the checkpoint before it")


def _check_same_arrays(where: str, part: str, stored: Any, wanted: Any) -> None:
    """Raises InputError, naming each array that is missing, extra or of another shape."""
    have, want = _shapes(stored), _shapes(wanted)
    wrong = [f"{name} {have.get(name, 'missing')} instead of {want.get(name, 'none')}" for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]
    if wrong:
        raise InputError("checkpoint", f"{where}/{part}", f"does not hold this model's arrays: {', '.join(wrong)}", "Use the configuration it was trained with")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def word(key: Any) -> str:
        return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(word(key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def steps_in(folder: Path) -> list[int]:
    """The steps that have a finished checkpoint in `folder`, oldest first."""
    return sorted(int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdigit()) if folder.is_dir() else []
