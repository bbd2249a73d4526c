"""Attention: the reference that every faster kernel must equal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_TS: Bool[Array, "T S"],
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention: each query's mean of the values it sees, weighted by exp(q k / sqrt(H)); scores and softmax in float32.

    The normaliser is per query row, over visible keys only. `dropout` zeroes that share of the probabilities where a key is given.

    Source: Vaswani et al. 2017, equation 1.
    """
    H = q_BTNH.shape[-1]
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH * H**-0.5, k_BSKH, preferred_element_type=jnp.float32)
    scores_BNTS = jnp.where(visible_TS[None, None], scores_BNTS, -jnp.inf)
    probs_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    if dropout_key is not None and dropout > 0:
        keep_BNTS = jax.random.bernoulli(dropout_key, 1 - dropout, probs_BNTS.shape)
        probs_BNTS = jnp.where(keep_BNTS, probs_BNTS / (1 - dropout), 0)
    return jnp.einsum("BNTS,BSNH->BTNH", probs_BNTS.astype(v_BSKH.dtype), v_BSKH)
