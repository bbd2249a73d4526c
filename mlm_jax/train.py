"""Training: the state, the step, and the loop."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mlm_jax import checkpoint, metrics, objectives, optim, sharding
from mlm_jax.config import Config, InputError
from mlm_jax.data.batches import Batches, validation_windows
from mlm_jax.data.tokens import open_tokens, read_manifest
from mlm_jax.evaluate import make_eval_step, mean_loss
from mlm_jax.model import gpt2


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]  # optimizer steps done
    params: Any
    opt_state: Any


def make_train_step(model: gpt2.Model, tx: optax.GradientTransformation, seed: int) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, tokens_BW) -> (next state, metrics); dropout is drawn from (seed, step) alone."""

    def loss_fn(params: Any, tokens_BW: Int[Array, "B W"], dropout_key: Array) -> Float[Array, ""]:
        examples = objectives.causal(tokens_BW)
        logits_BTV: Any = model.apply({"params": params}, examples.inputs_BT, train=True, rngs={"dropout": dropout_key})
        return objectives.weighted_mean(objectives.cross_entropy(logits_BTV, examples.targets_BT), examples.weights_BT)

    def train_step(state: TrainState, tokens_BW: Int[Array, "B W"]) -> tuple[TrainState, dict[str, Array]]:
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens_BW, dropout_key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return train_step


def init_state(model: gpt2.Model, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    params = gpt2.init(model, jax.random.key(seed))
    return TrainState(jnp.int32(0), params, tx.init(params))


def train(config: Config, model: gpt2.Model, tokens: Path, run: Path) -> TrainState:
    """Trains for `config.train.steps` steps on the token shards in `tokens`, going on from the newest checkpoint in `run`.

    Writes metrics.jsonl and checkpoints/ in `run`; returns the final state.

    Raises:
      InputError: too little text, a mesh that does not fit, or a damaged shard or checkpoint.
    """
    c = config.train
    mesh = sharding.make_mesh(config.mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if c.batch_size % rows:
        raise InputError(
            "train.batch_size", c.batch_size, f"not a multiple of the {rows} devices along data and fsdp", "Choose a multiple, or another mesh"
        )
    manifest = read_manifest(tokens)
    batches = Batches(open_tokens(tokens, "train"), context_len=config.model.context_len, batch_size=c.batch_size, seed=c.seed)
    windows = validation_windows(open_tokens(tokens, "val"), config.model.context_len)
    bits_per_nat = manifest.splits["val"].tokens / manifest.splits["val"].bytes / jnp.log(2.0).item()  # nats/token -> bits/byte

    tx = optim.optimizer(config.optim, c.steps, width_multiplier=config.model.width_multiplier)
    schedule = optim.schedule(config.optim, c.steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.sharding.set_mesh(mesh))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(run / "checkpoints", keep=c.keep_checkpoints))
        shapes = jax.eval_shape(lambda: init_state(model, tx, c.seed))
        shardings = sharding.shardings(mesh, shapes)
        done = max(checkpoint.steps_in(run / "checkpoints"), default=0)
        if done:
            abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
            params, progress = checkpoints.restore(done, abstract.params, {"step": abstract.step, "opt_state": abstract.opt_state})
            state = TrainState(progress["step"], params, progress["opt_state"])
        else:
            state = jax.jit(lambda: init_state(model, tx, c.seed), out_shardings=shardings)()
        train_step = jax.jit(make_train_step(model, tx, c.seed), out_shardings=(shardings, None), donate_argnums=0)
        eval_step = make_eval_step(model)

        n_params = gpt2.n_params(shapes.params)
        peak = metrics.peak_flops(jax.devices()[0].device_kind)
        flops = metrics.flops_per_token(config.model, n_params)
        shape = (c.batch_size, config.model.context_len + 1)
        history = None
        if jax.process_index() == 0:  # one process writes
            history = stack.enter_context(contextlib.closing(metrics.MetricsFile(run / "metrics.jsonl", resume_at=done)))
        progress_line = metrics.Progress(c.steps, done)
        progress_line.note(
            f"{n_params:,} parameters on {mesh.size} x {jax.devices()[0].device_kind}; " + (f"going on from step {done}" if done else "from scratch")
        )

        def write(step: int, measured: dict[str, Array], seconds: float) -> None:
            """Waits for the figures of `step` (the device is then a step ahead) and writes them down."""
            row = {"step": step, **{name: float(value) for name, value in measured.items()}, "lr": float(jnp.asarray(schedule(step - 1)))}
            row["tokens_per_s"] = round(c.batch_size * config.model.context_len / seconds, 1)
            if peak:
                row["mfu"] = row["tokens_per_s"] * flops / (peak * mesh.size)
            if history:
                history.write(row)
            mfu = f"  MFU {row['mfu']:.1%}" if peak else ""
            progress_line.show(step, f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s{mfu}")

        pending: tuple[int, dict[str, Array]] | None = None
        clock = time.monotonic()
        for step in range(done + 1, c.steps + 1):
            batch = sharding.put_rows(lambda start, stop, s=step - 1: batches.rows(s, start, stop), shape, jnp.int32, mesh)
            state, measured = train_step(state, batch)
            if pending:
                jax.block_until_ready(pending[1])
                now = time.monotonic()
                write(*pending, now - clock)
                clock = now
            pending = (step, measured)

            last = step == c.steps
            validate = last or bool(c.eval_every and step % c.eval_every == 0)
            save = last or bool(c.save_every and step % c.save_every == 0)
            if validate or save:  # the step's own row comes before what follows from it
                jax.block_until_ready(measured)
                write(*pending, time.monotonic() - clock)
                pending = None
            if validate:
                loss, _ = mean_loss(eval_step, state.params, windows, mesh, batch_size=c.batch_size, at_most=c.eval_windows)
                if history:
                    history.write({"step": step, "val_loss": loss, "val_bits_per_byte": loss * bits_per_nat})
                progress_line.note(f"step {step}: validation loss {loss:.4f} nats/token, {loss * bits_per_nat:.4f} bits/byte")
            if save:
                checkpoints.save(step, state.params, {"step": state.step, "opt_state": state.opt_state})
            if validate or save:
                clock = time.monotonic()
    return state
