"""Attention: the reference that every faster kernel must equal, and the one function that chooses between them."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Visibility:
    """Which keys each query may see: those of its own segment and, where causal, none that come after it."""

    causal: bool = struct.field(pytree_node=False, default=True)
    start: Int[Array, ""] | None = None  # where the first query stands among the keys; None: queries and keys are the same positions
    q_segments_BT: Int[Array, "B T"] | None = None  # None: all is one segment
    k_segments_BS: Int[Array, "B S"] | None = None

    def mask(self, T: int, S: int) -> Bool[Array, "_ T S"] | None:
        """True where a query sees a key; the first axis is 1 where all rows of the batch are alike. None: every query sees every key."""
        parts = []
        if self.causal:
            t_T = jnp.arange(T) + (0 if self.start is None else self.start)
            parts.append((jnp.arange(S)[None, :] <= t_T[:, None])[None])
        if self.q_segments_BT is not None and self.k_segments_BS is not None:
            parts.append(self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :])
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


def attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    *,
    implementation: str = "auto",
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax attention: each query's mean of the values it sees, weighted by exp(scale q k); scale is 1 / sqrt(H) unless given.

    N / K neighbouring query heads share a key and value head. `dropout` zeroes that share of the probabilities where a key is given.
    """
    scale = q_BNTH.shape[-1] ** -0.5 if scale is None else scale
    return reference(q_BNTH, k_BKSH, v_BKSH, visibility, scale=scale, dropout=dropout, dropout_key=dropout_key)


def reference(
    q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B N T H"]:
    """`attention`, written out: scores and softmax in float32, the normaliser per query row over visible keys only.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (shared key and value heads).
    """
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    # Heads come before positions, so that on a CPU the products need no transposed copy of a long cache.
    q_BKGTH = (q_BNTH * scale).reshape(B, K, N // K, T, H)
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    mask_BTS = visibility.mask(T, S)
    if mask_BTS is not None:
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if dropout_key is not None and dropout > 0:
        keep_BKGTS = jax.random.bernoulli(dropout_key, 1 - dropout, probs_BKGTS.shape)
        probs_BKGTS = jnp.where(keep_BKGTS, probs_BKGTS / (1 - dropout), 0)
    return jnp.einsum("BKGTS,BKSH->BKGTH", probs_BKGTS.astype(v_BKSH.dtype), v_BKSH).reshape(B, N, T, H)
