"""Token shards that are made into a bucket, on an emulator of Google Cloud Storage."""

import dataclasses
import json

import numpy as np
import pytest

from mlm_jax import storage
from mlm_jax.config import DataConfig, InputError
from mlm_jax.data import prepare, shards, tokens

FOLDER = "gs://bucket/tokens"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": f"Document {i} says é{i * i}.", "q": f"Who is {i}?"}) for i in range(120)))
    return DataConfig(source=str(folder / "a.jsonl"), prompt_field="q", tokenizer="byte", val_fraction=0.2, workers=1)


def test_shards_in_a_bucket_are_those_on_disk_and_the_manifest_comes_last(server, config, tmp_path):
    there, before_each = storage.place(FOLDER), []
    server.answer = lambda method, name: before_each.append(server.names()) if method == "POST" else None
    made = prepare.prepare(config, there, scratch=tmp_path / "scratch")
    assert prepare.prepare(config, tmp_path / "disk") == made == shards.read_manifest(there)
    assert {name.removeprefix("tokens/") for name in server.names()} >= {*made.files, "manifest.json", "tokenizer/tokenizer.json"}
    assert server.names() - before_each[-1] == {"tokens/manifest.json"}
    assert not (tmp_path / "scratch").exists()
    for split in ("train", "val"):
        far, near = tokens.open_tokens(there, split), tokens.open_tokens(tmp_path / "disk", split)
        assert len(far) == len(near)
        np.testing.assert_array_equal(far.read_many([3, len(far) - 5], 40), near.read_many([3, len(near) - 5], 40))
        assert (near.read_many([0], len(near)) < 0).any()  # what is not learned


def test_shards_that_are_there_are_used_again_and_others_stay(server, config, tmp_path):
    there = storage.place(FOLDER)
    made = prepare.prepare(config, there, scratch=tmp_path / "scratch")
    before = server.names()
    assert prepare.prepare(dataclasses.replace(config, workers=2), there, scratch=tmp_path / "scratch") == made
    with pytest.raises(InputError, match=r"data\.tokens = gs://bucket/tokens: holds tokens of another configuration: data\.val_fraction"):
        prepare.prepare(dataclasses.replace(config, val_fraction=0.3), there, scratch=tmp_path / "scratch")
    assert server.names() == before and not (tmp_path / "scratch").exists()


def test_a_folder_of_something_else_is_left_alone(server, config, tmp_path):
    storage.write_text(storage.place("gs://bucket/thesis/thesis.tex"), "precious")
    with pytest.raises(InputError, match=r"gs://bucket/thesis: holds thesis\.tex and no token shards"):
        prepare.prepare(config, storage.place("gs://bucket/thesis"), scratch=tmp_path / "scratch")
