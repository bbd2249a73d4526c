"""Training: the state, the step, and the loop."""

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mlm_jax import checkpoint, chips, distributed, guard, history, metrics, objectives, observe, optim, sharding, watch
from mlm_jax.config import Config, TrainConfig
from mlm_jax.data.batches import training_batches, validation_windows
from mlm_jax.data.shards import read_manifest
from mlm_jax.data.tokens import open_tokens
from mlm_jax.evaluate import make_eval_step, mean_loss
from mlm_jax.model import gpt2
from mlm_jax.stopping import Requests, Stopped
from mlm_jax.storage import Place


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]  # steps done, skipped ones included
    params: Any
    opt_state: Any
    recent: guard.Recent
    average: Any = None  # of the parameters, where `optim.ema_decay` asks for it


def make_train_step(
    model: gpt2.Model,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    *,
    ema_decay: float = 0.0,
    documents: objectives.Documents | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, tokens_BW) -> (next state, metrics); dropout is drawn from (seed, step) alone.

    `tokens_BW` are as `Batches` gives them, and `documents` is what the model is told of documents.
    """

    def loss_fn(params: Any, examples: objectives.Examples, n_targets: Array, key: Array) -> tuple[Array, Array]:
        """This part's share of the objective and of the reported loss, both means over all targets of the step."""
        sums = objectives.model_losses(model, params, examples, config, documents, train=True, rngs={"dropout": key})
        return sums.objective / n_targets, sums.nats / n_targets

    def loss_and_gradient(params: Any, tokens_BW: Int[Array, "B W"], key: Array) -> tuple[Array, Any]:
        examples = objectives.causal(tokens_BW)
        n_targets = jnp.maximum(examples.weights_BT.sum(), 1)
        gradient_fn, k = jax.value_and_grad(loss_fn, has_aux=True), config.micro_batches_of(tokens_BW.shape[0])
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
        figures = {"loss": loss, "grad_norm": grad_norm, "skipped": ~good, "skipped_in_row": recent.in_row, "skipped_in_all": recent.skipped}
        params, opt_state, average = taken
        return TrainState(state.step + 1, params, opt_state, recent, average), figures

    return train_step


def init_state(model: gpt2.Model, tx: optax.GradientTransformation, seed: int, *, ema_decay: float = 0.0) -> TrainState:
    """The state before the first step."""
    params = gpt2.init(model, jax.random.key(seed))
    return TrainState(jnp.int32(0), params, tx.init(params), guard.start(), params if ema_decay else None)


def _build(
    config: Config, model: gpt2.Model, documents: objectives.Documents | None = None
) -> tuple[Callable[[], TrainState], Callable[..., tuple[TrainState, dict[str, Array]]]]:
    """`init_state` and `make_train_step` of a configuration."""
    tx = optim.optimizer(config.optim, config.train.steps, width_multiplier=config.model.width_multiplier)
    averaged = {"ema_decay": config.optim.ema_decay}
    step = make_train_step(model, tx, config.train, **averaged, documents=documents)
    return functools.partial(init_state, model, tx, config.train.seed, **averaged), step


def abstract_state(config: Config, model: gpt2.Model, mesh: jax.sharding.Mesh) -> TrainState:
    """The shapes, types and shardings of the state on `mesh`; nothing is computed."""
    shapes = jax.eval_shape(_build(config, model)[0])
    shardings = sharding.shardings(mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def first_state(config: Config, model: gpt2.Model, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step, on `mesh`, which is the one in use."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, mesh))
    return jax.jit(_build(config, model)[0], out_shardings=shardings)()


def trace_step(
    config: Config, model: gpt2.Model, mesh: jax.sharding.Mesh, batch_size: int, documents: objectives.Documents | None = None
) -> jax.stages.Traced:
    """The step for `batch_size` windows on `mesh`, which is the one in use, as a jaxpr; it writes the new state over the old one."""
    state = abstract_state(config, model, mesh)
    tokens_BW = sharding.rows_shape((batch_size, config.model.context_len + 1), jnp.int32, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(_build(config, model, documents)[1], out_shardings=(shardings, None), donate_argnums=0).trace(state, tokens_BW)


def lower_step(
    config: Config, model: gpt2.Model, mesh: jax.sharding.Mesh, batch_size: int, documents: objectives.Documents | None = None
) -> jax.stages.Lowered:
    """`trace_step`, ready to be compiled."""
    return trace_step(config, model, mesh, batch_size, documents).lower()


def progress(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of the state beside the parameters."""
    return {name: value for name, value in state._asdict().items() if name != "params" and value is not None}


class Diverged(RuntimeError):
    """Step after step had to be skipped."""


AHEAD = 2  # batches that are on the devices before their step is


def shown(starts: list[Any]) -> str:
    """The first few of them."""
    return ", ".join(map(str, starts[:8])) + (", ..." if starts[8:] else "")


def train(
    config: Config,
    model: gpt2.Model,
    tokens: Place,
    run: Path,
    *,
    home: Place | None = None,
    origin: Place | None = None,
    about: Mapping[str, Any] | None = None,
    begin: Callable[[int], Mapping[str, Any]] = lambda step: {},
    before_save: Callable[[], None] = lambda: None,
    profile: observe.Profile | None = None,
    wandb: str = "",
) -> TrainState:
    """Trains for `config.train.steps` steps on the token shards in `tokens`, going on from the newest whole checkpoint in `home`, which is
    `run` where it is not given, or else from `origin`. Each checkpoint holds what `about` says of the run.

    Where all is ready for the first step, and nothing can be refused any more, one process calls `begin` with the steps that are done; what it
    returns is part of the history. Each process calls `before_save` before a checkpoint, when the rows up to its step are written.

    Writes checkpoints/ in `home`; metrics.jsonl, history.jsonl, tensorboard/ and, of the steps of `profile`, a trace into profile/ in `run`; and the
    same figures to the Weights & Biases project `wandb`. Returns the final state.

    Raises:
      InputError: too little text, a mesh that does not fit, or a damaged shard or checkpoint.
      NotReached: the tokens are in a bucket that cannot be read.
      Diverged: too many steps in a row had to be skipped.
      Stopped: a signal asked for it, in one of the processes.

    Where a step takes longer than `config.train.step_timeout`, or another process is gone, the watchdog ends this process, with status 76.
    """
    c, T, home = config.train, config.model.context_len, run if home is None else home
    mesh = sharding.make_mesh(config.mesh)
    check_batches(mesh, config)
    manifest = read_manifest(tokens)
    batches, windows = training_batches(config, tokens), validation_windows(open_tokens(tokens, "val"), T)
    documents = objectives.documents_of(config.data, manifest.eot_id)
    val = manifest.splits["val"]
    bits_per_nat = (val.tokens - val.prompt_tokens) / val.bytes / math.log(2)  # nats/token -> bits/byte

    clock = observe.Clock()
    with contextlib.ExitStack() as stack:
        requests, watchdog = stack.enter_context(Requests()), stack.enter_context(watch.Watchdog(c.step_timeout))

        # The state: new, or that of the newest checkpoint.
        stack.enter_context(jax.sharding.set_mesh(mesh))
        compiled_before = observe.compilation()
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(home / "checkpoints", keep=c.keep_checkpoints, keep_every=c.keep_every, keep_best=c.keep_best, about=about)
        )
        abstract = abstract_state(config, model, mesh)
        done = checkpoints.newest or 0
        if folder := home / "checkpoints" / str(done) if done else origin:
            params, rest = checkpoint.restore(folder, abstract.params, progress(abstract))
            state, done = TrainState(params=params, **rest), int(rest["step"])
        else:
            state = first_state(config, model, mesh)

        clock.lap("restoring" if done else "initialising")

        # The step, compiled for every batch size that is to come, and where its figures go.
        sizes = sorted({c.batch_size_at(step) for step in range(done, c.steps)})
        train_steps = {B: lower_step(config, model, mesh, B, documents).compile() for B in sizes}
        eval_step = make_eval_step(model, c, documents)
        lrs = jax.device_get(jax.jit(jax.vmap(optim.schedule(config.optim, c.steps)))(jnp.arange(c.steps)))
        compiled = observe.compilation().since(compiled_before)
        extra: dict[str, Any] = compiled._asdict()  # what else the first row holds
        n_params, device = gpt2.n_params(abstract.params), jax.devices()[0].device_kind
        flops, peak = metrics.flops_per_token(config.model, n_params), chips.peak_flops(device)

        past = history.History(run / "history.jsonl")

        def record() -> metrics.Recorder:
            facts = begin(done)
            recorder = metrics.Recorder(run, config, resume_at=done, wandb=wandb)
            past.start(done, lost_s=recorder.lost_s, device=f"{mesh.size} x {device}", processes=jax.process_count(), **facts)
            return recorder

        # One process writes; where it cannot, none begins.
        recorder = distributed.together(lambda: record() if distributed.leads() else None)
        line = metrics.Progress(c.steps, done) if recorder else None
        if recorder:
            stack.enter_context(recorder)

        def say(words: str) -> None:
            if line:
                line.note(words)

        say(f"{n_params:,} parameters on {mesh.size} x {device}; {f'going on from step {done}' if done else 'from scratch'}")
        if config.data.mixture or config.data.packing != "concat":
            for share in batches.shares(c.steps):
                say(str(share))
        say(str(compiled) + "".join(f"; a step needs {observe.need(train_steps[B])}" for B in list(train_steps)[-1:]))

        def write(given: observe.Dispatched) -> bool:
            """Waits for a step (the devices have the next one by then) and writes its figures down; returns whether they are finite."""
            nonlocal extra
            step, times, found = given.step, clock.step(given), jax.device_get(given.figures)
            watchdog.beat(step)
            B, skipped, n_skipped = c.batch_size_at(step - 1), bool(found["skipped"]), int(found["skipped_in_all"])
            row = {"step": step, "loss": float(found["loss"]), "grad_norm": float(found["grad_norm"])}
            row["lr"] = float(lrs[step - 1 - (n_skipped - skipped)])  # a skipped step does not count for the schedule
            speed = round(B * T / times["step_s"], 1)
            row |= {"batch_size": B} if c.ramp_from else {}
            row |= {"tokens_per_s": speed, "tokens_per_s_per_device": round(speed / mesh.size, 1), **times, **observe.memory()}
            row |= {"mfu": speed * flops / (peak * mesh.size)} if peak else {}
            row |= extra
            extra = {}
            what = f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            row |= {"n_skipped": n_skipped} if n_skipped else {}
            if skipped:
                row["skipped"] = batches.starts(step - 1, 0, B)
                say(f"step {step}: skipped, {what}; its batch begins at training tokens {shown(row['skipped'])}")
            if recorder:
                recorder.write(row)
            if found["skipped_in_row"] >= c.max_skips:
                remedy = "Lower optim.peak_lr, look at the data, or raise train.max_skips"
                raise Diverged(f"{found['skipped_in_row']} steps in a row were skipped, the last is {step}: {what}. {remedy}")
            if line:
                each = f" ({speed / mesh.size:,.0f} a device)" if mesh.size > 1 else ""
                mfu = f"  MFU {row['mfu']:.1%}" if peak else ""
                line.show(step, f"loss {row['loss']:.4f}  {speed:,.0f} tokens/s{each}{mfu}")
            return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])

        # The loop. One thread puts batches on the devices ahead of their steps, another sees when a step is done; the loop writes the figures of a
        # step while the devices are at the next.
        reader, watcher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        for pool in (reader, watcher):
            stack.callback(pool.shutdown, cancel_futures=True)

        def read(step: int) -> Any:
            rows = functools.partial(batches.rows, step - 1)
            return reader.submit(sharding.put_rows, rows, (c.batch_size_at(step - 1), T + 1), jnp.int32, mesh)

        trace = stack.enter_context(contextlib.ExitStack())
        ahead = collections.deque(read(step) for step in range(done + 1, min(done + AHEAD, c.steps) + 1))
        given: observe.Dispatched | None = None
        clock.lap("compiling")
        for step in range(done + 1, c.steps + 1):
            if profile and step == profile.first:
                trace.enter_context(jax.profiler.trace(run / "profile"))
            watchdog.begin(step)
            stop = distributed.stops_after(step, requests.asked)
            asked = time.monotonic()
            batch = ahead.popleft().result()
            at = time.monotonic()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, figures = train_steps[len(batch)](state, batch)
            before, given = given, observe.Dispatched(step, figures, at, watcher.submit(observe.finish_time, figures), data_s=at - asked)
            if step + AHEAD <= c.steps:
                ahead.append(read(step + AHEAD))
            if before:
                write(before)

            last = step == c.steps
            validate = last or bool(c.eval_every and step % c.eval_every == 0)
            save = last or stop or bool(c.save_every and step % c.save_every == 0)
            if not (validate or save or c.debug or (profile and step in (profile.first - 1, profile.last))):
                continue
            finite, given = write(given), None  # the step's own row comes before what follows from it
            if c.debug and not finite:  # the step changed nothing
                first = guard.first_not_finite(model, state.params, batches(step - 1), documents)
                say(f"step {step}: the first that is not finite is {first or 'not met without dropout and what is added to the loss'}")
            if profile and step == profile.last:
                trace.close()
                say(f"step {step}: the trace of steps {profile.first} to {step} is in {run / 'profile'}")
            if c.debug or profile:
                clock.lap("looking")
            loss = None
            if validate:
                loss, *averaged = (
                    mean_loss(eval_step, params, windows, mesh, batch_size=c.batch_size // c.micro_batches, at_most=c.eval_windows)[0]
                    for params in (state.params, state.average)
                    if params is not None
                )
                row = {"step": step, "val_loss": loss, "val_bits_per_byte": loss * bits_per_nat, "eval_s": round(clock.lap("validation"), 6)}
                if recorder:
                    recorder.write(row | ({"val_loss_ema": averaged[0]} if averaged else {}))
                also = "".join(f"; of the averaged weights {x:.4f}" for x in averaged)
                say(f"step {step}: validation loss {loss:.4f} nats/token, {loss * bits_per_nat:.4f} bits/byte{also}")
            if save:
                if recorder:
                    recorder.flush()
                before_save()
                checkpoints.save(step, state.params, progress(state), val_loss=loss)
                save_s = clock.lap("saving")
                if recorder:
                    recorder.write({"step": step, "save_s": round(save_s, 6)})
                    past.spent(step, clock.seconds)
                if stop and not last:
                    raise Stopped(step)
        n_skipped = int(state.recent.skipped)
        if recorder and (found := history.goodput(history.read_history(run), metrics.read_metrics(run / "metrics.jsonl"))):
            recorder.write({"step": c.steps, "goodput": round(found.share, 6)})
            say(f"goodput {found}")
        say(f"trained {c.steps - done} steps in {clock}" + (f"; {n_skipped} of {c.steps} steps were skipped" if n_skipped else ""))
        if distributed.any_of(requests.asked):  # in the last step, or after it
            raise Stopped(c.steps)
    return state


def check_batches(mesh: jax.sharding.Mesh, config: Config) -> None:
    """Raises InputError where the mesh cannot share out a batch evenly, at every size that it has on its way."""
    c = config.train
    for B in c.batch_sizes[::-1]:
        field = "train.batch_size" if c.batch_size == B else "train.ramp_from"
        sharding.check_batch(mesh, B, config.model.context_len, c.micro_batches_of(B), field=field)
