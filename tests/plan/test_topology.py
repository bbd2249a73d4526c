"""Slices of TPUs by both of their names, as documented and as libtpu has them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_jax.chips import CHIPS
from mlm_jax.config import InputError
from mlm_jax.plan.topology import LIBTPU, Topology, parse, shapes
from tests import compilation


# Source: docs.cloud.google.com/tpu/docs (v5e, v6e, v5p: chips and cores of each topology; types-topologies for v4); for TPU7x
# AI-Hypercomputer/maxtext, src/maxtext/utils/accelerator_to_spec_map.py.
@pytest.mark.parametrize(
    ("mesh", "accelerator_type", "chips", "cores", "devices"),
    [
        ("v5e:1x1", "v5litepod-1", 1, 1, 1),
        ("v5e:2x4", "v5litepod-8", 8, 8, 8),
        ("v5e:16x16", "v5litepod-256", 256, 256, 256),
        ("v6e:8x16", "v6e-128", 128, 128, 128),
        ("v4:2x2x4", "v4-32", 16, 32, 16),
        ("v4:4x4x4", "v4-128", 64, 128, 64),
        ("v5p:2x2x1", "v5p-8", 4, 8, 4),
        ("v5p:2x4x4", "v5p-64", 32, 64, 32),
        ("v5p:4x4x4", "v5p-128", 64, 128, 64),
        ("v5p:16x16x24", "v5p-12288", 6144, 12288, 6144),
        ("tpu7x:2x2x1", "tpu7x-8", 4, 8, 8),
        ("tpu7x:16x24x24", "tpu7x-18432", 9216, 18432, 18432),
    ],
)
def test_both_names_of_a_slice_are_the_same_slice(mesh, accelerator_type, chips, cores, devices):
    topology = parse(mesh)
    assert topology == parse(accelerator_type)
    assert (topology.name, topology.accelerator_type) == (mesh, accelerator_type)
    assert (topology.n_chips, topology.n_cores, topology.n_devices) == (chips, cores, devices)
    three = parse(mesh, slices=3)
    assert (three.n_chips, three.n_cores, three.n_devices) == (3 * chips, 3 * cores, 3 * devices)
    assert (three.name, three.accelerator_type) == (mesh, accelerator_type), "of one slice"


def test_the_short_name_of_a_v5litepod_is_understood():
    assert parse("v5e-16") == parse("v5litepod-16") == parse("v5litepod:4x4") == parse(" V5E:4x4") == Topology(CHIPS["v5e"], (4, 4))


# Source: the table of AI-Hypercomputer/maxtext.
@pytest.mark.parametrize(
    ("accelerator_type", "mesh"),
    [
        ("v5p-384", "4x4x12"),
        ("v5p-512", "4x8x8"),
        ("v5p-640", "4x4x20"),
        ("v5p-1152", "4x12x12"),
        ("v5p-1536", "8x8x12"),
        ("v5p-3072", "8x12x16"),
        ("v5p-4608", "12x12x16"),
        ("v5p-6912", "12x12x24"),
        ("v5p-7552", "4x4x236"),
        ("v5p-7680", "12x16x20"),
        ("v5p-9216", "12x16x24"),
        ("v4-2048", "8x8x16"),
        ("v4-4096", "8x16x16"),
    ],
)
def test_of_the_meshes_of_one_size_an_accelerator_type_is_the_one_most_like_a_cube(accelerator_type, mesh):
    assert parse(accelerator_type).name.split(":")[1] == mesh


def test_a_mesh_less_like_a_cube_is_one_too():
    assert parse("v5p:4x4x16").accelerator_type == parse("v5p:4x8x8").accelerator_type == "v5p-512"


# Source: that table; Austin et al. 2025 (How to Scale Your Model), "TPU Networking".
@pytest.mark.parametrize(
    ("mesh", "wraps"),
    [
        ("v5e:8x8", (False, False)),
        ("v5e:8x16", (False, True)),
        ("v6e:16x16", (True, True)),
        ("v4:2x2x4", (False, False, False)),
        ("v5p:2x4x4", (False, False, False)),
        ("v5p:4x4x4", (True, True, True)),
        ("tpu7x:4x4x12", (True, True, True)),
    ],
)
def test_an_axis_is_a_ring_where_its_ends_are_joined(mesh, wraps):
    assert parse(mesh).wraps == wraps


@pytest.mark.parametrize("text", ["", "v5", "v9:2x2", "h100-8", "16x16"])
def test_what_is_no_tpu_is_refused_with_those_that_are(text):
    with pytest.raises(InputError, match=r"^--topology.*names none of the TPUs v4, v5e, v5p, v6e, tpu7x.*such as v5e:16x16 or v5litepod-256\.$"):
        parse(text)


@pytest.mark.parametrize("text", ["v5e:4x2", "v5e:16x32", "v5e:2x2x1", "v5e:0x0", "v5litepod-12", "v5e-512", "v5e", "v5e:16", "v5e:axb", "v5e:-1x2"])
def test_a_plane_that_is_not_there_is_refused_with_all_that_are(text):
    with pytest.raises(InputError) as caught:
        parse(text)
    reason = "names no slice" if text in ("v5e", "v5e:16", "v5e:axb", "v5e:-1x2") else "there is no such slice"
    assert str(caught.value) == (
        f"--topology = {text}: {reason} of a v5e. Give one of v5e:1x1 (v5litepod-1), v5e:2x2 (v5litepod-4), v5e:2x4 (v5litepod-8), "
        "v5e:4x4 (v5litepod-16), v5e:4x8 (v5litepod-32), v5e:8x8 (v5litepod-64), v5e:8x16 (v5litepod-128), v5e:16x16 (v5litepod-256)."
    )


@pytest.mark.parametrize("text", ["v5p:16x16", "v5p:4x4x2", "v5p:4x4x6", "v5p:8x4x4", "v5p:16x20x28", "v5p-4", "v5p-100"])
def test_a_mesh_that_is_not_there_is_refused_with_the_usual_ones_and_the_rule(text):
    with pytest.raises(InputError) as caught:
        parse(text)
    assert str(caught.value) == (
        f"--topology = {text}: there is no such slice of a v5p. Give one of v5p:2x2x1 (v5p-8), v5p:2x2x2 (v5p-16), v5p:2x2x4 (v5p-32), "
        "v5p:2x4x4 (v5p-64), v5p:4x4x4 (v5p-128), v5p:4x4x8 (v5p-256), v5p:4x8x8 (v5p-512), v5p:8x8x8 (v5p-1024), v5p:8x8x16 (v5p-2048), "
        "v5p:8x16x16 (v5p-4096), v5p:16x16x16 (v5p-8192), or another mesh of at most 6144 chips whose axes are multiples of 4, none longer "
        "than the next."
    )


def test_no_slices_are_refused():
    with pytest.raises(InputError, match=r"^--slices = 0: "):
        parse("v5e:2x2", slices=0)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    def missing(**options):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology. See https://github.com/jax-ml/jax#installation")

    for name in LIBTPU:
        monkeypatch.setenv(name, "")  # for what it was to come back
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(InputError, match=r'^--topology = v5e:2x4: libtpu.* is not installed\. pip install "jax\[tpu\]"\.$'):
        parse("v5e:2x4").devices()


MADE_UP = """
import json, math, jax
from mlm_jax.chips import CHIPS
from mlm_jax.config import MeshConfig
from mlm_jax.plan.topology import Topology, parse, shapes
from mlm_jax.sharding import make_mesh

def boxes(one):
    # For each power of two the volume of the box of chips around devices that share parameters, in a slice.
    volumes = {}
    for fsdp in (2**k for k in range(1, (one.n_devices // one.slices).bit_length()) if one.n_devices // one.slices % 2**k == 0):
        mesh = make_mesh(MeshConfig(data=-1, fsdp=fsdp, slices=one.slices), one.devices())
        places = zip(*(d.coords for d in mesh.devices[0, 0, :, 0, 0]))
        volumes[fsdp] = math.prod(max(axis) - min(axis) + 1 for axis in places) * one.chip.devices
    return volumes

found = {}
for chip in CHIPS.values():
    small = [one for shape in shapes(chip) if (one := Topology(chip, shape)).n_chips <= 256]
    for one in [*small, parse(f"{chip.name}-8", slices=2)]:
        devices = one.devices()
        counts = len(devices), len({tuple(d.coords) for d in devices}), len({getattr(d, "slice_index", 0) for d in devices})
        found["boxes " + one.name] = boxes(one)
        found[f"{one.name} {one.slices}"] = *counts, [max(axis) + 1 for axis in zip(*(d.coords for d in devices))], devices[0].device_kind
    aot = jax.sharding.SingleDeviceSharding(devices[0])
    too_large = jax.ShapeDtypeStruct((2**31, 64), "float32", sharding=aot)
    try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
    except Exception as e:
        found[chip.name] = str(e)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in compilation.as_users().items() if name not in (*LIBTPU, "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", MADE_UP], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.tpu_aot
def test_on_every_slice_parameters_can_be_split_by_each_power_of_two_over_chips_side_by_side(found):
    every = {name.removeprefix("boxes "): volumes for name, volumes in found.items() if name.startswith("boxes ")}
    assert {parse(name).chip.name for name in every} == set(CHIPS)
    for name, volumes in every.items():
        if parse(name).chip.devices == 1:  # JAX may take the second core of a TPU7x last
            assert all(volume == int(fsdp) for fsdp, volume in volumes.items()), (name, volumes)


@pytest.mark.tpu_aot
def test_libtpu_has_the_slices_and_leaves_as_much_memory_as_the_table_says(found):
    for chip in CHIPS.values():
        small = [one for shape in shapes(chip) if (one := Topology(chip, shape)).n_chips <= 256]
        for one in [*small, parse(f"{chip.name}-8", slices=2)]:
            n_devices, n_places, n_slices, bounds, kind = found[f"{one.name} {one.slices}"]
            assert (n_devices, n_places, n_slices) == (one.n_devices, one.n_chips // one.slices, one.slices), one.name
            assert tuple(bounds[: chip.dimensions]) == one.shape
            assert kind in chip.device_kinds
        assert f"exceeds available HBM ({chip.usable_bytes / 2**30:.2f}G)" in found[chip.name]
