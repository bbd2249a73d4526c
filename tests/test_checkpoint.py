"""Checkpoints come back bit for bit, on any mesh; damage is found before anything is read, and named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import checkpoint, sharding
from mlm_jax.config import InputError, MeshConfig

MESHES = {
    "8 devices": (MeshConfig(data=2, fsdp=4), 8),
    "4 x 2 devices": (MeshConfig(data=1, fsdp=4, tensor=2), 8),
    "1 device": (MeshConfig(), 1),
}


def tree(seed=0):
    draw = np.random.default_rng(seed)
    params = {"w_token_VD": draw.normal(size=(24, 32)), "blocks": {"w_up_DF": draw.normal(size=(2, 32, 64)), "b_up_F": draw.normal(size=(2, 64))}}
    return jax.tree.map(lambda x: x.astype(np.float32), params)


def on(mesh, params):
    return jax.device_put(params, sharding.shardings(mesh, params))


def wanted(params, mesh=None):
    mesh = mesh or sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, sharding.shardings(mesh, params))


def progress(step):
    return {"step": jnp.int32(step), "opt_state": {"mu": tree(step)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 5 and 10, written from 8 devices."""
    folder = tmp_path_factory.mktemp("saved")
    mesh = sharding.make_mesh(*MESHES["8 devices"][:1])
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, on(mesh, tree(step)), progress(step))
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32), strict=True), a, b)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MESHES)
def test_arrays_come_back_bit_for_bit_on_another_mesh(saved, name):
    config, n_devices = MESHES[name]
    mesh = sharding.make_mesh(config, jax.devices()[:n_devices])
    params, rest = checkpoint.restore(saved / "10", wanted(tree(), mesh), wanted(progress(0), mesh))
    same(params, tree(10))
    same(rest["opt_state"]["mu"], tree(10))
    assert int(rest["step"]) == 10
    assert params["blocks"]["w_up_DF"].sharding == sharding.shardings(mesh, tree())["blocks"]["w_up_DF"]


def test_the_parameters_alone_can_be_read(saved):
    params, rest = checkpoint.restore(saved / "5", wanted(tree()))
    same(params, tree(5))
    assert rest is None


def test_special_floats_survive(tmp_path):
    odd = {"w_a_DF": np.array([[np.nan, np.inf], [-0.0, 1e-45]], np.float32)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, jax.tree.map(jnp.asarray, odd), {"step": jnp.int32(0)})
    same(checkpoint.restore(tmp_path / "0", wanted(odd))[0], odd)


def test_the_newest_stay(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"b_D": jnp.full(4, step, jnp.float32)}, {"step": jnp.int32(step)})
    assert checkpoint.steps_in(tmp_path) == [3, 4]


def test_a_saved_array_may_be_overwritten_at_once(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((256, 256))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w_a_DF": x}, {"step": jnp.int32(1)})
        add(x)
    same(checkpoint.restore(tmp_path / "1", wanted({"w_a_DF": np.zeros((256, 256), np.float32)}))[0], {"w_a_DF": np.zeros((256, 256), np.float32)})


def test_a_half_written_checkpoint_is_no_checkpoint_and_goes_at_the_next_start(copied):
    half = copied / "15.orbax-checkpoint-tmp"
    shutil.copytree(copied / "10", half)
    assert checkpoint.steps_in(copied) == [5, 10]
    same(checkpoint.restore(copied / "10", wanted(tree()))[0], tree(10))
    assert half.exists()  # a reader leaves it: it may be another process's, still being written
    with checkpoint.Checkpoints(copied) as checkpoints:
        same(checkpoints.restore(10, wanted(tree()))[0], tree(10))
    assert not half.exists()
    assert checkpoint.steps_in(copied) == [5, 10]


@pytest.mark.parametrize("damage", ["missing", "cut short", "changed"])
def test_every_damaged_file_is_named_and_stays(copied, damage):
    before = contents(copied)
    for path in sorted((copied / "10").rglob("*")):
        if not path.is_file() or path.name == checkpoint.FILES:
            continue
        raw = before[path]
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(raw[: len(raw) // 2] if damage == "cut short" else bytes([raw[0] ^ 1]) + raw[1:])
        damaged = contents(copied)
        with pytest.raises(InputError) as e:
            checkpoint.restore(copied / "10", wanted(tree()))
        name = path.relative_to(copied / "10").as_posix()
        assert f"checkpoint = {copied / '10'}: damaged: {name} " in str(e.value)
        assert {"missing": "is missing", "cut short": f"has {len(raw) // 2} bytes, {len(raw)} were", "changed": "other bytes"}[damage] in str(e.value)
        assert "Remove this folder" in str(e.value) and "\n" not in str(e.value)
        assert contents(copied) == damaged
        path.write_bytes(raw)
    same(checkpoint.restore(copied / "10", wanted(tree()))[0], tree(10))


def test_a_checkpoint_without_its_list_of_files_is_still_checked(copied):
    (copied / "10" / checkpoint.FILES).unlink()  # the run was killed between the checkpoint and its list
    same(checkpoint.restore(copied / "10", wanted(tree()))[0], tree(10))
    shutil.rmtree(copied / "10" / "params")
    with pytest.raises(InputError, match=r"10: damaged: "):
        checkpoint.restore(copied / "10", wanted(tree()))


def test_a_damaged_list_of_files_is_named(copied):
    for text in ("{", "[]", '{"params": 1}', json.dumps({"params/_METADATA": {"bytes": "many"}})):
        (copied / "10" / checkpoint.FILES).write_text(text)
        with pytest.raises(InputError, match=r"checkpoint = .*10: damaged: "):
            checkpoint.restore(copied / "10", wanted(tree()))


def test_arrays_of_another_model_are_named(saved):
    other = tree()
    other["blocks"]["w_up_DF"] = np.zeros((2, 32, 128), np.float32)
    other["blocks"]["b_new_F"] = other["blocks"].pop("b_up_F")
    with pytest.raises(InputError) as e:
        checkpoint.restore(saved / "10", wanted(other))
    reason = "blocks.b_new_F missing instead of (2, 64), blocks.b_up_F (2, 64) instead of none, blocks.w_up_DF (2, 32, 64) instead of (2, 32, 128)"
    assert f"checkpoint = {saved / '10' / 'params'}: does not hold this model's arrays: {reason}" in str(e.value)


def test_no_folder_has_no_steps(tmp_path):
    assert checkpoint.steps_in(tmp_path / "none") == []
    (tmp_path / "12").write_text("a file")
    assert checkpoint.steps_in(tmp_path) == []
