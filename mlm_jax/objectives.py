"""What the model learns to predict: windows of tokens -> inputs, targets and weights, and their loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Examples(NamedTuple):
    """What one training or evaluation step reads."""

    inputs_BT: Int[Array, "B T"]
    targets_BT: Int[Array, "B T"]
    weights_BT: Float[Array, "B T"]  # 0: this target does not count


def causal(tokens_BW: Int[Array, "B W"]) -> Examples:
    """Next-token prediction: each window's first T tokens, and the T that follow them one by one; all count."""
    targets_BT = tokens_BW[:, 1:]
    return Examples(tokens_BW[:, :-1], targets_BT, jnp.ones(targets_BT.shape, jnp.float32))


def cross_entropy(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log p(target) in nats, in float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def weighted_mean(nats_BT: Float[Array, "B T"], weights_BT: Float[Array, "B T"]) -> Float[Array, ""]:
    """The mean over the targets that count, in nats per token."""
    return (nats_BT * weights_BT).sum() / jnp.maximum(weights_BT.sum(), 1)
