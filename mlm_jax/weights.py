"""Weight files: the tensors of a safetensors or PyTorch file, read a part at a time; safetensors written tensor by tensor."""

import dataclasses
import itertools
import json
import math
import os
import pickle  # for the name of an error: nothing here unpickles
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mlm_jax.config import InputError

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}  # those that float32 holds exactly
PYTORCH = (".bin", ".pt", ".pth")
DAMAGED = "Copy or download the file again"
CHUNK = 1 << 24  # bytes of a file that are mapped at once
PIECE = 1 << 18  # bytes that are written at once; in larger ones Linux takes huge pages for its cache, slower where they are scarce


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it, one of DTYPES where it can be read
    map: Callable[[], np.ndarray]  # the whole tensor, memory-mapped: take a part and let go, so that what was read leaves the memory


def copy(out: np.ndarray, tensor: Tensor, take: Callable[[np.ndarray], np.ndarray] = lambda whole: whole) -> None:
    """Fills `out` with what `take` selects from the tensor, as float32; rows of `out` beyond the selection stay as they are.

    Raises:
      InputError: a number is NaN or infinite.
    """
    for start, step in _steps(out):
        part = take(tensor.map())[start : start + step]
        rows = out[start : start + len(part)]
        rows[...] = part
        _check_finite(tensor, rows)


def view(tensor: Tensor, take: Callable[[np.ndarray], np.ndarray] = lambda whole: whole) -> np.ndarray:
    """What `take` selects from the tensor, float32; where the file holds float32, mapped from it and not copied.

    Raises:
      InputError: a number is NaN or infinite.
    """
    part = take(tensor.map())
    for start, step in _steps(part):
        _check_finite(tensor, part[start : start + step])
    return part.astype("<f4", copy=False)


def _steps(array: np.ndarray) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(1, array[:1].nbytes))
    return ((start, step) for start in range(0, len(array), step))


def _check_finite(tensor: Tensor, part: np.ndarray) -> None:
    if not np.isfinite(part).all():
        raise InputError(f"{tensor.file}: {tensor.name}", "", "holds NaN or infinite weights", "Give the weights of a run that did not diverge")


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
      InputError: not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks the header against itself and against the size of the file
            pass
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
    except (SafetensorError, OSError, ValueError) as e:
        raise InputError(str(path), "", f"not a whole safetensors file ({e})", DAMAGED) from e
    header.pop("__metadata__", None)

    def tensor(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
        start = 8 + header_size + data_offsets[0]
        return Tensor(path, name, tuple(shape), dtype, lambda: np.memmap(path, DTYPES[dtype], "r", start, tuple(shape)))

    return {name: tensor(name, **entry) for name, entry in header.items()}


def open_pytorch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors by name of a state dict in a PyTorch file, and nanoGPT's `model_args` where the file is its checkpoint.

    The file is a pickle: PyTorch reads it with `weights_only`, which builds tensors and plain values and runs nothing.

    Raises:
      InputError: PyTorch is not installed, the file is damaged, or it holds more than tensors and plain values.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]  # no dependency of ours: only these files need it
    except ImportError as e:
        reason = "a PyTorch file, and PyTorch is not installed"
        raise InputError(str(path), "", reason, "pip install torch, or convert the weights to safetensors") from e

    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # the format since PyTorch 1.6; the older one cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as e:
        reason = f"not loaded, as it holds code or objects beside tensors, or is no PyTorch file ({_first_line(e)})"
        raise InputError(str(path), "", reason, "Give a state dict: torch.save(model.state_dict(), PATH), or better safetensors") from e
    except Exception as e:  # a damaged file fails in many ways
        raise InputError(str(path), "", f"not a whole PyTorch file ({type(e).__name__}: {_first_line(e)})", DAMAGED) from e

    args = state.get("model_args") if isinstance(state, dict) else None
    if isinstance(args, dict) and "model" in state:
        state = state["model"]
    else:
        args = None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # as PyTorch Lightning saves
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise InputError(str(path), "", f"holds no state dict but {type(state).__name__}", "Write it with torch.save(model.state_dict(), PATH)")
    dense = lambda value: isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta  # noqa: E731
    odd = [str(name) for name, value in state.items() if not dense(value)]
    if odd:
        reason = f"not a state dict, these are no dense tensors: {', '.join(odd[:8])}{', ...' if odd[8:] else ''}"
        raise InputError(str(path), "", reason, "Write it with torch.save(model.state_dict(), PATH)")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def array(value: Any) -> np.ndarray:
        return value.view(torch.int16).numpy().view(DTYPES["BF16"]) if value.dtype is torch.bfloat16 else value.numpy()

    def tensor(name: str, value: Any) -> Tensor:
        value = value.detach()
        return Tensor(path, name, tuple(value.shape), names.get(value.dtype, str(value.dtype)), lambda: array(value))

    return {str(name): tensor(str(name), value) for name, value in state.items()}, args


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
    """Writes float32 tensors of the given shapes, each read by name just before it is written, byte for byte as safetensors would.

    Source: huggingface/safetensors, README.md ("Format") and safetensors/src/tensor.rs (order by name, header padded to 8 bytes).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks which library's layout the tensors have
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)  # a full disk shows here, and the writes below are up to three times faster
        file.write(len(text).to_bytes(8, "little") + text)
        with ThreadPoolExecutor(max_workers=1) as pool:  # the next tensor is read while one is written
            names = sorted(shapes)
            following = pool.submit(read, names[0])
            for name, after in itertools.zip_longest(names, names[1:]):
                array = np.ascontiguousarray(following.result(), "<f4")
                following = pool.submit(read, after) if after else following
                assert array.shape == shapes[name], name
                data = array.data.cast("B")
                for start in range(0, len(data), PIECE):
                    file.write(data[start : start + PIECE])
