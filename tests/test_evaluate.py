"""Evaluation predicts each token of a split once, and its figures equal those computed by hand."""

import lzma
import math
import shutil
import subprocess

import jax
import numpy as np
import pytest

from mlm_jax import evaluate, objectives, runs, sharding
from mlm_jax.config import MeshConfig, ModelConfig
from mlm_jax.data.batches import validation_windows
from mlm_jax.data.shards import read_manifest
from mlm_jax.data.tokenizer import byte_level
from mlm_jax.data.tokens import Tokens, open_tokens
from mlm_jax.model import gpt2

CONFIG = ModelConfig(vocab_size=19, context_len=8, n_layers=1, n_heads=2, d_model=16, d_ff=32, init_std=0.5)


@pytest.fixture(scope="module")
def model_and_params():
    model = gpt2.GPT2(CONFIG)
    return model, jax.jit(lambda: gpt2.init(model, jax.random.key(0)))()


def tokens(n):
    ids = np.random.default_rng(n).integers(0, CONFIG.vocab_size, n)
    return Tokens([ids[: n // 3], ids[n // 3 :]])  # two shards


def mesh_of(n_devices):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:n_devices])


def nats_by_hand(model, params, ids, T):
    """-log p of every token but the first, in float64: windows of T inputs, one after the other, as GPT-2's logits see them."""
    logits_of = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    nats = []
    for first in range(0, len(ids) - 1, T):
        window = ids[first : first + T + 1]
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(window) - 1] = window[:-1]  # the model is causal: what follows changes nothing before it
        logits = np.asarray(logits_of(padded)[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += [-log_p[i, token] for i, token in enumerate(window[1:])]
    return np.array(nats)


@pytest.mark.parametrize("n", [2, 8, 9, 10, 100, 337])
@pytest.mark.parametrize("n_devices", [1, 8])
def test_every_token_but_the_first_is_predicted_once(model_and_params, n, n_devices):
    model, params = model_and_params
    expected = nats_by_hand(model, params, tokens(n).read(0, n), CONFIG.context_len)
    assert len(expected) == n - 1
    result = evaluate.measure(model, params, tokens(n), mesh_of(n_devices), n_bytes=3 * n, n_characters=2 * n)
    assert result["val_tokens"] == n - 1
    assert result["val_loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    assert result["val_bits_per_byte"] == pytest.approx(expected.sum() / math.log(2) / (3 * n), rel=1e-5)
    assert result["val_nats_per_character"] == pytest.approx(expected.sum() / (2 * n), rel=1e-5)
    assert result["val_bytes"] == 3 * n


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model_and_params):
    model, params = model_and_params
    result = evaluate.measure(model, jax.tree.map(np.zeros_like, params), tokens(50), mesh_of(1), n_bytes=50, n_characters=50)
    assert result["perplexity"] == pytest.approx(CONFIG.vocab_size, rel=1e-6)


def test_a_hopeless_model_has_a_perplexity_all_the_same(model_and_params):
    model, params = model_and_params
    lost = params | {"norm_f": {"scale_D": params["norm_f"]["scale_D"] * 1e5, "b_D": params["norm_f"]["b_D"]}}
    result = evaluate.measure(model, lost, tokens(50), mesh_of(1), n_bytes=50, n_characters=50)
    assert result["val_loss"] > 1000 and math.isfinite(result["perplexity"])


def test_some_windows_are_spread_over_the_whole_split(model_and_params):
    model, params = model_and_params
    windows = validation_windows(tokens(80), CONFIG.context_len)
    expected = nats_by_hand(model, params, tokens(80).read(0, 80), CONFIG.context_len)
    step = evaluate.make_eval_step(model)
    loss, n = evaluate.mean_loss(step, params, windows, mesh_of(1), batch_size=2, at_most=3)  # windows 0, 4 and 9 of 10
    assert n == 8 + 8 + 7
    assert loss == pytest.approx(np.concatenate([expected[0:8], expected[32:40], expected[72:79]]).mean(), rel=1e-5)
    assert evaluate.mean_loss(step, params, windows, mesh_of(1), batch_size=4, at_most=99)[0] == pytest.approx(expected.mean(), rel=1e-5)


def test_the_figures_of_a_run_are_those_of_its_text(tiny_run):
    result = runs.read_json(tiny_run.folder / "evaluation.json")
    model, params, tokenizer = runs.load(tiny_run.folder)
    text = tiny_run.text.read_text(encoding="utf-8")
    held_out = text[int(len(text) * 0.9) :]
    ids = np.concatenate([[tokenizer.eot_id], tokenizer.encode(held_out)])
    expected = nats_by_hand(model, params, ids, 16)
    assert result["val_loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert result["val_bits_per_byte"] == pytest.approx(expected.sum() / math.log(2) / len(held_out.encode()), rel=1e-5)
    assert (result["val_tokens"], result["val_bytes"]) == (len(ids) - 1, len(held_out.encode()))
    alone, before, both = (
        len(lzma.compress(x.encode(), preset=9)) for x in (held_out, text[: -len(held_out)] + "\n", text[: -len(held_out)] + "\n" + held_out)
    )
    assert result["xz_bits_per_byte"] == 8 * alone / len(held_out.encode())
    assert result["xz_primed_bits_per_byte"] == 8 * (both - before) / len(held_out.encode())


def test_the_text_of_a_split_is_its_documents(tiny_run):
    tokenizer = byte_level()
    a, b = "first é", "second"
    ids = np.concatenate([x for text in (a, b) for x in ([tokenizer.eot_id], tokenizer.encode(text))])
    assert evaluate.plain_text(Tokens([ids]), tokenizer) == f"{a}\n{b}".encode()
    run_tokenizer = runs.load(tiny_run.folder).tokenizer
    parts = [evaluate.plain_text(open_tokens(tiny_run.folder / "tokens", name), run_tokenizer) for name in ("train", "val")]
    assert b"".join(parts) == tiny_run.text.read_bytes()


@pytest.mark.skipif(not shutil.which("xz"), reason="needs the xz program")
def test_the_bar_is_what_the_xz_program_needs(tiny_run):
    text = tiny_run.text.read_bytes()
    needed = len(subprocess.run(["xz", "-9", "-c"], input=text, capture_output=True, check=True).stdout)
    assert evaluate.xz_bits_per_byte(text) == 8 * needed / len(text)


def test_text_that_takes_too_long_is_not_compressed(tiny_run, monkeypatch):
    total = sum(split.bytes for split in read_manifest(tiny_run.folder / "tokens").splits.values())
    tokenizer = runs.load(tiny_run.folder).tokenizer
    monkeypatch.setattr(evaluate, "XZ_BYTES", total)
    assert set(evaluate.compressors(tiny_run.folder / "tokens", tokenizer)) == {"xz_bits_per_byte", "xz_primed_bits_per_byte"}
    monkeypatch.setattr(evaluate, "XZ_BYTES", total - 1)
    assert evaluate.compressors(tiny_run.folder / "tokens", tokenizer) == {}


def test_the_description_has_all_figures(tiny_run):
    result = runs.read_json(tiny_run.folder / "evaluation.json")
    words = evaluate.describe(result)
    for key in ("val_loss", "val_bits_per_byte", "val_nats_per_character", "xz_bits_per_byte", "xz_primed_bits_per_byte"):
        assert f"{result[key]:.4f}" in words
    without = {key: value for key, value in result.items() if not key.startswith("xz")}
    assert "xz" not in evaluate.describe(without)


def test_evaluation_tells_the_model_of_documents_as_its_run_does(tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    plain = runs.evaluate_reference(str(folder), text=None, trust_code=False)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"reset_attention": false', '"reset_attention": true'))
    told = runs.evaluate_reference(str(folder), text=None, trust_code=False)
    model, params, tokenizer = runs.load(folder)
    val = open_tokens(folder / "tokens", "val")
    documents = objectives.Documents(tokenizer.eot_id, attention=True, positions=False)
    expected = evaluate.measure(model, params, val, mesh_of(1), n_bytes=plain["val_bytes"], n_characters=1000, documents=documents)
    assert told["val_loss"] == expected["val_loss"]

    text = tmp_path / "two"
    text.mkdir()
    for name in "ab":
        (text / f"{name}.txt").write_text("the model reads a text and learns" * 2 + name)
    same, other = (runs.evaluate_reference(str(run), text=str(text), trust_code=False)["val_loss"] for run in (tiny_run.folder, folder))
    assert same != other


def test_a_split_of_which_nothing_is_learned_has_no_loss(model_and_params):
    model, params = model_and_params
    unlearned = Tokens([np.arange(19)], [np.zeros(19, np.uint8)])
    loss, n = evaluate.mean_loss(evaluate.make_eval_step(model), params, validation_windows(unlearned, 8), mesh_of(1), batch_size=2)
    assert math.isnan(loss) and n == 0
