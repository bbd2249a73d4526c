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
from mlm_jax.sharding import constrain, mesh_axes


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


def chunked_losses(
    head: Callable[[Array, Array], Array],
    w_VD: Float[Array, "V D"],
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    *,
    chunks: int,
    **settings: float,
) -> Losses:
    """`losses` of the logits head(w_VD, x_BTD), made for a `chunks`-th of the positions at a time and again in the backward pass.

    Raises:
      InputError: `chunks` does not divide the positions that a device has.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes_B, axes_T = mesh_axes("BT")
    b, t = (1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes) for axes in (axes_B, axes_T))
    B, T = targets_BT.shape
    if T % (t * chunks):
        divisors = ", ".join(str(n) for n in range(1, T // t + 1) if T // t % n == 0)
        raise InputError("train.loss_chunks", chunks, f"does not divide the {T // t} positions of a device", f"Choose from: {divisors}")

    # Each device (Z) has its own copy of the table as far as the compiler can tell. A product with one table for all would end in a sum of its
    # gradient over the devices, once per chunk; so it is gathered once, before the loop, and the gradients are summed once, after it.
    def each(x: Array, *rest: str | tuple[str, ...] | None) -> Array:
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(*rest))

    devices = (*axes_B, *axes_T) or None
    w_VD = constrain(w_VD, "V.")
    w_ZVD = each(jnp.broadcast_to(w_VD, (b * t, *w_VD.shape)), devices, mesh_axes("V")[0] or None)

    def split(x: Array) -> Array:
        """(B, T, ...) -> (chunks, Z, B / b, T / t / chunks, ...); a chunk has every `chunks`-th position, so that none changes its device."""
        x = jnp.moveaxis(x.reshape(b, B // b, t, T // t // chunks, chunks, *x.shape[2:]), (4, 2), (0, 2))
        return each(x.reshape(chunks, b * t, *x.shape[3:]), None, devices)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(w_ZVD: Array, x_ZBTD: Array, targets_ZBT: Array) -> Losses:
        return jax.vmap(lambda w_VD, x_BTD, targets_BT: losses(head(w_VD, x_BTD), targets_BT, **settings))(w_ZVD, x_ZBTD, targets_ZBT)

    _, out = jax.lax.scan(lambda _, xs: (None, chunk(w_ZVD, *xs)), None, (split(x_BTD), split(targets_BT)))

    def join(x: Array) -> Array:
        x = x.reshape(chunks, b, t, B // b, T // t // chunks)
        return constrain(jnp.moveaxis(x, (0, 2), (4, 2)).reshape(B, T), "BT")

    return Losses(*map(join, out))


def model_losses(model: Any, params: Any, examples: Examples, config: TrainConfig, documents: Documents | None = None, **call: Any) -> Losses:
    """The losses of `model`, called on the inputs of `examples` with the arguments `call` and those of `documents`, as `config` defines them.

    Raises:
      InputError: `config.loss_chunks` does not divide the positions that a device has.
    """
    settings = {"z_loss": config.z_loss, "label_smoothing": config.label_smoothing}
    call |= documents.call(examples.inputs_BT) if documents else {}
    if config.loss_chunks == 1:
        return losses(model.apply({"params": params}, examples.inputs_BT, **call), examples.targets_BT, **settings)
    x_BTD = model.apply({"params": params}, examples.inputs_BT, hidden_only=True, **call)

    def head(w_VD: Array, x_BTD: Array) -> Array:
        return model.apply({"params": {model.head_name: w_VD}}, x_BTD, method="head")

    return chunked_losses(head, params[model.head_name], x_BTD, examples.targets_BT, chunks=config.loss_chunks, **settings)


def weighted_mean(nats_BT: Float[Array, "B T"], weights_BT: Float[Array, "B T"]) -> Float[Array, ""]:
    """The mean over the targets that count, in nats per token."""
    return (nats_BT * weights_BT).sum() / jnp.maximum(weights_BT.sum(), 1)
