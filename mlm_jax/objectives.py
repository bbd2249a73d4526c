"""What the model learns to predict: windows of tokens -> inputs, targets and weights, and their loss."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mlm_jax.config import DataConfig, InputError, TrainConfig
from mlm_jax.sharding import constrain, gather, mesh_axes


class Examples(NamedTuple):
    """What one training or evaluation step reads."""

    inputs_BT: Int[Array, "B T"]
    targets_BT: Int[Array, "B T"]
    weights_BT: Float[Array, "B T"]  # 0: this target does not count


def causal(tokens_BW: Int[Array, "B W"]) -> Examples:
    """Next-token prediction: each window's first T tokens, and the T that follow them one by one.

    A token that is given as its complement ~id, which is negative, does not count as a target; the others do.
    """
    learned_BW = tokens_BW >= 0
    ids_BW = jnp.where(learned_BW, tokens_BW, ~tokens_BW)
    return Examples(ids_BW[:, :-1], ids_BW[:, 1:], learned_BW[:, 1:].astype(jnp.float32))


class Documents(NamedTuple):
    """What the model is told of where documents begin: at each `<|endoftext|>`, and at the start of a row."""

    eot_id: int
    attention: bool  # no token sees another document
    positions: bool  # they count from the start of the document

    def call(self, inputs_BT: Int[Array, "B T"]) -> dict[str, Int[Array, "B T"]]:
        """The arguments `segments_BT` and `positions_BT` of a call of the model on these tokens, as far as they are asked for."""
        starts_BT, found = constrain(inputs_BT, "BT") == self.eot_id, {}
        if self.attention:
            found["segments_BT"] = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
        if self.positions:
            t_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1], dtype=jnp.int32), inputs_BT.shape)
            found["positions_BT"] = t_BT - jax.lax.cummax(jnp.where(starts_BT, t_BT, 0), axis=1)
        return {name: constrain(x_BT, "BT") for name, x_BT in found.items()}


def documents_of(config: DataConfig, eot_id: int) -> Documents | None:
    """What `config` asks to tell the model of documents; None: nothing."""
    asked = config.reset_attention or config.reset_positions
    return Documents(eot_id, config.reset_attention, config.reset_positions) if asked else None


class Losses(NamedTuple):
    """The cost of each target, in nats."""

    objective_BT: Float[Array, "... T"]  # what training makes small
    nats_BT: Float[Array, "... T"]  # the cross-entropy, which is reported; the same where nothing is added to it


def cross_entropy(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log p(target) in nats, in float32."""
    return losses(logits_BTV, targets_BT).nats_BT


def losses(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Losses:
    """The cross-entropy and, in float32, what training makes of it: the target mixed with all of the vocabulary, and z_loss (log Z)^2 added.

    Logits of -inf, the padding of the vocabulary, are not part of it.

    Source: Szegedy et al. 2016, section 7 (label smoothing); Chowdhery et al. 2022 (PaLM), section 5, and de Brebisson & Vincent 2016 (z-loss).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    objective_BT = nats_BT = log_z_BT - chosen_BT
    if label_smoothing:
        mean_BT = jnp.mean(logits_BTV, axis=-1, where=logits_BTV > -jnp.inf)
        objective_BT = (1 - label_smoothing) * nats_BT + label_smoothing * (log_z_BT - mean_BT)
    if z_loss:
        objective_BT = objective_BT + z_loss * jnp.square(log_z_BT)
    return Losses(objective_BT, nats_BT)


class Sums(NamedTuple):
    """What the targets that count cost together, in nats: `Losses` times their weights."""

    objective: Float[Array, ""]
    nats: Float[Array, ""]


def weighted(found: Losses, weights_BT: Float[Array, "... T"]) -> Sums:
    """The sums of `found`; the second, which is reported, has no gradient."""
    return Sums((found.objective_BT * weights_BT).sum(), jax.lax.stop_gradient((found.nats_BT * weights_BT).sum()))


def chunked_losses(
    head: Callable[[Any, Array], Array],
    w_VD: Float[Array, "V D"],
    x_BTD: Float[Array, "B T D"],
    examples: Examples,
    *,
    chunks: int,
    **settings: float,
) -> Sums:
    """`weighted` `losses` of the logits head(w_VD, x_BTD), which are made for a `chunks`-th of the positions at a time, and once alone.

    The gradient of a chunk is computed while its logits are there, so that the backward pass has only to multiply it by that of the sum.

    Raises:
      InputError: `chunks` does not divide the positions that a device has.

    Source: Hsu et al. 2024 (Liger Kernel), section 3.2 (FusedLinearCrossEntropy).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes_B, axes_T = mesh_axes("BT")
    b, t = (1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes) for axes in (axes_B, axes_T))
    B, T = examples.targets_BT.shape
    if T % (t * chunks):
        divisors = ", ".join(str(n) for n in range(1, T // t + 1) if T // t % n == 0)
        raise InputError("train.loss_chunks", chunks, f"does not divide the {T // t} positions of a device", f"Choose from: {divisors}")

    def split(x: Array) -> Array:
        """(B, T, ...) -> (chunks, B t, T / t / chunks, ...): rows in the order of the devices, of which each goes on with its own positions."""
        x = jnp.moveaxis(x.reshape(b, B // b, t, T // t // chunks, chunks, *x.shape[2:]), (4, 2), (0, 2))
        x = x.reshape(chunks, B * t, T // t // chunks, *x.shape[5:])
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(None, (*axes_B, *axes_T) or None))

    def cost(w: Any, x_BTD: Array, targets_BT: Array) -> Losses:
        return losses(head(w, x_BTD), targets_BT, **settings)

    # The table is gathered once, before the loop, and its gradients are summed over the devices once, after it.
    w = gather(w_VD.astype(x_BTD.dtype), "VD", over="BT")
    return _chunked(cost, w, split(x_BTD), split(examples.targets_BT), split(examples.weights_BT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(cost: Callable[..., Losses], w: Any, x: Array, targets: Array, weights: Array) -> Sums:
    """The `weighted` sums of `cost` over the first axis of all but `w`."""
    _, found = jax.lax.scan(lambda _, chunk: (None, cost(w, *chunk)), None, (x, targets))
    return weighted(found, weights)


def _chunked_forward(cost: Callable[..., Losses], w: Any, x: Array, targets: Array, weights: Array) -> tuple[Sums, tuple[Any, Array]]:
    """Also the gradients of the first sum to `w` and `x`."""

    def add(total: Any, chunk: tuple[Array, Array, Array]) -> tuple[Any, tuple[Losses, Array]]:
        x, targets, weights = chunk
        found, backward = jax.vjp(lambda w, x: cost(w, x, targets), w, x)
        dw, dx = backward(Losses(weights, jnp.zeros_like(weights)))
        return jax.tree.map(lambda total, g: total + g.astype(total.dtype), total, dw), (found, dx)

    zero = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), w)  # a sum of many bfloat16 numbers would lose the small ones
    dw, (found, dx) = jax.lax.scan(add, zero, (x, targets, weights))
    return weighted(found, weights), (jax.tree.map(lambda g, w: g.astype(w.dtype), dw, w), dx)


def _chunked_backward(cost: Callable[..., Losses], kept: tuple[Any, Array], given: Sums) -> tuple[Any, ...]:
    dw, dx = jax.tree.map(lambda g: g * given.objective.astype(g.dtype), kept)
    return dw, dx, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def model_losses(model: Any, params: Any, examples: Examples, config: TrainConfig, documents: Documents | None = None, **call: Any) -> Sums:
    """What `model` costs, called on the inputs of `examples` with the arguments `call` and those of `documents`, as `config` defines it.

    Raises:
      InputError: `config.loss_chunks` does not divide the positions that a device has.
    """
    settings = {"z_loss": config.z_loss, "label_smoothing": config.label_smoothing}
    call |= documents.call(examples.inputs_BT) if documents else {}
    if config.loss_chunks == 1:
        return weighted(losses(model.apply({"params": params}, examples.inputs_BT, **call), examples.targets_BT, **settings), examples.weights_BT)
    x_BTD = model.apply({"params": params}, examples.inputs_BT, hidden_only=True, **call)

    def head(w: Any, x_BTD: Array) -> Array:
        return model.apply({"params": {model.head_name: w}}, x_BTD, method="head")

    return chunked_losses(head, params[model.head_name], x_BTD, examples, chunks=config.loss_chunks, **settings)


def weighted_mean(nats_BT: Float[Array, "B T"], weights_BT: Float[Array, "B T"]) -> Float[Array, ""]:
    """The mean over the targets that count, in nats per token."""
    return (nats_BT * weights_BT).sum() / jnp.maximum(weights_BT.sum(), 1)
