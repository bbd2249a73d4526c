"""Checkpoints come back bit for bit, on any mesh; damage is found before anything is read, and named."""

import json
import logging
import re
import shutil
import time

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


@pytest.mark.parametrize(("least", "files"), [(0, 8), (96 * 4, 8), (96 * 4 + 1, 1), (checkpoint.SLICE_BYTES, 1)])
def test_devices_that_hold_the_same_write_a_part_each_unless_the_parts_are_small(tmp_path, monkeypatch, least, files):
    monkeypatch.setattr(checkpoint, "SLICE_BYTES", least)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    params = {"w_token_VD": tree()["w_token_VD"]}  # 24 x 32, of which a device would write 96
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, on(mesh, params), {"step": jnp.int32(1)})
    for _ in range(2):
        same(checkpoint.restore(tmp_path / "1", wanted(params))[0], params)
        assert len([path for path in (tmp_path / "1/params/w_token_VD/c").rglob("*") if path.is_file()]) == files
        (tmp_path / "1" / checkpoint.FILES).unlink(missing_ok=True)  # then by what Orbax says of them


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
        same(checkpoint.restore(checkpoints.folder / "10", wanted(tree()))[0], tree(10))
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
    reason = (
        "blocks.b_new_F missing instead of float32(2, 64), blocks.b_up_F float32(2, 64) instead of none, "
        "blocks.w_up_DF float32(2, 32, 64) instead of float32(2, 32, 128)"
    )
    assert f"checkpoint = {saved / '10' / 'params'}: does not hold this model's arrays: {reason}" in str(e.value)


def test_no_folder_has_no_steps(tmp_path):
    assert checkpoint.steps_in(tmp_path / "none") == []
    (tmp_path / "12").write_text("a file")
    assert checkpoint.steps_in(tmp_path) == []


def change(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 8
    path.write_bytes(raw)


PIECE = "params/blocks.w_up_DF/c/0/0/0"  # a file of one array
ARRAY = "progress/opt_state.mu.w_token_VD"


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def garble_unsealed(folder, name):
    (folder / checkpoint.FILES).unlink()
    (folder / name).write_bytes(b"garbage")


DAMAGES = {
    "a file cut short": (lambda f: cut(f / PIECE), f"{PIECE} has \\d+ bytes, \\d+ were written"),
    "a flipped bit": (lambda f: change(f / PIECE, 100), f"{PIECE} has other bytes than were written"),
    "a missing file": (lambda f: (f / PIECE).unlink(), f"{PIECE} is missing"),
    "no params": (lambda f: shutil.rmtree(f / "params"), "params/_METADATA is missing"),
    "no progress": (lambda f: shutil.rmtree(f / "progress"), "progress/_METADATA is missing"),
    "an empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "it is empty"),
    "a torn list": (lambda f: cut(f / checkpoint.FILES), "files.json: Expecting .*"),
    "no list, a file cut short": (lambda f: [(f / checkpoint.FILES).unlink(), cut(f / PIECE)], f"{PIECE} has \\d+ bytes, \\d+ were written"),
    "no list, a missing file": (lambda f: [(f / checkpoint.FILES).unlink(), (f / PIECE).unlink()], f"{PIECE} is missing"),
    "no list, no params": (lambda f: [(f / checkpoint.FILES).unlink(), shutil.rmtree(f / "params")], "params/_METADATA is missing"),
    "no list, no progress": (lambda f: [(f / checkpoint.FILES).unlink(), shutil.rmtree(f / "progress")], "progress/_METADATA is missing"),
    "garbage for metadata": (lambda f: (f / "params/_METADATA").write_bytes(b"garbage"), "params/_METADATA has 7 bytes, \\d+ were written"),
    "no list, garbage for metadata": (lambda f: garble_unsealed(f, "params/_METADATA"), "params/_METADATA: Expecting .*"),
    "no list, garbage for an array's": (lambda f: garble_unsealed(f, f"{ARRAY}/zarr.json"), f"{ARRAY}/zarr.json: Expecting .*"),
    "no list, garbage for Orbax's": (lambda f: garble_unsealed(f, "_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA: Expecting .*"),
    "no list, no more of an array": (lambda f: [(f / checkpoint.FILES).unlink(), shutil.rmtree(f / ARRAY)], f"{ARRAY}/zarr.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_used(copied, name):
    damage, reason = DAMAGES[name]
    damage(copied / "10")
    shutil.copytree(copied / "5", copied / "15.orbax-checkpoint-tmp")  # of a save that was killed: no checkpoint at all
    damaged, before, said = contents(copied / "10"), contents(copied / "5"), []
    assert checkpoint.newest_whole(copied, say=said.append) == 5
    assert len(said) == 1 and "\n" not in said[0]
    assert re.fullmatch(f"checkpoint 10 is damaged: {reason}; it was moved to 10.damaged, checkpoint 5 is used instead", said[0])
    assert contents(copied / "10.damaged") == {copied / "10.damaged" / path.relative_to(copied / "10"): raw for path, raw in damaged.items()}
    assert checkpoint.steps_in(copied) == [5] and contents(copied / "5") == before
    same(checkpoint.restore(copied / "5", wanted(tree()))[0], tree(5))


def test_all_damaged_ones_go_and_none_is_overwritten(copied):
    for n in range(3):
        if n:
            shutil.copytree(copied / "10.damaged", copied / "10")
        else:
            cut(copied / "5" / PIECE)
            cut(copied / "10" / PIECE)
        said = []
        assert checkpoint.newest_whole(copied, say=said.append) is None
        assert [line.rpartition("; ")[2] for line in said] == [f"it was moved to 10.damaged{f'.{n}' if n else ''}, there is none before it"] + (
            ["it was moved to 5.damaged, there is none before it"] if n == 0 else []
        )
    assert sorted(path.name for path in copied.iterdir()) == ["10.damaged", "10.damaged.1", "10.damaged.2", "5.damaged"]


def test_a_whole_checkpoint_without_its_list_is_used_and_gets_one(copied):
    (copied / "10" / checkpoint.FILES).unlink()
    said = []
    assert checkpoint.newest_whole(copied, say=said.append) == 10
    assert said == ["checkpoint 10 had no files.json: its arrays' files have their sizes, but whether a byte had changed could not be told"]
    assert checkpoint.newest_whole(copied, say=said.append) == 10 and len(said) == 1
    change(copied / "10" / PIECE, 100)
    assert checkpoint.newest_whole(copied, say=said.append) == 5


def test_a_start_reads_each_file_once_and_only_of_the_checkpoint_that_it_uses(copied, monkeypatch):
    read, crc32 = [], checkpoint._crc32
    monkeypatch.setattr(checkpoint, "_crc32", lambda path: (read.append(path), crc32(path))[1])
    with checkpoint.Checkpoints(copied) as checkpoints:
        assert checkpoints.newest == 10
        checkpoint.restore(checkpoints.folder / "10", wanted(tree()), wanted(progress(0)))
    assert sorted(read) == sorted(path for path in contents(copied / "10") if path.name != checkpoint.FILES)


def test_a_checkpoint_is_sealed_while_the_run_goes_on(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"b_D": jnp.ones(4)}, {"step": jnp.int32(1)})
        deadline = time.monotonic() + 60
        while not (tmp_path / "1" / checkpoint.FILES).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_run_goes_on_after_a_damaged_checkpoint_and_may_write_its_step_again(copied):
    cut(copied / "10" / PIECE)
    with checkpoint.Checkpoints(copied, say=lambda _: None) as checkpoints:
        assert checkpoints.newest == 5
        checkpoints.save(10, tree(11), progress(10))
    same(checkpoint.restore(copied / "10", wanted(tree()))[0], tree(11))
    assert (copied / "10.damaged").is_dir()


def test_files_that_cannot_be_read_are_no_damage(copied, monkeypatch):
    def fail(path):
        raise OSError("the network is down")

    monkeypatch.setattr(checkpoint, "_crc32", fail)
    before = contents(copied)
    with pytest.raises(OSError, match="the network is down"):
        checkpoint.newest_whole(copied, say=pytest.fail)
    assert contents(copied) == before


def test_a_save_that_the_system_refuses_says_its_reason_alone(tmp_path):
    said = """RESOURCE_EXHAUSTED: Error writing "a": Failed writing: "a.__lock": Failed to write 438 bytes to file 39: No space left on device"""
    ends = ("[os_error_code='28'] [tensorstore_spec='{}']", "[tensorstore_spec='{}'] [os_error_code='28']")
    errors = [ValueError(f"{said} {end}") for end in ends] + [OSError(28, "No space left on device"), OSError(28, "No space left on device", "a")]
    for error in errors:
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            refused = checkpoints._not_saved(5, error)
        assert str(refused) == f"checkpoint 5 could not be written to {tmp_path}: No space left on device; those before it are as they were"


def test_a_whole_checkpoint_that_cannot_be_read_is_not_called_damaged(copied, monkeypatch):
    before = contents(copied)

    def fail(*args, **kwargs):
        raise ConnectionError("the disk does not answer")

    for name in ("load_checkpointables", "checkpointables_metadata"):
        with monkeypatch.context() as patch, pytest.raises(checkpoint.NotRestored, match=r"the disk does not answer; its files are whole$"):
            patch.setattr(checkpoint.ocp, name, fail)
            checkpoint.restore(copied / "10", wanted(tree()))
    assert contents(copied) == before


def test_what_orbax_logs_of_errors_that_it_raises_is_not_shown_and_other_errors_are():
    def shown(message, path="/lib/asyncio/base_events.py", level=logging.ERROR, error=None):
        info = (type(error), error, error.__traceback__) if error else None
        return checkpoint._is_news(logging.LogRecord("asyncio", level, path, 1, message, (), info))

    try:
        checkpoint.ocp.load_checkpointables("/nowhere")
    except Exception as e:
        of_orbax = e
    assert not shown("Future exception was never retrieved", error=of_orbax)
    assert not shown("a thread failed", path="/lib/orbax/checkpoint/futures.py")
    assert shown("Future exception was never retrieved", error=ValueError("of another"))
    assert shown("a warning", path="/lib/orbax/checkpoint/futures.py", level=logging.WARNING)


def test_arrays_of_another_type_are_named(saved):
    other = wanted(tree())
    other["w_token_VD"] = jax.ShapeDtypeStruct((24, 32), jnp.bfloat16, sharding=other["w_token_VD"].sharding)
    with pytest.raises(InputError, match=r"arrays: w_token_VD float32\(24, 32\) instead of bfloat16\(24, 32\)\. Use"):
        checkpoint.restore(saved / "10", other)


def saved_steps(folder, *calls, **kept):
    """The steps in `folder` after a start for each of `calls`, which saves {step: validation loss}."""
    for losses in calls:
        with checkpoint.Checkpoints(folder, **kept) as checkpoints:
            for step, val_loss in losses.items():
                checkpoints.save(step, {"b_D": jnp.full(4, step, jnp.float32)}, {"step": jnp.int32(step)}, val_loss=val_loss)
    return checkpoint.steps_in(folder)


LOSSES = {1: 3.0, 2: 1.5, 3: 2.5, 4: float("nan"), 5: 2.5, 6: None, 7: 4.0, 8: 3.5}


@pytest.mark.parametrize(
    ("kept", "steps", "best"),
    [
        ({"keep": 1}, [8], 8),
        ({"keep": 2, "keep_every": 3}, [3, 6, 7, 8], 3),
        ({"keep": 1, "keep_best": 1}, [2, 8], 2),
        ({"keep": 1, "keep_best": 2}, [2, 5, 8], 2),  # of two equal ones the newer
        ({"keep": 1, "keep_best": 3, "keep_every": 4}, [2, 3, 4, 5, 8], 2),
    ],
)
def test_the_newest_the_multiples_and_the_best_stay_over_restarts(tmp_path, kept, steps, best):
    starts = [{step: LOSSES[step] for step in some} for some in ((1, 2, 3), (4,), (5, 6), (7, 8))]
    assert saved_steps(tmp_path, *starts, **kept) == steps
    assert checkpoint.best_step(tmp_path) == best


def test_the_best_are_told_and_an_old_damaged_one_is_no_hindrance(tmp_path):
    assert checkpoint.best_step(tmp_path / "none") is None
    assert saved_steps(tmp_path, {1: 3.0, 2: 1.5, 3: 2.0}, keep=3, keep_best=1) == [1, 2, 3]
    assert checkpoint.best_step(tmp_path) == 2
    (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text("{")
    assert checkpoint.best_step(tmp_path) == 3
    assert saved_steps(tmp_path, {4: 5.0}, keep=1, keep_best=1) == [3, 4]


def test_a_checkpoint_says_what_it_was_trained_with(tmp_path):
    said = {"config": {"model": {"d_model": 32}, "name": "größer"}, "git_commit": None, "versions": {"jax": "0.10.2"}}
    with checkpoint.Checkpoints(tmp_path, about=said) as checkpoints:
        checkpoints.save(7, {"b_D": jnp.ones(4)}, {"step": jnp.int32(7)}, val_loss=1.25)
        checkpoints.save(8, {"b_D": jnp.ones(4)}, {"step": jnp.int32(8)})
    assert checkpoint.about(tmp_path / "7") == said | {"step": 7, "val_loss": 1.25}
    assert checkpoint.about(tmp_path / "8") == said | {"step": 8}
    (tmp_path / "8" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(InputError, match="8: damaged: _CHECKPOINT_METADATA is missing"):
        checkpoint.about(tmp_path / "8")
