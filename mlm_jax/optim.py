"""Optimizers, schedules and the averaged weights. Names say what is a matrix: layers are treated one by one, heads as one axis."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mlm_jax.config import OptimConfig
from mlm_jax.sharding import axes_of, is_decayed, is_hidden, name_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # KellerJordan/Muon, muon.py: steepest at zero; singular values end between 0.7 and 1.2, not at 1
NEWTON_SCHULZ_STEPS = 5


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: a linear rise to `peak_lr` over `warmup_steps`, then `config.schedule` until `steps`.

    cosine: half a cosine down to `end_lr`; linear: a line down to it; wsd: `peak_lr`, and a line down to `end_lr` over the last `decay_fraction` of
    the steps; inverse_sqrt: `peak_lr` times the root of `warmup_steps` / step, which never ends; constant: `peak_lr`.

    Update number n (from 0) uses the value at n + 1, so that the first update is not idle and the last one reaches `end_lr`.

    Source: Radford et al. 2018, section 4.1 (linear warm-up); Loshchilov & Hutter 2017, equation 5 (cosine); Hu et al. 2024, section 4, and
    Hägele et al. 2024, section 3, with its linear cooldown (wsd); Vaswani et al. 2017, equation 3, scaled to its peak (inverse_sqrt).
    """
    c, after = config, max(steps - config.warmup_steps, 1)
    phases, ends = [optax.linear_schedule(0.0, c.peak_lr, max(c.warmup_steps, 1))], [c.warmup_steps]
    if c.schedule == "cosine":
        phases += [optax.cosine_decay_schedule(c.peak_lr, after, alpha=c.end_lr / c.peak_lr if c.peak_lr else 0.0)]
    elif c.schedule == "linear":
        phases += [optax.linear_schedule(c.peak_lr, c.end_lr, after)]
    elif c.schedule == "inverse_sqrt":
        rise = max(c.warmup_steps, 1)
        phases += [lambda count: c.peak_lr * jnp.sqrt(rise / jnp.maximum(c.warmup_steps + count, rise))]
    else:
        phases += [optax.constant_schedule(c.peak_lr)]
    if c.schedule == "wsd":
        phases += [optax.linear_schedule(c.peak_lr, c.end_lr, c.decay_steps(steps))]
        ends += [steps - c.decay_steps(steps)]
    joined = optax.join_schedules(phases, ends)
    return lambda count: joined(count + 1)


def optimizer(config: OptimConfig, steps: int, *, width_multiplier: float = 1.0) -> optax.GradientTransformation:
    """Clipping by global norm, then the step of `config.name`, with decay on weights alone, times the learning rate.

    adamw: Loshchilov & Hutter 2019, algorithm 2. muP divides Adam's step of hidden weights by `width_multiplier`. adafactor: `scale_by_adafactor`.
    lion: Chen et al. 2023, algorithm 2. muon: `scale_by_muon` for the matrices between activations, AdamW for all else.
    Decoupled decay is scaled by the learning rate for all, as in PyTorch, and in muP is not divided.

    Raises:
      InputError: muP with another optimizer than AdamW.

    Source: Yang et al. 2022, table 8 (hidden weights; Adam's step of all others keeps its size).
    """
    c = config
    c.check_width(width_multiplier)

    def divide(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda u, hidden: u / width_multiplier if hidden else u, updates, is_hidden(updates))

    def by_name(params: Any) -> Any:
        def of(path: tuple, _: Any, hidden: bool) -> str:
            return "muon" if hidden and matrix_axes(name_of(path)) else "adamw"

        return jax.tree_util.tree_map_with_path(of, params, is_hidden(params))

    adam = optax.scale_by_adam(c.b1, c.b2, c.eps)
    scale = {
        "adamw": lambda: adam,
        "adafactor": scale_by_adafactor,
        "lion": lambda: optax.scale_by_lion(c.b1, c.b2),
        "muon": lambda: optax.partition({"muon": scale_by_muon(c.muon_momentum), "adamw": adam}, by_name),
    }[c.name]()
    chain = optax.chain(  # of AdamW, optax.adamw with muP in its middle
        scale if c.moment_dtype == "float32" else held(scale, c.moment_dtype),
        *([optax.stateless(divide)] if width_multiplier != 1 else []),
        optax.add_decayed_weights(c.weight_decay, is_decayed),
        optax.scale_by_learning_rate(schedule(c, steps)),
    )
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), chain) if c.clip_norm else chain


def held(tx: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`tx` with the arrays of its state in `dtype` between steps; a step computes in float32 and rounds to the nearest."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), dtype), update)


def matrix_axes(name: str) -> tuple[str, str] | None:
    """The axes of a weight's input and output: "w_q_DNH" -> ("D", "NH"), "w_out_NHD" -> ("NH", "D"); None of biases, gains and vectors.

    Raises:
      ValueError: the name has more axes than an input and an output; H is part of the N or K before it.
    """
    groups = re.findall("[NK]H|.", axes_of(name))
    if not name.startswith("w_") or len(groups) < 2:
        return None
    if len(groups) > 2:
        raise ValueError(f"{name}: {' x '.join(groups)} is no matrix of an input and an output. Split it, or choose optim.name = adamw or lion.")
    return groups[0], groups[1]


def _stacked(name: str, x: Any) -> int:
    """1 where `x` has an axis of layers before those that its name says, or else 0."""
    return x.ndim - len(axes_of(name))


class MuonState(NamedTuple):
    """What Muon remembers."""

    momentum: Any


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Replaces each layer's matrix by its Nesterov momentum, orthogonalised, times 0.2 sqrt(max(inputs, outputs)): entries as large as AdamW's.

    So one learning rate and one weight decay serve both. All parameters must be matrices.

    Source: github.com/KellerJordan/Muon, muon.py, muon_update (there times sqrt(max(1, outputs / inputs)), which has a learning rate of its own);
    Liu et al. 2025, equation 4 (0.2). optax.contrib.muon divides momentum and gradient by different bias corrections, which Muon has not.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        def mix(m: Array, g: Array) -> Array:
            return momentum * m + (1 - momentum) * g

        def of(path: tuple, m: Array, g: Array) -> Array:
            name, x = name_of(path), mix(m, g)
            inputs, _ = matrix_axes(name) or ("", "")
            first = _stacked(name, x)
            last = first + len(inputs)
            x_LIO = x.reshape(*x.shape[:first], math.prod(x.shape[first:last]), math.prod(x.shape[last:]))
            return (0.2 * max(x_LIO.shape[-2:]) ** 0.5 * orthogonalize(x_LIO)).reshape(x.shape)

        moments = jax.tree.map(mix, state.momentum, updates)
        return jax.tree_util.tree_map_with_path(of, moments, updates), MuonState(moments)

    return optax.GradientTransformation(lambda params: MuonState(jax.tree.map(jnp.zeros_like, params)), update)


def orthogonalize(x: Float[Array, "*L I O"]) -> Float[Array, "*L I O"]:
    """About U V^T of each matrix U S V^T: its singular values, but those near zero, become 0.7 to 1.2.

    Source: github.com/KellerJordan/Muon, muon.py, zeropower_via_newtonschulz5 (there in bfloat16).
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x  # the smaller product is the cheaper
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.swapaxes(-1, -2) if tall else x


class AdafactorState(NamedTuple):
    """Mean squares of gradients: by parameter, {"row_D", "column_NH"} of a matrix and {"square_NH"} of all else. The names place them on a mesh."""

    count: Int[Array, ""]
    squares: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """Divides gradients by the root of a second moment that, of a matrix, is held as row and column means; clips, and scales to the parameter's size.

    The learning rate is thus relative to the root mean square of each layer's parameter. There is no momentum.

    Source: Shazeer & Stern 2018, algorithms 4 and 5, and 6 for the constants: eps1 = 1e-30, eps2 = 1e-3, d = 1, beta2 = 1 - t^-0.8.
    optax.adafactor factors whichever two axes are the longest, layers among them, and clips all layers as one.
    """

    def means(path: tuple, g: Array) -> dict[str, Array]:
        name, square = name_of(path), g * g + 1e-30
        if not (axes := matrix_axes(name)):
            return {f"square_{axes_of(name)}": square}
        inputs, outputs = axes
        first, last = _stacked(name, g), g.ndim - len(outputs)
        rows, columns = square.mean(range(last, g.ndim)), square.mean(range(first, last))
        return {f"row_{inputs}": rows, f"column_{outputs}": columns}

    def second_moment(name: str, squares: dict[str, Array]) -> Array:
        """The mean squares, spread over the parameter's shape."""
        if not (axes := matrix_axes(name)):
            return squares[f"square_{axes_of(name)}"]
        inputs, outputs = axes
        rows, columns = squares[f"row_{inputs}"], squares[f"column_{outputs}"]
        first = _stacked(f"_{inputs}", rows)
        relative = rows / rows.mean(range(first, rows.ndim), keepdims=True)
        return jnp.expand_dims(relative, range(rows.ndim, rows.ndim + len(outputs))) * jnp.expand_dims(columns, range(first, rows.ndim))

    def step(path: tuple, g: Array, squares: dict[str, Array], param: Array) -> Array:
        name = name_of(path)

        def rms(x: Array) -> Array:  # of each layer
            return jnp.sqrt(jnp.mean(x * x, range(_stacked(name, x), x.ndim), keepdims=True))

        u = g / jnp.sqrt(second_moment(name, squares))
        return u / jnp.maximum(1.0, rms(u)) * jnp.maximum(1e-3, rms(param))

    def init(params: Any) -> AdafactorState:
        shapes = jax.eval_shape(lambda: jax.tree_util.tree_map_with_path(means, jax.tree.map(jnp.zeros_like, params)))
        return AdafactorState(jnp.int32(0), jax.tree.map(jnp.zeros_like, shapes))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        b2 = 1 - count.astype(jnp.float32) ** -0.8
        new = jax.tree_util.tree_map_with_path(means, updates)
        squares = jax.tree.map(lambda old, new: b2 * old + (1 - b2) * new, state.squares, new)
        return jax.tree_util.tree_map_with_path(step, updates, squares, params), AdafactorState(count, squares)

    return optax.GradientTransformation(init, update)


def ema(average: Any, params: Any, decay: float, step: Int[Array, ""] | int) -> Any:
    """The exponential moving average of the weights after steps 1 to `step`, from the average after the step before; `decay` is above 0, below 1.

    Bias corrected: the weights of step i count as decay^(step - i), and all counts sum to one. An average that began at the initial weights would
    after 1,000 steps at 0.9999 still be nine tenths random numbers; here step 1 replaces whatever `average` was.

    Source: Kingma & Ba 2015, section 3, solved for the corrected average so that it is always fit for use; Polyak & Juditsky 1992 (averaging).
    """
    share = (1 - decay) / -jnp.expm1(step * math.log(decay))  # 1 - decay^step, exact where decay is near 1
    return jax.tree.map(lambda a, p: a + share * (p - a), average, params)
