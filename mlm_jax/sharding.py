"""Where each axis lives: one table from the legend's letters to mesh axes.

A parameter's name ends in its axes ("w_up_DF"), and so do optimizer moments, which repeat the parameters' names; nothing else is
annotated. The role is the name's prefix: w_ weight, b_ bias, scale_ gain.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm_jax.config import InputError, MeshConfig

AXES = {"slice": "slices", "data": "data", "fsdp": "fsdp", "tensor": "tensor", "context": "context"}  # mesh axis -> field of MeshConfig

# letter -> mesh axes; letters that are not here are on every device. An axis is used once per array: the leftmost letter wins.
# D is split within a slice and a row of `data` alone (hybrid sharding). T is that of activations: parameters have all positions.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("slice", "data", "fsdp"),
    "R": ("slice", "data"),  # rows of the batch as all devices along fsdp share them
    "T": ("context",),
    "D": ("fsdp",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all), with axes slice, data, fsdp, tensor and context; only slice and data leave a TPU slice.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or slices is not the number of TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    n_slices = len({getattr(device, "slice_index", 0) for device in devices})  # a CPU has no such number
    sizes = {axis: getattr(config, field) for axis, field in AXES.items()}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(shape.values()) != len(devices) or 0 in shape.values():
        fitting = ", ".join(nearest(sizes, len(devices)))
        raise InputError("mesh", _words(sizes), f"does not fill {len(devices)} devices", f"Nearest that fit: {fitting}")
    if n_slices > 1 and shape["slice"] != n_slices and devices[0].platform == "tpu":
        raise InputError("mesh.slices", shape["slice"], f"the devices are in {n_slices} slices", f"Set mesh.slices = {n_slices}")
    # Auto: the compiler propagates shardings. The default of jax.make_mesh, Explicit, would make `constrain` an assertion.
    auto = (AxisType.Auto,) * len(shape)
    if shape["slice"] == n_slices > 1:
        inside, outside = (1, *list(shape.values())[1:]), (n_slices, *(1,) * (len(shape) - 1))
        placed = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)
    else:
        # An axis may be a part of a side of the torus: jax.make_mesh allows that on a v5e alone.
        placed = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(shape), axis_types=auto)


def nearest(sizes: dict[str, int], n: int, at_most: int = 3) -> list[str]:
    """The meshes of `n` devices that are nearest to `sizes`, in words: those that split along no axis that was not asked for come first."""

    def factors(n: int, axes: int) -> Iterator[tuple[int, ...]]:
        """Every `axes` numbers whose product is `n`."""
        if axes == 1:
            yield (n,)
            return
        for first in (size for size in range(1, n + 1) if n % size == 0):
            for rest in factors(n // first, axes - 1):
                yield first, *rest

    def distance(found: tuple[int, ...]) -> tuple[Any, ...]:
        asked = [(got, size) for got, size in zip(found, sizes.values(), strict=True) if size != -1]
        return sum(got > 1 == size for got, size in asked), sum(abs(got - size) for got, size in asked), [-got for got in found]

    meshes = [dict(zip(sizes, found, strict=True)) for found in sorted(factors(n, len(sizes)), key=distance)]
    machines = [mesh for mesh in meshes if mesh["slice"] == 1 or sizes["slice"] != 1]  # what splits into slices is the machine, no choice
    return [_words(mesh) for mesh in machines[:at_most]]


def _words(sizes: dict[str, int]) -> str:
    """Sizes as in "data 4 x tensor 2"; axes of one device are left out."""
    return " x ".join(f"{AXES[axis]} {size}" for axis, size in sizes.items() if size != 1) or "data 1"


def _hybrid(mesh: Mesh | AbstractMesh, axis: str, fit: int) -> str:
    """The settings of `mesh` with `fit` devices along `axis` and the others along data: "mesh.fsdp = 64 and mesh.data = 4"."""
    return f"mesh.{AXES[axis]} = {fit} and mesh.data = {mesh.shape['data'] * mesh.shape[axis] // fit}"


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, context_len: int, micro_batches: int = 1, *, field: str = "train.batch_size") -> None:
    """Raises InputError where `mesh` cannot share out `micro_batches` parts of `batch_size` rows, which `field` says, of `context_len` positions."""
    rows, parts = (math.prod(mesh.shape[axis] for axis in RULES[letter]) for letter in "BT")
    if batch_size % (rows * micro_batches):
        each = rows * micro_batches
        near = " or ".join(str(n * each) for n in (batch_size // each, batch_size // each + 1) if n)
        reason = f"not a multiple of the {rows} devices along slices, data and fsdp"
        reason += f" times train.micro_batches = {micro_batches}" if micro_batches > 1 else ""
        fit = math.gcd(batch_size // math.gcd(batch_size, micro_batches), rows)
        raise InputError(field, batch_size, reason, f"Set it to {near}, or have {fit} along them")
    if context_len % parts:
        fit = math.gcd(context_len, parts)
        reason = f"{parts} parts do not divide model.context_len = {context_len}, {fit} would"
        raise InputError("mesh.context", parts, reason, f"Set {_hybrid(mesh, 'context', fit)}")


def mesh_axes(letters: str) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array whose axes are `letters`; () is an axis that every device holds whole."""
    used: set[str] = set()
    out = []
    for letter in letters:
        out.append(tuple(axis for axis in RULES.get(letter, ()) if axis not in used))
        used.update(out[-1])
    return out


def spec(letters: str) -> P:
    """The PartitionSpec of an array whose axes are `letters`: "DF" -> P("fsdp", "tensor"); "." is an axis that every device holds whole."""
    return P(*(axes or None for axes in mesh_axes(letters)))


def axes_of(name: str) -> str:
    """The letters of a parameter's axes, without the stacked L: "w_up_DF" -> "DF"."""
    return name.rsplit("_", 1)[-1]


def name_of(path: tuple) -> str:
    return next((str(key.key) for key in reversed(path) if hasattr(key, "key")), "")


def shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """NamedShardings for parameters, or for any tree that repeats their names (optimizer moments); scalars are on every device.

    Raises:
      ValueError: a name has another number of axes than the array.
      InputError: a mesh axis does not divide the axis of the array that it splits.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        letters = axes_of(name_of(path))
        letters = "L" * (leaf.ndim == len(letters) + 1) + letters  # blocks are stacked over layers
        if len(letters) != leaf.ndim:
            raise ValueError(f"{jax.tree_util.keystr(path)}: the name says {len(letters)} axes ({letters}), the shape is {leaf.shape}.")
        letters = letters.replace("T", ".")  # a device looks up whatever positions its tokens have
        for letter, size, axes in zip(letters, leaf.shape, mesh_axes(letters), strict=True):
            for axis in axes:
                if size % mesh.shape[axis]:
                    raise _indivisible(mesh, axis, letter, size, name_of(path))
        return NamedSharding(mesh, spec(letters))

    return jax.tree_util.tree_map_with_path(of, tree)


def _indivisible(mesh: Mesh | AbstractMesh, axis: str, letter: str, size: int, name: str) -> InputError:
    """What to do where `axis` of the mesh does not divide axis `letter` of a parameter: to replicate it silently could be too much memory."""
    parts = mesh.shape[axis]
    fit = math.gcd(size, parts)
    remedy = f"Set {_hybrid(mesh, axis, fit)} (hybrid sharding)" if axis == "fsdp" else f"Set {_hybrid(mesh, axis, fit)}"
    if letter == "V":
        remedy += f", or model.vocab_multiple to a multiple of {parts}"
    return InputError(f"mesh.{AXES[axis]}", parts, f"{parts} parts do not divide axis {letter} = {size} of {name}, {fit} would", remedy)


def is_decayed(params: Any) -> Any:
    """True where weight decay applies, by name: weights (w_) decay, biases (b_) and gains (scale_) do not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: name_of(path).startswith("w_"), params)


def is_hidden(params: Any) -> Any:
    """True for the weights (w_) between activations, by name: all but embeddings, positions and the head, which have a letter V or T."""

    def of(path: tuple, _: Any) -> bool:
        name = name_of(path)
        return name.startswith("w_") and not set("VT") & set(axes_of(name))

    return jax.tree_util.tree_map_with_path(of, params)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x`, laid out over the mesh in use as `letters` say; unchanged where no mesh is set.

    Positions that the context axis does not divide, such as the one of a decoding step, are whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if "T" in letters and x.shape[letters.index("T")] % mesh.shape["context"]:
        letters = letters.replace("T", ".")
    return jax.lax.with_sharding_constraint(x, spec(letters))


class Gathered(NamedTuple):
    """A weight as each device that has rows of its own holds it: whole, but for what `tensor` splits. The first axis, Z, counts these devices."""

    w_Z: jax.Array


def gathers(n_rows: int) -> bool:
    """A product of `n_rows` rows with a weight has the weight gathered first: the mesh splits D, and the rows evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.shape["fsdp"] == 1 or mesh.shape["context"] > 1:
        return False
    return n_rows % math.prod(mesh.shape[axis] for axis in RULES["B"]) == 0


def gather(w: jax.Array, letters: str, *, over: str = "B") -> Gathered | jax.Array:
    """`w`, a weight laid out as `letters` say, for each of the devices that split the axes `over` of activations; `w` itself where none do.

    A product with one weight for all devices ends in a sum of its gradient over them all, of which each then keeps its part (an all-reduce); this
    one gives each its own gradient, and each then sums its part alone (a reduce-scatter): half as many bytes. It also keeps XLA from splitting the
    product into one for each part of the weight, which takes a third longer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for letter in over for axis in RULES[letter])
    if mesh.empty or math.prod(mesh.shape[axis] for axis in axes) == 1:
        return w
    split = mesh_axes(letters)

    def each(part: jax.Array) -> jax.Array:
        for i, names in enumerate(split):
            for axis in set(names) & set(axes):
                # The parts come on an axis of their own: one that a TPU's tiles do not divide it would sum as a whole on the way back.
                parts = jnp.moveaxis(jax.lax.all_gather(part, axis), 0, i)
                part = parts.reshape(*part.shape[:i], -1, *part.shape[i + 1 :])
        return part[None]

    whole = (tuple(axis for axis in names if axis not in axes) or None for names in split)
    return Gathered(jax.shard_map(each, in_specs=spec(letters), out_specs=P(axes, *whole), check_vma=False)(w))


def rows_shape(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What `put_rows` gives, without the values."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec("B" + "." * (len(shape) - 1))))


def put_rows(rows: Any, shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.Array:
    """A global batch on the mesh; `rows(start, stop)` is called for just the rows that this process's devices hold."""

    @functools.cache  # devices that hold the same rows
    def read(start: int, stop: int) -> np.ndarray:
        return np.asarray(rows(start, stop), dtype)

    def local(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return read(start, stop)

    return jax.make_array_from_callback(shape, rows_shape(shape, dtype, mesh).sharding, local)
