"""A bad batch is skipped, named, and leaves no trace in the run; accumulation and averaging change what a step does in no other way."""

import contextlib
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm_jax import cli, guard, objectives, optim, sharding, train
from mlm_jax.config import Config, DataConfig, InputError, MeshConfig, ModelConfig, OptimConfig, TrainConfig, override
from mlm_jax.data.batches import Batches
from mlm_jax.metrics import read_metrics
from mlm_jax.model import gpt2

MODEL = ModelConfig(vocab_size=257, context_len=16, n_layers=2, n_heads=2, d_model=32, d_ff=64)
CONFIG = Config(
    name="test",
    model=MODEL,
    data=DataConfig(source="set by the fixture", tokenizer="byte"),
    optim=OptimConfig(peak_lr=3e-3, end_lr=1e-3, warmup_steps=2),
    train=TrainConfig(steps=8, batch_size=8, eval_every=0, eval_windows=8, save_every=4),
    mesh=MeshConfig(data=8),
)


class Poisoned(gpt2.GPT2):
    """The model, whose logits are NaN where a window begins with token 256, the end of text, and 50 times too large with `spike`."""

    spike: bool = False

    def __call__(self, tokens_BT, **how):
        logits_BTV = super().__call__(tokens_BT, **how)
        poisoned_B11 = (tokens_BT[:, :1, None] == 256) & how.get("train", False)
        return logits_BTV * jnp.where(poisoned_B11, 50.0 if self.spike else jnp.nan, 1.0)


def poison(monkeypatch, steps):
    """Rows of these steps begin with the end of text."""
    rows = Batches.rows

    def poisoned(self, step, start, stop):
        batch = rows(self, step, start, stop)
        if step in steps:
            batch[:, 0] = 256
        return batch

    monkeypatch.setattr(Batches, "rows", poisoned)


@functools.cache
def state_and_step(config: TrainConfig = TrainConfig(), ema_decay: float = 0.0, model=gpt2.GPT2(MODEL)):  # noqa: B008  # both are frozen
    """(the state before the first step, the compiled step)."""
    tx = optim.optimizer(OptimConfig(peak_lr=1e-2, warmup_steps=0, eps=1e-4), 100)
    state = jax.jit(lambda: train.init_state(model, tx, 0, ema_decay=ema_decay))()
    return state, jax.jit(train.make_train_step(model, tx, config, ema_decay=ema_decay))


def windows(step: int, rows: int = 8):
    return jnp.asarray(np.random.default_rng(step).integers(0, 256, (rows, 17)), jnp.int32)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- skipping ----


def test_a_step_that_is_not_finite_changes_nothing_but_its_count():
    state, step = state_and_step(ema_decay=0.9, model=Poisoned(MODEL))
    state, _ = step(state, windows(0))
    after, figures = step(state, windows(1).at[:, 0].set(256))
    assert bool(figures["skipped"]) and not np.isfinite(figures["loss"])
    for part in ("params", "opt_state", "average"):
        assert_same(getattr(after, part), getattr(state, part))
    assert (int(after.step), int(after.recent.skipped), int(after.recent.in_row)) == (2, 1, 1)
    again, figures = step(after, windows(2))
    assert not figures["skipped"] and (int(again.recent.skipped), int(again.recent.in_row)) == (1, 0)
    assert np.isfinite(figures["loss"])


@pytest.mark.parametrize(("figure", "good"), [(1.0, True), (1.99, True), (2.01, False), (np.nan, False), (np.inf, False), (0.01, True)])
@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_a_step_is_good_up_to_the_mean_and_so_many_standard_deviations_of_the_last(figure, good, which):
    past = np.where(np.arange(guard.WINDOW) % 2, 0.8, 1.2).astype(np.float32)  # mean 1, deviation 0.2
    recent = guard.start()._replace(figures={"loss_W": jnp.asarray(past), "grad_norm_W": jnp.exp(past)})
    figures = {"loss": jnp.float32(1), "grad_norm": jnp.float32(np.e)}
    figures[which] = jnp.float32(np.exp(figure) if which == "grad_norm" else figure)  # norms are compared by their logarithm
    assert bool(guard.is_good(recent, **figures, sigmas=5.0)) is good
    assert bool(guard.is_good(guard.start(), **figures, sigmas=5.0)) is bool(np.isfinite(figure))  # too few steps to compare with
    assert bool(guard.is_good(recent, **figures, sigmas=0.0)) is bool(np.isfinite(figure))


def test_only_good_steps_are_remembered_the_newest_first():
    recent = guard.start()
    for loss, good in ((3.0, True), (99.0, False), (2.0, True)):
        recent = guard.remember(recent, jnp.bool(good), jnp.float32(loss), jnp.float32(loss / 2))
    np.testing.assert_array_equal(recent.figures["loss_W"][:3], [2.0, 3.0, np.nan])
    np.testing.assert_array_equal(recent.figures["grad_norm_W"][:3], [1.0, 1.5, np.nan])


def test_a_step_without_a_gradient_hides_no_spike_that_follows():
    past = np.where(np.arange(guard.WINDOW) % 2, 0.8, 1.2).astype(np.float32)
    recent = guard.start()._replace(figures={"loss_W": jnp.asarray(past), "grad_norm_W": jnp.exp(past)})
    recent = guard.remember(recent, guard.is_good(recent, jnp.float32(0), jnp.float32(0), 5.0), jnp.float32(0), jnp.float32(0))
    assert int(recent.skipped) == 0 and not guard.is_good(recent, jnp.float32(1), jnp.float32(np.exp(3)), 5.0)


def test_a_spike_is_skipped_where_there_are_steps_to_compare_with(monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", 8)
    state, step = state_and_step(model=Poisoned(MODEL, spike=True))
    for i in range(10):
        state, figures = step(state, windows(i))
        assert not figures["skipped"]
    after, figures = step(state, windows(10).at[:, 0].set(256))
    assert bool(figures["skipped"]) and np.isfinite(figures["loss"])
    assert_same(after.params, state.params)


@pytest.mark.slow
def test_a_run_survives_poisoned_batches_near_the_clean_one_and_names_them(tokens, tmp_path, monkeypatch, capfd):
    config = override(CONFIG, {"train.steps": 30, "train.debug": True})
    clean = train.train(config, gpt2.GPT2(MODEL), tokens, tmp_path / "clean")
    poison(monkeypatch, {4, 5, 20})
    capfd.readouterr()
    train.train(config, Poisoned(MODEL), tokens, tmp_path / "poisoned")
    said = capfd.readouterr().err
    (clean_loss,), (loss,) = ([r["val_loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if "val_loss" in r] for n in ("clean", "poisoned"))
    assert abs(loss - clean_loss) < 0.05 * clean_loss and int(clean.recent.skipped) == 0
    rows = [row for row in read_metrics(tmp_path / "poisoned/metrics.jsonl") if "skipped" in row]
    assert [row["step"] for row in rows] == [5, 6, 21] and "step 21: skipped, loss nan" in said
    assert all(f"step {step}: the first that is not finite is " in said for step in (5, 6, 21))
    batches = Batches(train.open_tokens(tokens, "train"), context_len=16, batch_size=8, seed=0)
    stored = train.open_tokens(tokens, "train")
    clean_rows = [stored.read(first, 17) for first in rows[0]["skipped"]]
    monkeypatch.undo()
    np.testing.assert_array_equal(np.stack(clean_rows), batches(4))
    assert len(json.dumps(rows[0])) < 1000


def test_a_run_ends_in_words_after_so_many_skipped_steps_in_a_row_and_keeps_its_checkpoint(tokens, tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 99))
    with pytest.raises(train.Diverged, match=r"^3 steps in a row were skipped, the last is 8: loss nan.* Lower optim\.peak_lr"):
        train.train(override(CONFIG, {"train.max_skips": 3, "train.steps": 20}), Poisoned(MODEL), tokens, tmp_path)
    assert (tmp_path / "checkpoints/4").is_dir()


# ---- debugging ----


@pytest.mark.slow
def test_the_first_array_that_is_not_finite_is_named():
    model = gpt2.GPT2(MODEL)
    params, tokens_BW = jax.jit(lambda: gpt2.init(model, jax.random.key(0)))(), windows(0)
    assert guard.first_not_finite(model, params, tokens_BW) == ""

    def changed(path, value):
        _, part, name = path
        return params | {"blocks": params["blocks"] | {part: params["blocks"][part] | {name: params["blocks"][part][name].at[1].set(value)}}}

    assert guard.first_not_finite(model, changed(("blocks", "mlp", "b_up_F"), jnp.nan), tokens_BW) == "the parameter block_1/mlp/b_up_F"
    huge = changed(("blocks", "mlp", "w_up_DF"), 3e38)
    assert guard.first_not_finite(model, huge, tokens_BW) == "the output of block_1/mlp"

    @jax.custom_vjp
    def spoil(x):
        return x

    spoil.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))

    class Spoilt(gpt2.Mlp):
        def __call__(self, x_BTD):
            x_BTD = super().__call__(x_BTD)
            return spoil(x_BTD) if self.path[0] == "block_1" else x_BTD

    class Block(gpt2.Block):
        def setup(self):
            self.norm_1, self.attention = gpt2.Norm(self.config), gpt2.Attention(self.config)
            self.norm_2, self.mlp = gpt2.Norm(self.config), Spoilt(self.config)
            self.dropout = gpt2.nn.Dropout(0.0)

    found = guard.first_not_finite(gpt2.GPT2(MODEL, block=Block), params, tokens_BW)
    assert found.startswith("the gradient of block_1/mlp/")


# ---- accumulation and averaging ----


@pytest.mark.parametrize("k", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_take_the_step_of_the_whole_batch(k):
    state, whole = state_and_step()
    _, parts = state_and_step(TrainConfig(micro_batches=k))
    other = state
    for i in range(3):
        state, a = whole(state, windows(i))
        other, b = parts(other, windows(i))
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * float(jnp.abs(x).max() + 1e-3))


def test_micro_batches_on_a_mesh_take_the_step_of_one_device_and_move_no_row():
    state, step = state_and_step(TrainConfig(micro_batches=2))
    _, expected = step(state, windows(0, rows=16))
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    with jax.sharding.set_mesh(mesh):
        batch = sharding.put_rows(lambda start, stop: np.asarray(windows(0, rows=16))[start:stop], (16, 17), jnp.int32, mesh)
        spread = jax.device_put(state, sharding.shardings(mesh, state))
        _, figures = step(spread, batch)
        text = step.lower(spread, batch).compile().as_text()
    np.testing.assert_allclose(figures["loss"], expected["loss"], rtol=1e-6)
    assert "all-to-all" not in text


@pytest.mark.slow
def test_micro_batches_need_less_memory():
    def temporary(k: int) -> int:
        state, step = state_and_step(TrainConfig(micro_batches=k))
        return step.lower(state, windows(0, rows=64)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.5 * temporary(1)


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(InputError, match=r"train\.micro_batches = 3: does not divide train\.batch_size = 8\. Choose from: 1, 2, 4, 8"):
        TrainConfig(batch_size=8, micro_batches=3)


def test_the_average_of_the_weights_is_the_one_computed_by_hand():
    state, step = state_and_step(ema_decay=0.5)
    history = []
    for i in range(3):
        state, _ = step(state, windows(i))
        history.append(state.params)
    weights = np.array([0.25, 0.5, 1.0]) / 1.75
    expected = jax.tree.map(lambda *x: sum(w * np.asarray(a, np.float64) for w, a in zip(weights, x, strict=True)), *history)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(state.average), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-7)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, state.average, state.params)) > 0


@pytest.mark.slow
def test_the_average_is_evaluated_beside_the_weights_and_goes_on_from_a_checkpoint(tokens, tmp_path):
    config = override(CONFIG, {"optim.ema_decay": 0.9})
    first = train.train(config, gpt2.GPT2(MODEL), tokens, tmp_path / "a")
    (row,) = [row for row in read_metrics(tmp_path / "a/metrics.jsonl") if "val_loss" in row]
    assert row["val_loss_ema"] != row["val_loss"] and abs(row["val_loss_ema"] - row["val_loss"]) < 2
    (tmp_path / "a/checkpoints/8").rename(tmp_path / "gone")  # goes on from step 4, with the average
    assert_same(train.train(config, gpt2.GPT2(MODEL), tokens, tmp_path / "a"), first)


# ---- whole runs on batches that someone spoilt ----


def spoilt_run(experiment, out, *, nan=(), labels=(), **settings):
    """(metrics rows, what was said) of `mlm-jax train` with NaN for the weights of the targets in the batches of steps `nan`, and one rare token
    for all targets in those of `labels`. Steps count from 1, as in the metrics."""
    rows, causal = Batches.rows, objectives.causal

    def marked(self, step, start, stop):
        batch = rows(self, step, start, stop)
        if step + 1 in {*nan, *labels}:
            batch[:, :2] = (0, 0) if step + 1 in nan else (0, 1)  # bytes that the text does not have
        return batch

    def spoil(tokens_BW):
        examples = causal(tokens_BW)
        is_nan, is_label = ((tokens_BW[:, 0] == 0).all() & (tokens_BW[:, 1] == mark).all() for mark in (0, 1))
        return examples._replace(targets_BT=jnp.where(is_label, 0, examples.targets_BT), weights_BT=jnp.where(is_nan, jnp.nan, examples.weights_BT))

    sets = [part for path, value in settings.items() for part in ("--set", f"{path.replace('__', '.')}={value}")]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(Batches, "rows", marked)
        patch.setattr(objectives, "causal", spoil)
        assert cli.main(["train", str(experiment), "--out", str(out), "--traceback", *sets]) == 0, said.getvalue()
    return read_metrics(out / "metrics.jsonl"), said.getvalue()


def named(run, rows, said):
    """The skipped steps, each of which is named, in a row and in words, by the tokens where its batch begins."""
    stored = train.open_tokens(run / "tokens", "train")
    batches = Batches(stored, context_len=16, batch_size=8, seed=json.loads((run / "config.json").read_text())["train"]["seed"])
    skipped = {row["step"]: row["skipped"] for row in rows if "skipped" in row}
    for step, starts in skipped.items():
        assert starts == batches.starts(step - 1, 0, 8)
        np.testing.assert_array_equal([stored.read(first, 17) for first in starts], batches(step - 1))
        (line,) = (line for line in said.splitlines() if line.startswith(f"step {step}: skipped, loss "))
        assert line.endswith(f"; its batch begins at training tokens {', '.join(map(str, starts))}")
    return set(skipped)


def test_a_batch_of_nan_and_one_of_wrong_labels_are_skipped_and_named_by_where_they_begin(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", 8)
    rows, said = spoilt_run(tiny_experiment, tmp_path / "run", nan={3}, labels={14, 19}, train__skip_sigmas=8.0)
    assert named(tmp_path / "run", rows, said) == {3, 14, 19}
    loss = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert loss[3] is None and loss[14] > loss[13] + 1 and loss[20] < loss[1]


@pytest.mark.slow
def test_runs_with_spoilt_batches_end_within_the_noise_of_clean_ones(tiny_experiment, tmp_path):
    nan, labels = {100, 170}, {150, 180, 181, *range(228, 240)}
    sets = {"train__steps": 240, "train__eval_every": 0, "train__eval_windows": 999, "train__save_every": 0}

    def end(name, seed, must, **how):
        rows, said = spoilt_run(tiny_experiment, tmp_path / f"{name}_{seed}", train__seed=seed, **sets, **how)
        skipped = named(tmp_path / f"{name}_{seed}", rows, said)
        assert must <= skipped and len(skipped - must) <= 2, (name, seed, skipped)  # gradient norms have a heavy tail: 6 deviations happen
        assert not skipped & (labels - must), "without the guard spikes are taken"
        return next(row["val_loss"] for row in rows if "val_loss" in row)

    clean = np.array([end("clean", seed, set()) for seed in range(3)])
    guarded = np.array([end("guarded", seed, nan | labels, nan=nan, labels=labels) for seed in range(3)])
    unguarded = end("unguarded", 0, nan, nan=nan, labels=labels, train__skip_sigmas=0)
    noise = clean.std(ddof=1)
    print(f"clean {clean}, deviation {noise:.4f}; guarded - clean {guarded - clean}; unguarded - clean {unguarded - clean[0]:.4f}")
    assert abs(guarded - clean).max() < noise and abs(guarded.mean() - clean.mean()) < noise / 2
    assert unguarded - clean[0] > noise
