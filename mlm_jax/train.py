"""Training: the state, the step, and the loop."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mlm_jax import checkpoint, guard, metrics, objectives, optim, sharding
from mlm_jax.config import Config, TrainConfig
from mlm_jax.data.batches import Batches, validation_windows
from mlm_jax.data.tokens import open_tokens, read_manifest
from mlm_jax.evaluate import make_eval_step, mean_loss
from mlm_jax.model import gpt2


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]  # steps done, skipped ones included
    params: Any
    opt_state: Any
    recent: guard.Recent
    average: Any = None  # of the parameters, where `optim.ema_decay` asks for it


def make_train_step(
    model: gpt2.Model, tx: optax.GradientTransformation, config: TrainConfig, *, ema_decay: float = 0.0
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, tokens_BW) -> (next state, metrics); dropout is drawn from (seed, step) alone."""
    k = config.micro_batches

    def loss_fn(params: Any, examples: objectives.Examples, n_targets: Array, key: Array) -> tuple[Array, Array]:
        """This part's share of the objective and of the reported loss, both means over all targets of the step."""
        losses = objectives.model_losses(model, params, examples, config, train=True, rngs={"dropout": key})
        objective, loss = ((x_BT * examples.weights_BT).sum() / n_targets for x_BT in losses)
        return objective, loss

    def loss_and_gradient(params: Any, tokens_BW: Int[Array, "B W"], key: Array) -> tuple[Array, Any]:
        examples = objectives.causal(tokens_BW)
        n_targets = jnp.maximum(examples.weights_BT.sum(), 1)
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if k == 1:
            (_, loss), gradient = gradient_fn(params, examples, n_targets, key)
            return loss, gradient

        def add(total: Any, part: Any) -> tuple[Any, None]:
            examples, i = part
            (_, loss), gradient = gradient_fn(params, examples, n_targets, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, (loss, gradient)), None

        def split(x: Array) -> Array:  # part i has rows i, i + k, ...: each device goes on with its own
            return sharding.constrain(x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), ".BT")

        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zero, (jax.tree.map(split, examples), jnp.arange(k)))[0]

    def train_step(state: TrainState, tokens_BW: Int[Array, "B W"]) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, gradient = loss_and_gradient(state.params, tokens_BW, key)
        grad_norm = optax.tree.norm(gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optim.ema(state.average, params, ema_decay, state.step + 1 - state.recent.skipped) if ema_decay else None

        good = guard.is_good(state.recent, loss, grad_norm, config.skip_sigmas)
        recent = guard.remember(state.recent, good, loss, grad_norm)
        taken = jax.tree.map(lambda new, old: jnp.where(good, new, old), (params, opt_state, average), (state.params, state.opt_state, state.average))
        figures = {"loss": loss, "grad_norm": grad_norm, "skipped": ~good, "skipped_in_row": recent.in_row}
        params, opt_state, average = taken
        return TrainState(state.step + 1, params, opt_state, recent, average), figures

    return train_step


def init_state(model: gpt2.Model, tx: optax.GradientTransformation, seed: int, *, ema_decay: float = 0.0) -> TrainState:
    """The state before the first step."""
    params = gpt2.init(model, jax.random.key(seed))
    return TrainState(jnp.int32(0), params, tx.init(params), guard.start(), params if ema_decay else None)


def progress(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of the state beside the parameters."""
    return {name: value for name, value in state._asdict().items() if name != "params" and value is not None}


class Diverged(RuntimeError):
    """Step after step had to be skipped."""


def shown(starts: list[int]) -> str:
    """The first few of them."""
    return ", ".join(map(str, starts[:8])) + (", ..." if starts[8:] else "")


def train(config: Config, model: gpt2.Model, tokens: Path, run: Path) -> TrainState:
    """Trains for `config.train.steps` steps on the token shards in `tokens`, going on from the newest checkpoint in `run`.

    Writes metrics.jsonl and checkpoints/ in `run`; returns the final state.

    Raises:
      InputError: too little text, a mesh that does not fit, or a damaged shard or checkpoint.
      Diverged: too many steps in a row had to be skipped.
    """
    c, ema_decay = config.train, config.optim.ema_decay
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, c.batch_size, config.model.context_len, c.micro_batches)
    manifest = read_manifest(tokens)
    batches = Batches(open_tokens(tokens, "train"), context_len=config.model.context_len, batch_size=c.batch_size, seed=c.seed)
    windows = validation_windows(open_tokens(tokens, "val"), config.model.context_len)
    bits_per_nat = manifest.splits["val"].tokens / manifest.splits["val"].bytes / jnp.log(2.0).item()  # nats/token -> bits/byte

    tx = optim.optimizer(config.optim, c.steps, width_multiplier=config.model.width_multiplier)
    schedule = optim.schedule(config.optim, c.steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.sharding.set_mesh(mesh))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(run / "checkpoints", keep=c.keep_checkpoints))
        shapes = jax.eval_shape(lambda: init_state(model, tx, c.seed, ema_decay=ema_decay))
        shardings = sharding.shardings(mesh, shapes)
        done = max(checkpoint.steps_in(run / "checkpoints"), default=0)
        if done:
            abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
            params, rest = checkpoints.restore(done, abstract.params, progress(abstract))
            state = TrainState(params=params, **rest)
        else:
            state = jax.jit(lambda: init_state(model, tx, c.seed, ema_decay=ema_decay), out_shardings=shardings)()
        train_step = jax.jit(make_train_step(model, tx, c, ema_decay=ema_decay), out_shardings=(shardings, None), donate_argnums=0)
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
            skipped, in_row = bool(measured["skipped"]), int(measured["skipped_in_row"])
            row = {
                "step": step,
                "loss": float(measured["loss"]),
                "grad_norm": float(measured["grad_norm"]),
                "lr": float(jnp.asarray(schedule(step - 1))),
            }
            row["tokens_per_s"] = round(c.batch_size * config.model.context_len / seconds, 1)
            if peak:
                row["mfu"] = row["tokens_per_s"] * flops / (peak * mesh.size)
            what = f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            if skipped:
                row["skipped"] = batches.starts(step - 1, 0, c.batch_size)
                progress_line.note(f"step {step}: skipped, {what}; its batch begins at training tokens {shown(row['skipped'])}")
            if history:
                history.write(row)
            if in_row >= c.max_skips:
                remedy = "Lower optim.peak_lr, look at the data, or raise train.max_skips"
                raise Diverged(f"{in_row} steps in a row were skipped, the last is {step}: {what}. {remedy}")
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
            if c.debug and not (jnp.isfinite(measured["loss"]) & jnp.isfinite(measured["grad_norm"])):  # the step changed nothing
                first = guard.first_not_finite(model, state.params, batches(step - 1))
                progress_line.note(f"step {step}: the first that is not finite is {first or 'seen with dropout alone'}")

            last = step == c.steps
            validate = last or bool(c.eval_every and step % c.eval_every == 0)
            save = last or bool(c.save_every and step % c.save_every == 0)
            if validate or save:  # the step's own row comes before what follows from it
                jax.block_until_ready(measured)
                write(*pending, time.monotonic() - clock)
                pending = None
            if validate:
                loss, *averaged = (
                    mean_loss(eval_step, params, windows, mesh, batch_size=c.batch_size, at_most=c.eval_windows)[0]
                    for params in (state.params, state.average)
                    if params is not None
                )
                if history:
                    history.write(
                        {"step": step, "val_loss": loss, "val_bits_per_byte": loss * bits_per_nat}
                        | ({"val_loss_ema": averaged[0]} if averaged else {})
                    )
                also = "".join(f"; of the averaged weights {x:.4f}" for x in averaged)
                progress_line.note(f"step {step}: validation loss {loss:.4f} nats/token, {loss * bits_per_nat:.4f} bits/byte{also}")
            if save:
                checkpoints.save(step, state.params, progress(state))
            if validate or save:
                clock = time.monotonic()
    return state
