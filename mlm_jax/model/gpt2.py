"""GPT-2 (Radford et al. 2019) in functional Flax; every shape is in a name.

    B batch   T query position   S key position   W window = T+1   D d_model   F d_ff
    N heads   K key/value heads  H head_dim       V vocabulary     L layers (stacked blocks)

Parameters are a plain nested dict of float32 arrays; those of the blocks are stacked over layers, with a leading L that their names
leave out. `GPT2(config).apply({"params": params}, tokens_BT)` gives logits_BTV. With a "cache" collection (`init_cache`) beside the
parameters, the tokens continue the text whose keys and values the cache holds.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mlm_jax.config import InputError, ModelConfig
from mlm_jax.model.attention import attention
from mlm_jax.sharding import constrain

Params = dict[str, Any]
Model = nn.Module  # whatever is called as GPT2 is: an ablation may bring its own


@struct.dataclass
class Context:
    """What every block is told about the call that it is part of."""

    visible_TS: Bool[Array, "T S"]  # which keys each query may see
    start: Int[Array, ""]  # position of the first query; where the cache is written
    train: bool = struct.field(pytree_node=False, default=False)  # dropout is on


def normal(std: float) -> Callable[..., Array]:
    return nn.initializers.normal(std)


class LayerNorm(nn.Module):
    """Layer normalisation over D in float32, returned in the dtype of its input (Ba et al. 2016)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        D = x_BTD.shape[-1]
        scale_D = self.param("scale_D", nn.initializers.ones, (D,))
        b_D = self.param("b_D", nn.initializers.zeros, (D,))
        x = x_BTD.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.config.norm_eps)
        return (x * scale_D[None, None] + b_D[None, None]).astype(x_BTD.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with its four projections."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        c = self.config
        D, N, H, dtype = c.d_model, c.n_heads, c.head_dim, x_BTD.dtype
        K = N
        init, zeros = normal(c.init_std), nn.initializers.zeros
        w_q_DNH, b_q_NH = self.param("w_q_DNH", init, (D, N, H)), self.param("b_q_NH", zeros, (N, H))
        w_k_DKH, b_k_KH = self.param("w_k_DKH", init, (D, K, H)), self.param("b_k_KH", zeros, (K, H))
        w_v_DKH, b_v_KH = self.param("w_v_DKH", init, (D, K, H)), self.param("b_v_KH", zeros, (K, H))
        w_out_NHD = self.param("w_out_NHD", normal(residual_std(c)), (N, H, D))
        b_out_D = self.param("b_out_D", zeros, (D,))

        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_q_DNH.astype(dtype)) + b_q_NH.astype(dtype)[None, None]
        k_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BTD, w_k_DKH.astype(dtype)) + b_k_KH.astype(dtype)[None, None]
        v_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BTD, w_v_DKH.astype(dtype)) + b_v_KH.astype(dtype)[None, None]
        k_BSKH, v_BSKH = self.remember("k_BSKH", k_BSKH, context), self.remember("v_BSKH", v_BSKH, context)
        key = self.make_rng("dropout") if context.train and c.dropout else None
        mixed_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, context.visible_TS, dropout=c.dropout, dropout_key=key)
        return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, w_out_NHD.astype(dtype)) + b_out_D.astype(dtype)[None, None]

    def remember(self, name: str, new_BTKH: Float[Array, "B T K H"], context: Context) -> Float[Array, "B S K H"]:
        """The keys or values of the whole text so far: the cache with the new ones written in, or the new ones where there is no cache."""
        if not self.has_variable("cache", name):
            return new_BTKH
        past = self.variable("cache", name)
        past.value = jax.lax.dynamic_update_slice_in_dim(past.value, new_BTKH.astype(past.value.dtype), context.start, axis=1)
        return past.value


class Mlp(nn.Module):
    """The position-wise network, with the tanh GELU of GPT-2 (Hendrycks & Gimpel 2016)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        D, F, dtype = c.d_model, c.d_ff, x_BTD.dtype
        w_up_DF = self.param("w_up_DF", normal(c.init_std), (D, F))
        b_up_F = self.param("b_up_F", nn.initializers.zeros, (F,))
        w_down_FD = self.param("w_down_FD", normal(residual_std(c)), (F, D))
        b_down_D = self.param("b_down_D", nn.initializers.zeros, (D,))
        h_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, w_up_DF.astype(dtype)) + b_up_F.astype(dtype)[None, None]
        h_BTF = jax.nn.gelu(h_BTF, approximate=True)
        return jnp.einsum("BTF,FD->BTD", h_BTF, w_down_FD.astype(dtype)) + b_down_D.astype(dtype)[None, None]


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the MLP, each added to the residual stream."""

    config: ModelConfig

    def setup(self) -> None:
        self.norm_1, self.attention = LayerNorm(self.config), Attention(self.config)
        self.norm_2, self.mlp = LayerNorm(self.config), Mlp(self.config)
        self.dropout = nn.Dropout(self.config.dropout)

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        x_BTD = x_BTD + self.dropout(self.attention(self.norm_1(x_BTD), context), deterministic=not context.train)
        x_BTD = x_BTD + self.dropout(self.mlp(self.norm_2(x_BTD)), deterministic=not context.train)
        return constrain(x_BTD, "BTD")


class GPT2(nn.Module):
    """The language model: tokens to logits. An ablation of structure passes its own `block`."""

    config: ModelConfig
    block: Callable[..., nn.Module] = Block
    stacked: bool = True  # False: parameters as `unstack` gives them, one block after the other, for decoding

    @nn.compact
    def __call__(self, tokens_BT: Int[Array, "B T"], *, start: Any = 0, train: bool = False) -> Float[Array, "B T V"]:
        """Logits, float32, of the token after each position.

        `start` is the position of the first token, for a call that continues a cache. `train=True` turns dropout on and needs
        rngs={"dropout": key}.

        Raises:
          InputError: more positions than the model can embed.
        """
        c = self.config
        T = tokens_BT.shape[1]
        if c.context_len < T:
            raise InputError("tokens", f"{T} positions", f"model.context_len = {c.context_len} is the most this model can embed", "Shorten the text")
        dtype = jnp.dtype(c.compute_dtype)
        w_token_VD = self.param("w_token_VD", normal(c.init_std), (c.vocab_size, c.d_model))
        w_position_TD = self.param("w_position_TD", normal(c.init_std / 2), (c.context_len, c.d_model))
        start = jnp.asarray(start, jnp.int32)
        position_TD = jax.lax.dynamic_slice_in_dim(w_position_TD, start, T)
        x_BTD = constrain(w_token_VD, "V.")[tokens_BT] + position_TD[None]
        x_BTD = constrain(x_BTD.astype(dtype), "BTD")
        x_BTD = nn.Dropout(c.dropout)(x_BTD, deterministic=not train)

        S = self.cache_len() or T
        visible_TS = jnp.arange(S)[None, :] <= start + jnp.arange(T)[:, None]
        context = Context(visible_TS=visible_TS, start=start, train=train)
        if self.stacked:
            scan = nn.scan(
                lambda block, x, context: (block(x, context), None),
                variable_axes={"params": 0, "cache": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=c.n_layers,
                unroll=c.n_layers if c.unroll_layers else 1,
            )
            x_BTD, _ = scan(self.block(c, name="blocks"), x_BTD, context)
        else:
            for layer in range(c.n_layers):
                x_BTD = self.block(c, name=f"block_{layer}")(x_BTD, context)
        x_BTD = LayerNorm(c, name="norm_f")(x_BTD)
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_token_VD.astype(dtype), preferred_element_type=jnp.float32)
        return constrain(logits_BTV, "BTV")

    def cache_len(self) -> int:
        """S of the cache in use; 0 without one."""
        leaves = jax.tree.leaves(self.variables.get("cache", {}))
        return leaves[0].shape[-3] if leaves else 0


def residual_std(config: ModelConfig) -> float:
    """Initial standard deviation of the projections into the residual stream: init_std / sqrt(2 L).

    Source: Radford et al. 2019, section 2.3 (two residual layers in a block).
    """
    return config.init_std / (2 * config.n_layers) ** 0.5


def init(model: Model, key: jax.Array) -> Params:
    """New parameters of `model`, float32, with GPT-2's initialisation: N(0, init_std), positions half of it, biases 0, gains 1.

    Source: openai/gpt-2, src/model.py (0.02 and 0.01).
    """
    return dict(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def n_params(params: Any) -> int:
    """Number of parameters, the tied head counted once."""
    return sum(x.size for x in jax.tree.leaves(params))


def unstack(params: Params) -> Params:
    """The parameters with one dict per block, for `GPT2(..., stacked=False)`."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    L = jax.tree.leaves(params["blocks"])[0].shape[0]
    return rest | {f"block_{layer}": jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"]) for layer in range(L)}


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Params:
    """An empty key/value cache for `length` positions, in the compute type, for `GPT2(..., stacked=False)`."""
    shape = (batch_size, length, config.n_heads, config.head_dim)
    zeros = {"attention": {name: jnp.zeros(shape, config.compute_dtype) for name in ("k_BSKH", "v_BSKH")}}
    return {f"block_{layer}": jax.tree.map(jnp.copy, zeros) for layer in range(config.n_layers)}
