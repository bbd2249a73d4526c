"""The loop: a known curve, resuming bit for bit, and a step that depends on nothing but its inputs."""

import contextlib
import dataclasses
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import checkpoint, evaluate, objectives, optim, sharding, storage
from mlm_jax.config import Config, DataConfig, InputError, MeshConfig, MixedSourceConfig, ModelConfig, OptimConfig, TrainConfig, override
from mlm_jax.data.batches import Batches, training_batches, validation_windows
from mlm_jax.data.tokens import open_tokens
from mlm_jax.metrics import MEASURED, MetricsFile, read_metrics
from mlm_jax.model import gpt2
from mlm_jax.train import init_state, train
from tests.conftest import documents, write_tokens

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


def run(config, tokens, folder):
    state = train(config, gpt2.GPT2(config.model), tokens, folder)
    return state, read_metrics(folder / "metrics.jsonl")


def run_until(step, config, tokens, folder):
    """The run, broken off when it has saved `step`."""

    class Stop(Exception):
        pass

    def save(self, at, *args, save=checkpoint.Checkpoints.save, **how):
        save(self, at, *args, **how)
        if at == step:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint.Checkpoints, "save", save)
        run(config, tokens, folder)


def repeatable(rows):
    """What a second run has to repeat."""
    kept = [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]
    return [row for row in kept if row.keys() != {"step"}]  # that of a save alone is lost by a kill within it


@pytest.fixture(scope="module")
def undisturbed(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return *run(CONFIG, tokens, folder), folder


def test_ten_steps_give_the_golden_curve(tokens, tmp_path):
    _, rows = run(override(CONFIG, {"model.dropout": 0.0}), tokens, tmp_path)
    np.testing.assert_allclose([row["loss"] for row in rows if "loss" in row], GOLDEN, rtol=1e-4)


def test_resuming_is_bit_for_bit(undisturbed, tokens, tmp_path):
    state, rows, _ = undisturbed

    run_until(8, CONFIG, tokens, tmp_path)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [4, 8]
    with (tmp_path / "metrics.jsonl").open("a") as file:  # what a kill leaves: a later step, and half a line
        file.write(json.dumps({"step": 9, "loss": 99.0}) + '\n{"step": 10, "lo')
    resumed, again = run(CONFIG, tokens, tmp_path)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert repeatable(again) == repeatable(rows)


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


# ---- a batch that grows ----

RAMP = {"train.batch_size": 16, "train.ramp_from": 4, "train.ramp_steps": 5, "train.save_every": 3, "model.dropout": 0.0}
RAMP |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.context": 2}


def test_a_batch_doubles_at_even_intervals_until_it_is_full():
    c = override(CONFIG, RAMP).train
    sizes = [c.batch_size_at(step) for step in range(10)]
    assert sizes == [4, 4, 4, 8, 8, 16, 16, 16, 16, 16] and c.batch_sizes == [4, 8, 16]
    assert [c.rows_before(step) for step in range(11)] == np.cumsum([0, *sizes]).tolist()
    assert [CONFIG.train.rows_before(step) for step in (0, 3)] == [0, 24] and CONFIG.train.batch_size_at(9) == 8
    assert [override(CONFIG, RAMP | {"train.micro_batches": 4}).train.micro_batches_of(B) for B in (4, 8, 16)] == [1, 2, 4]


def test_growing_batches_read_the_same_rows_in_the_same_order_as_others(tokens):
    c = override(CONFIG, RAMP).train
    stored = open_tokens(tokens, "train")
    growing = Batches(stored, context_len=16, batch_size=16, seed=0, rows_before=c.rows_before)
    even = Batches(stored, context_len=16, batch_size=4, seed=0)
    rows = np.concatenate([growing(step) for step in range(7)])
    np.testing.assert_array_equal(rows, np.concatenate([even(step) for step in range(len(rows) // 4)]))


@pytest.mark.slow
def test_a_run_with_a_growing_batch_resumes_within_it_and_begins_as_one_of_the_small_size(tokens, tmp_path):
    config = override(CONFIG, RAMP)
    run_until(3, config, tokens, tmp_path / "a")
    _, rows = run(config, tokens, tmp_path / "a")
    assert [row["batch_size"] for row in rows if "loss" in row] == [4, 4, 4, 8, 8, 16, 16, 16, 16, 16]
    fixed = {"train.batch_size": 4, "train.ramp_from": 0, "train.ramp_steps": 0, "train.save_every": 0}
    _, small = run(override(config, fixed), tokens, tmp_path / "b")
    losses, others = ([row["loss"] for row in found if "loss" in row] for found in (rows, small))
    assert losses[:3] == others[:3] and losses[4] != others[4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.ramp_from": 5}, r"train\.ramp_from = 5: no doubling of it gives train\.batch_size = 16\. Choose from: 8, 4, 2, 1\."),
        ({"train.ramp_from": 16}, r"train\.ramp_from = 16: no doubling"),
        (
            {"train.ramp_steps": 1},
            r"train\.ramp_steps = 1: 2 sizes before the last do not fit into so many of .* Give a value from 2 to 10",
        ),
        ({"train.ramp_steps": 11}, r"train\.ramp_steps = 11: .* from 2 to 10"),
        ({"train.ramp_from": 0}, r"train\.ramp_steps = 5: there is no ramp\. Set train\.ramp_from too"),
        (
            {"train.batch_size": 24, "train.ramp_from": 3, "train.micro_batches": 12},
            r"train\.micro_batches = 12: does not share out a batch of 3 rows",
        ),
    ],
)
def test_a_growth_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        override(CONFIG, RAMP | changes)


def test_a_growing_batch_that_the_mesh_does_not_divide_at_its_start_is_refused(tokens, tmp_path):
    with pytest.raises(InputError, match=r"train\.ramp_from = 2: .*the 4 devices"):
        run(override(CONFIG, RAMP | {"train.ramp_from": 2}), tokens, tmp_path)


@pytest.mark.slow
def test_a_batch_that_grows_to_the_last_step_trains(tokens, tmp_path):
    _, rows = run(override(CONFIG, RAMP | {"train.steps": 3, "train.ramp_from": 8, "train.ramp_steps": 3}), tokens, tmp_path)
    assert [row["batch_size"] for row in rows if "loss" in row] == [8, 8, 8]


# ---- the loop does not wait ----


def test_a_step_is_given_to_the_devices_before_the_figures_of_the_one_before_are_asked_for(tokens, tmp_path, monkeypatch):
    order = []

    class Annotation(contextlib.nullcontext):
        def __init__(self, name, step_num):
            super().__init__()
            order.append(("give", step_num))

    write = MetricsFile.write
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    monkeypatch.setattr(MetricsFile, "write", lambda self, row: (order.append(("write", row["step"])), write(self, row)))
    run(override(CONFIG, {"train.steps": 5, "train.eval_every": 0, "train.save_every": 0}), tokens, tmp_path)
    expected = [("give", 1), ("give", 2), ("write", 1), ("give", 3), ("write", 2), ("give", 4), ("write", 3), ("give", 5), ("write", 4), ("write", 5)]
    assert order[:10] == expected


def test_batches_are_on_the_devices_before_their_steps(tokens, tmp_path, monkeypatch):
    put, read = [], []

    class Annotation(contextlib.nullcontext):
        def __init__(self, name, step_num):
            super().__init__()
            deadline = time.monotonic() + 60
            while max(read) < min(step_num + 1, 5) and time.monotonic() < deadline:  # the batch of the next step is made without this one being given
                time.sleep(0.001)
            put.append(max(read))

    rows = Batches.rows
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    monkeypatch.setattr(Batches, "rows", lambda self, step, start, stop: (read.append(step + 1), rows(self, step, start, stop))[1])
    run(override(CONFIG, {"train.steps": 5, "train.eval_every": 0, "train.save_every": 0}), tokens, tmp_path)
    assert [found >= step for step, found in zip([2, 3, 4, 5, 5], put, strict=True)] == [True] * 5


def test_the_time_that_a_batch_takes_is_named_where_the_devices_wait_for_it(tokens, tmp_path, monkeypatch):
    rows = Batches.rows
    monkeypatch.setattr(Batches, "rows", lambda self, step, *part: (time.sleep(0.3 if step == 0 and part[0] == 0 else 0), rows(self, step, *part))[1])
    _, found = run(override(CONFIG, {"train.steps": 2, "train.eval_every": 0, "train.save_every": 0}), tokens, tmp_path)
    first = found[0]
    assert first["data_s"] > 0.1 and first["step_s"] >= first["idle_s"] >= first["data_s"]
    assert first["programs"] > 0 and first["compile_s"] > 0 and "compile_s" not in found[1]


# ---- mixtures, packed rows, documents, and tokens in a bucket ----

SOURCES = {"web": documents(0, 40, prompts=True), "books": documents(1, 25)}
DATA = DataConfig(
    mixture=(MixedSourceConfig(source="web.txt", name="web", weight=3.0), MixedSourceConfig(source="books.txt", name="books", weight=1.0)),
    tokenizer="byte",
    packing="first_fit",
    reset_attention=True,
    reset_positions=True,
)
MIXED = override(
    CONFIG, {"train.steps": 2, "train.eval_windows": 99, "train.eval_every": 0, "train.save_every": 0, "optim.warmup_steps": 1, "model.dropout": 0.0}
)
MIXED = dataclasses.replace(MIXED, data=DATA)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("mixed") / "tokens", SOURCES)


def nats_alone(model, params, rows):
    """The mean cost of the tokens that are learned, each document of the rows, which are as `Batches` gives them, read alone."""
    cost = jax.jit(lambda tokens: objectives.cross_entropy(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])[0])
    found = []
    for row in rows:
        ids = np.where(row < 0, ~row, row)
        begins = [0, *(i for i in range(1, 16) if ids[i] == 256), 16]
        for a, b in itertools.pairwise(begins):
            padded = np.zeros((1, 17), np.int32)  # the model is causal: what follows changes nothing before it
            padded[0, : b - a + 1] = ids[a : b + 1]
            found += np.asarray(cost(padded))[: b - a][row[a + 1 : b + 1] >= 0].tolist()
    return sum(found) / len(found)


@pytest.mark.slow
def test_documents_of_a_mixture_are_trained_and_evaluated_as_if_each_were_alone(mixed, tmp_path, capfd):
    model, batches = gpt2.GPT2(MIXED.model), training_batches(MIXED, mixed)
    state, rows = run(MIXED, mixed, tmp_path)
    said = capfd.readouterr().err
    fill = batches.shares(2)[0].fill
    assert f"web: 75.00% of the rows, 12, {12 / batches._sources[0].per_epoch:.3g} epochs; {fill:.1%} of its rows is text" in said
    assert "books: 25.00% of the rows, 4, " in said
    first = jax.jit(lambda: init_state(model, optim.optimizer(MIXED.optim, 2), 0).params)()
    assert rows[0]["loss"] == pytest.approx(nats_alone(model, first, batches(0)), rel=1e-4)

    val = open_tokens(mixed, "val")
    starts = range(0, len(val) - 1, 16)
    windows = [val.read_many([a], min(17, len(val) - a))[0] for a in starts]
    windows = [np.concatenate([window, np.full(17 - len(window), ~0)]) for window in windows]
    wanted = nats_alone(model, state.params, windows)
    assert [row["val_loss"] for row in rows if "val_loss" in row] == [pytest.approx(wanted, rel=1e-4)]
    told = objectives.documents_of(MIXED.data, 256)
    measured = evaluate.measure(model, state.params, val, sharding.make_mesh(MIXED.mesh), n_bytes=500, n_characters=400, documents=told)
    assert measured["val_loss"] == pytest.approx(wanted, rel=1e-4)
    assert measured["val_tokens"] == validation_windows(val, 16).batch(0, 99)[1].sum() < len(val) - 1
    assert measured["val_bits_per_byte"] == pytest.approx(wanted * measured["val_tokens"] / math.log(2) / 500, rel=1e-4)


def test_a_skipped_batch_of_a_mixture_is_named_by_sources_and_where_it_begins_in_them(mixed, tmp_path, monkeypatch, capfd):
    causal = objectives.causal
    monkeypatch.setattr(objectives, "causal", lambda tokens_BW: causal(tokens_BW)._replace(weights_BT=jnp.full((8, 16), jnp.nan)))
    config = override(MIXED, {"train.steps": 1, "train.seed": 1})
    _, rows = run(config, mixed, tmp_path)
    starts = training_batches(config, mixed).starts(0, 0, 8)
    assert rows[0]["skipped"] == starts and {where.partition(":")[0] for where in starts} == {"web", "books"}
    assert f"its batch begins at training tokens {', '.join(starts)}" in capfd.readouterr().err


@pytest.mark.slow
def test_tokens_in_a_bucket_train_the_same_run_as_those_on_disk(mixed, tmp_path):
    from tests.gcs_emulator import serve

    config = override(MIXED, {"train.steps": 2})
    _, expected = run(config, mixed, tmp_path / "disk")
    with serve():
        place = storage.place("gs://bucket/tokens")
        storage.send(mixed, [path.name for path in mixed.iterdir()], place)
        _, rows = run(config, place, tmp_path / "bucket")
    assert repeatable(rows) == repeatable(expected)
