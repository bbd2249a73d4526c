"""Which slices of TPU chips there are, by both of their names, and their devices as libtpu makes them up on any machine."""

import dataclasses
import functools
import math
import os
import re
from typing import Any

from mlm_jax.chips import CHIPS, Chip
from mlm_jax.config import InputError

# With these libtpu does not ask what machine this is, and beside another process too.
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# Source: docs.cloud.google.com/tpu/docs/v5e and /v6e, supported configurations.
PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Source: docs.cloud.google.com/tpu/docs/v5p; AI-Hypercomputer/maxtext, src/maxtext/utils/accelerator_to_spec_map.py.
PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices, each a mesh of `shape` chips, which are joined by the data center's network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """What libtpu calls one slice: "v5p:4x4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str:
        """What Google Cloud calls one slice, by its TensorCores: "v5p-128" has 64 chips, "v5litepod-256" has 256."""
        return f"{self.chip.accelerator}-{math.prod(self.shape) * self.chip.cores}"

    @property
    def n_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def n_cores(self) -> int:
        """TensorCores of all slices."""
        return self.n_chips * self.chip.cores

    @property
    def n_devices(self) -> int:
        """JAX devices of all slices."""
        return self.n_chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each axis, whether a link joins its ends.

        Source: Austin et al. 2025 (How to Scale Your Model), "TPU Networking": in a plane where the axis is all of a pod's 16, in space where
        the slice is made of whole cubes of 4 x 4 x 4, which optical switches join.
        """
        if self.chip.dimensions == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3

    def devices(self) -> list[Any]:
        """The JAX devices of all slices, for which can be compiled. From then on this process leaves a TPU of this machine alone.

        Raises:
          InputError: libtpu is not installed.
        """
        import jax
        from jax.experimental import topologies

        os.environ.update(LIBTPU)
        jax.config.update("jax_platforms", "cpu")
        options: dict[str, Any] = {"wrap": (*self.wraps, False)[:3]}
        if self.slices > 1:
            options["num_slices"] = self.slices
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)  # by default 2 x 2
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore_dense"  # as on a TPU VM; else each core is a device. Source: that of PARTS_OF_A_CUBE
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options).devices)
        except RuntimeError as e:
            if "not installed" not in str(e):
                raise
            raise InputError("--topology", self.name, "libtpu, which compiles for it, is not installed", 'pip install "jax[tpu]"') from e


def parse(text: str, slices: int = 1) -> Topology:
    """The topology that `text` names, as a mesh of chips ("v5p:4x4x4") or as an accelerator type ("v5p-128", "v5e-256", "v5litepod-256").

    Of the meshes that an accelerator type may be it is the one most like a cube, which is what Google Cloud gives.

    Raises:
      InputError: there is none of that name; those that exist are listed.

    Source: docs.cloud.google.com/tpu/docs/types-topologies, "Topology variants".
    """
    if slices < 1:
        raise InputError("--slices", slices, "there is no such number of slices", "Give 1 or more")
    name = text.strip().lower()
    found, kind = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)+)|-(\d+))", name), re.split("[:-]", name)[0]
    chip = next((chip for chip in CHIPS.values() if kind in (chip.name, chip.accelerator)), None)
    if chip and not found:
        raise InputError("--topology", text, f"names no slice of a {chip.name}", f"Give one of {_listed(chip)}")
    if not found or not chip:
        reason = f"names none of the TPUs {', '.join(CHIPS)}"
        raise InputError("--topology", text, reason, "Give a mesh of chips or an accelerator type, such as v5e:16x16 or v5litepod-256")
    every = shapes(chip)
    if found[2]:
        fitting = [shape for shape in every if shape == tuple(map(int, found[2].split("x")))]
    else:
        fitting = [shape for shape in every if math.prod(shape) * chip.cores == int(found[3])]
    if not fitting:
        raise InputError("--topology", text, f"there is no such slice of a {chip.name}", f"Give one of {_listed(chip)}")
    return Topology(chip, fitting[0], slices)


@functools.cache
def shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Every mesh of chips that a slice can be: the smaller ones first, and of those of one size the one most like a cube.

    Source: those of PLANES and PARTS_OF_A_CUBE; docs.cloud.google.com/tpu/docs/types-topologies: A x B x C with A <= B <= C, multiples of 4.
    """
    if chip.dimensions == 2:
        return PLANES
    sides = range(4, chip.max_chips // 16 + 1, 4)
    cubes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= chip.max_chips]
    return (*PARTS_OF_A_CUBE, *sorted(cubes, key=lambda shape: (math.prod(shape), sum(shape))))


def _listed(chip: Chip) -> str:
    """The slices of a chip in words, each by both names; of those in space, which are many, one of each power of two chips."""
    of_size = {math.prod(shape): Topology(chip, shape) for shape in reversed(shapes(chip))}
    listed = ", ".join(f"{one.name} ({one.accelerator_type})" for n, one in reversed(of_size.items()) if n & (n - 1) == 0)
    if chip.dimensions == 2:
        return listed
    return f"{listed}, or another mesh of at most {chip.max_chips} chips whose axes are multiples of 4, none longer than the next"
