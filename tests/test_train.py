"""The loop: a known curve, resuming bit for bit, and a step that depends on nothing but its inputs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mlm_jax import checkpoint
from mlm_jax.config import Config, DataConfig, InputError, MeshConfig, ModelConfig, OptimConfig, TrainConfig, override
from mlm_jax.data.tokens import prepare
from mlm_jax.metrics import read_metrics
from mlm_jax.model import gpt2
from mlm_jax.train import train

CONFIG = Config(
    name="test",
    model=ModelConfig(vocab_size=257, context_len=16, n_layers=2, n_heads=2, d_model=32, d_ff=64, dropout=0.1),
    data=DataConfig(source="set by the fixture", tokenizer="byte"),
    optim=OptimConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=2),
    train=TrainConfig(steps=10, batch_size=8, eval_every=5, eval_windows=8, save_every=4),
    mesh=MeshConfig(data=4, fsdp=2),
)
# Losses of ten steps of CONFIG without dropout, on the text below; a change of data order, model, loss or optimizer moves them.
GOLDEN = [5.555013, 5.268731, 4.871214, 4.356533, 3.992659, 3.710011, 3.444948, 3.354478, 3.236594, 3.236783]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0).choice(["the ", "model ", "reads ", "a ", "text\n", "and ", "learns "], 2000)
    (folder / "text.txt").write_text("".join(words))
    prepare(dataclasses.replace(CONFIG.data, source=str(folder / "text.txt")), folder / "tokens")
    return folder / "tokens"


def run(config, tokens, folder):
    state = train(config, gpt2.GPT2(config.model), tokens, folder)
    return state, read_metrics(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def undisturbed(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return *run(CONFIG, tokens, folder), folder


def test_ten_steps_give_the_golden_curve(tokens, tmp_path):
    _, rows = run(override(CONFIG, {"model.dropout": 0.0}), tokens, tmp_path)
    np.testing.assert_allclose([row["loss"] for row in rows if "loss" in row], GOLDEN, rtol=1e-4)


def test_resuming_is_bit_for_bit(undisturbed, tokens, tmp_path, monkeypatch):
    state, rows, _ = undisturbed

    class Stop(Exception):
        pass

    def stop_after_save(self, step, *args, save=checkpoint.Checkpoints.save):
        save(self, step, *args)
        if step == 8:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", stop_after_save)
        with pytest.raises(Stop):
            run(CONFIG, tokens, tmp_path)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [4, 8]
    with (tmp_path / "metrics.jsonl").open("a") as file:  # what a kill leaves: a later step, and half a line
        file.write(json.dumps({"step": 9, "loss": 99.0}) + '\n{"step": 10, "lo')
    resumed, again = run(CONFIG, tokens, tmp_path)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    figures = [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]
    assert [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in again] == figures


def test_metrics_have_every_step_once_and_validations_at_their_steps(undisturbed):
    _, rows, _ = undisturbed
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10]
    assert all(row["grad_norm"] > 0 and row["tokens_per_s"] > 0 for row in rows if "loss" in row)
    assert rows[1]["lr"] == pytest.approx(1e-2)  # the second update is at the peak


def test_the_newest_checkpoints_are_kept(undisturbed):
    assert checkpoint.steps_in(undisturbed[2] / "checkpoints") == [8, 10]


@pytest.mark.slow
def test_another_seed_gives_another_run(undisturbed, tokens, tmp_path):
    _, rows = run(override(CONFIG, {"train.seed": 1, "train.steps": 3}), tokens, tmp_path)
    assert rows[0]["loss"] != undisturbed[1][0]["loss"]


def test_a_batch_that_the_mesh_does_not_divide_is_refused(tokens, tmp_path):
    with pytest.raises(InputError, match=r"train\.batch_size = 6: .* 8 "):
        run(override(CONFIG, {"train.batch_size": 6}), tokens, tmp_path)
