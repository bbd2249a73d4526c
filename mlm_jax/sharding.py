"""Where each axis lives: one table from the legend's letters to mesh axes.

A parameter's name ends in its axes ("w_up_DF"), and so do optimizer moments, which repeat the parameters' names; nothing else is
annotated. The role is the name's prefix: w_ weight, b_ bias, scale_ gain.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm_jax.config import InputError, MeshConfig

# letter -> mesh axes; letters that are not here are on every device. An axis is used once per array: the leftmost letter wins.
RULES: dict[str, tuple[str, ...]] = {"B": ("data", "fsdp"), "D": ("fsdp",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all), with axes data, fsdp and tensor.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(shape.values()) != len(devices) or 0 in shape.values():
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError("mesh", asked, f"does not fill {len(devices)} devices", "Set one axis to -1, it takes the devices that remain")
    # Auto: the compiler propagates shardings. The default of jax.make_mesh, Explicit, would make `constrain` an assertion.
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


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


def _name(path: tuple) -> str:
    return next((str(key.key) for key in reversed(path) if hasattr(key, "key")), "")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedShardings for parameters, or for any tree that repeats their names (optimizer moments); scalars are on every device.

    Raises:
      ValueError: a name has another number of axes than the array.
      InputError: a mesh axis does not divide the axis of the array that it splits.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        letters = axes_of(_name(path))
        letters = "L" * (leaf.ndim == len(letters) + 1) + letters  # blocks are stacked over layers
        if len(letters) != leaf.ndim:
            raise ValueError(f"{jax.tree_util.keystr(path)}: the name says {len(letters)} axes ({letters}), the shape is {leaf.shape}.")
        for letter, size, axes in zip(letters, leaf.shape, mesh_axes(letters), strict=True):
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                reason = f"{parts} parts do not divide axis {letter} = {size} of {_name(path)}"
                raise InputError(f"mesh.{axes[-1]}", mesh.shape[axes[-1]], reason, f"Choose a divisor of {size}")
        return NamedSharding(mesh, spec(letters))

    return jax.tree_util.tree_map_with_path(of, tree)


def is_decayed(params: Any) -> Any:
    """True where weight decay applies, by name: weights (w_) decay, biases (b_) and gains (scale_) do not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path).startswith("w_"), params)


def is_hidden(params: Any) -> Any:
    """True for the weights (w_) between activations, by name: all but embeddings, positions and the head, which have a letter V or T."""

    def of(path: tuple, _: Any) -> bool:
        name = _name(path)
        return name.startswith("w_") and not set("VT") & set(axes_of(name))

    return jax.tree_util.tree_map_with_path(of, params)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x`, laid out over the mesh in use as `letters` say; unchanged where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters))


def put_rows(rows: Any, shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.Array:
    """A global batch on the mesh; `rows(start, stop)` is called for just the rows that this process's devices hold."""
    sharding = NamedSharding(mesh, spec("B" + "." * (len(shape) - 1)))

    def local(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return np.asarray(rows(start, stop), dtype)

    return jax.make_array_from_callback(shape, sharding, local)
