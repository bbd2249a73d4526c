"""Checkpoints in a bucket are as those on disk, also while the network fails: against an emulator of Google Cloud Storage."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import checkpoint, sharding, storage
from mlm_jax.config import InputError, MeshConfig
from tests.gcs_emulator import gcsfs

# Of the requests that are under way when a save fails, some end after the loop that waited for them.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")]


def tree(seed):
    draw = np.random.default_rng(seed)
    return {"w_up_DF": draw.normal(size=(32, 64)).astype(np.float32), "blocks": {"b_up_F": draw.normal(size=(2, 64)).astype(np.float32)}}


def wanted(config=None):
    mesh = sharding.make_mesh(config or MeshConfig(), jax.devices()[: 8 if config else 1])
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree(0), sharding.shardings(mesh, tree(0)))


def save(checkpoints, step, **more):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    checkpoints.save(step, jax.device_put(tree(step), sharding.shardings(mesh, tree(step))), {"step": jnp.int32(step)}, **more)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32), strict=True), a, b)


@pytest.fixture
def folder(server, request):
    """A folder of the bucket with checkpoints 5 and 10."""
    name = f"gs://bucket/{re.sub('[^a-z0-9]', '_', request.node.name)}/checkpoints"
    with checkpoint.Checkpoints(name, about={"git_commit": "abc"}) as checkpoints:
        save(checkpoints, 5, val_loss=2.0)
        save(checkpoints, 10, val_loss=3.0)
    return name


@pytest.mark.parametrize("config", [None, MeshConfig(data=1, fsdp=4, tensor=2)])
def test_arrays_come_back_bit_for_bit(folder, config):
    assert checkpoint.steps_in(folder) == [5, 10] and checkpoint.best_step(folder) == 5
    params, rest = checkpoint.restore(f"{folder}/10", wanted(config), {"step": np.zeros((), np.int32)})
    same(params, tree(10))
    assert int(rest["step"]) == 10
    assert checkpoint.about(f"{folder}/10") == {"git_commit": "abc", "step": 10, "val_loss": 3.0}


def test_a_start_goes_by_the_sizes_and_checksums_of_the_bucket(folder, server):
    piece = storage.place(f"{folder}/10/params/w_up_DF/c/0/0")
    piece.write_bytes(piece.read_bytes()[:-1] + b"x")
    said = []
    with checkpoint.Checkpoints(folder, say=said.append) as checkpoints:
        assert checkpoints.newest == 5
        same(checkpoint.restore(checkpoints.folder / "5", wanted())[0], tree(5))
        save(checkpoints, 10)
    assert said == [
        "checkpoint 10 is damaged: params/w_up_DF/c/0/0 has other bytes than were written; it was moved to 10.damaged, checkpoint 5 is used instead"
    ]
    storage.place(f"{folder}/10/progress/step/c").unlink()
    before = {name.partition("/10/")[2] for name in server.names() if f"{folder}/10/" in f"gs://bucket/{name}"}
    assert checkpoint.newest_whole(folder, say=said.append) == 5
    assert "10 is damaged: progress/step/c is missing; it was moved to 10.damaged.1, checkpoint 5 is used" in said[1]
    moved = {name.partition("/10.damaged.1/")[2] for name in server.names() if f"{folder}/10.damaged.1/" in f"gs://bucket/{name}"}
    assert moved == before and checkpoint.steps_in(folder) == [5]


def test_a_checkpoint_without_its_list_is_judged_by_what_its_arrays_need(folder):
    storage.place(f"{folder}/10/files.json").unlink()
    said = []
    assert checkpoint.newest_whole(folder, say=said.append) == 10 and "10 had no files.json" in said[0]
    storage.place(f"{folder}/10/files.json").unlink()
    storage.place(f"{folder}/10/params/w_up_DF/c/0/0").write_bytes(b"short")
    assert checkpoint.newest_whole(folder, say=said.append) == 5 and "10 is damaged: params/w_up_DF/c/0/0 has 5 bytes" in said[1]


def test_the_newest_the_multiples_and_the_best_stay(folder, server):
    with checkpoint.Checkpoints(folder, keep=1, keep_every=6, keep_best=1) as checkpoints:
        for step in (12, 13, 14):
            save(checkpoints, step, val_loss=4.0)
    assert checkpoint.steps_in(folder) == [5, 12, 14]
    assert {name.split("/")[2] for name in server.names() if f"gs://bucket/{name}".startswith(folder)} == {"5", "12", "14"}


def test_a_save_waits_out_a_busy_bucket(folder, server):
    refused = []

    def busy(method, name):
        name = name.partition("/15/")[2]
        if method != "GET" and name in ("params/w_up_DF/zarr.json", "params/w_up_DF/c/0/0", "_CHECKPOINT_METADATA") and name not in refused:
            refused.append(name)
            return 503

    server.answer = busy
    with checkpoint.Checkpoints(folder) as checkpoints:
        save(checkpoints, 15)
    assert len(refused) == 3
    assert checkpoint.newest_whole(folder, say=pytest.fail) == 15
    same(checkpoint.restore(f"{folder}/15", wanted())[0], tree(15))


@pytest.mark.parametrize("part", ["w_up_DF", "commit_success.txt", "_CHECKPOINT_METADATA"])
def test_a_save_that_fails_leaves_no_checkpoint_and_the_one_before_is_used(folder, server, part):
    server.answer = lambda method, name: 403 if method != "GET" and "/15/" in name and part in name else None
    with pytest.raises(checkpoint.NotSaved) as e, checkpoint.Checkpoints(folder) as checkpoints:
        save(checkpoints, 15)
    assert str(e.value).startswith(f"checkpoint 15 could not be written to {folder}: ") and "\n" not in str(e.value)
    assert any(f"gs://bucket/{name}".startswith(f"{folder}/15/") for name in server.names()) and checkpoint.steps_in(folder) == [5, 10]
    server.answer = lambda method, name: None
    with checkpoint.Checkpoints(folder, say=pytest.fail) as checkpoints:
        assert checkpoints.newest == 10
        save(checkpoints, 15)
    same(checkpoint.restore(f"{folder}/15", wanted())[0], tree(15))


@pytest.mark.slow  # a library tries for a minute
def test_a_bucket_that_is_gone_ends_a_save_and_damages_nothing(folder, server, monkeypatch):
    monkeypatch.setattr(gcsfs.GCSFileSystem, "retries", 2)  # it would try for half a minute
    names = server.names()
    with pytest.raises(checkpoint.NotSaved, match="checkpoint 15 could not be written"), checkpoint.Checkpoints(folder) as checkpoints:
        server.answer = lambda method, name: 0
        save(checkpoints, 15)
    with pytest.raises(Exception, match=r"\w") as e:  # whatever the library makes of it
        checkpoint.newest_whole(folder, say=pytest.fail)
    assert not isinstance(e.value, InputError)
    server.answer = lambda method, name: None
    assert names <= server.names() and checkpoint.newest_whole(folder, say=pytest.fail) == 10


def test_without_its_library_a_bucket_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("gs://bucket/run", "gs:/bucket/run"):
        with pytest.raises(InputError) as e:
            checkpoint.steps_in(name)
        assert str(e.value).endswith('gs://bucket/run: Google Cloud Storage needs gcsfs, which is not installed. pip install -e ".[gcs]".')


def test_the_seal_holds_the_checksums_of_the_bucket(folder):
    values = json.loads(storage.place(f"{folder}/10/files.json").read_text())
    assert values["params/_METADATA"]["crc32c"] and all(sorted(value) == ["bytes", "crc32c"] for value in values.values())
