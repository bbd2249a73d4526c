"""GPT-2 (Radford et al. 2019) in functional Flax; every shape is in a name.

    B batch   T query position   S key position   W window = T+1   D d_model   F d_ff
    N heads   K key/value heads  H head_dim       V vocabulary     L layers (stacked blocks)

Parameters are a plain nested dict of float32 arrays; those of the blocks are stacked over layers, with a leading L that their names
leave out. `GPT2(config).apply({"params": params}, tokens_BT)` gives logits_BTV. What is not GPT-2 is a field of the configuration, off by
default; a change of structure subclasses a part in the experiment's own file (`experiments/parallel_block.py`).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mlm_jax.config import InputError, ModelConfig
from mlm_jax.model.attention import Visibility, attention
from mlm_jax.model.int8 import einsum
from mlm_jax.sharding import constrain

Params = dict[str, Any]
Model = nn.Module  # whatever is called as GPT2 is: an ablation may bring its own


@struct.dataclass
class Context:
    """What every block is told about the call that it is part of."""

    tokens_BT: Int[Array, "B T"]
    embedded_BTD: Float[Array, "B T D"]  # the residual stream before the first block
    positions_BT: Int[Array, "B T"]  # 0 is the first token of a text
    visibility: Visibility
    cache_len: int = struct.field(pytree_node=False, default=0)  # S of a cache that is made in this call
    train: bool = struct.field(pytree_node=False, default=False)  # dropout is on


def normal(std: float) -> Callable[..., Array]:
    return nn.initializers.normal(std)


def rms(x: Float[Array, "... _"], eps: float) -> Float[Array, "... _"]:
    """`x` over its root mean square along the last axis, float32 (Zhang & Sennrich 2019)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def plus(x: Float[Array, "..."], bias: Array | None) -> Float[Array, "..."]:
    """`x` with a bias added along its last axes, if there is one."""
    return x if bias is None else x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - bias.ndim))


class Norm(nn.Module):
    """Normalisation over D in float32, returned in the dtype of its input: LayerNorm (Ba et al. 2016) or RMSNorm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, D = self.config, x_BTD.shape[-1]
        scale_D = self.param("scale_D", nn.initializers.ones, (D,))
        b_D = self.param("b_D", nn.initializers.zeros, (D,)) if c.norm == "layer" and c.biases else None
        x = x_BTD.astype(jnp.float32)
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        return plus(rms(x, c.norm_eps) * scale_D[None, None], b_D).astype(x_BTD.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with its four projections."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        c = self.config
        D, N, K, H, dtype = c.d_model, c.n_heads, c.n_keys, c.head_dim, x_BTD.dtype
        init = normal(hidden_std(c))
        w_q_DNH, b_q_NH = self.param("w_q_DNH", init, (D, N, H)), self.bias("b_q_NH", (N, H))
        w_k_DKH, b_k_KH = self.param("w_k_DKH", init, (D, K, H)), self.bias("b_k_KH", (K, H))
        w_v_DKH, b_v_KH = self.param("w_v_DKH", init, (D, K, H)), self.bias("b_v_KH", (K, H))
        w_out_NHD, b_out_D = self.param("w_out_NHD", normal(residual_std(c)), (N, H, D)), self.bias("b_out_D", (D,))

        q_BTNH = plus(einsum("BTD,DNH->BTNH", x_BTD, w_q_DNH, matmul=c.matmul), b_q_NH)
        k_BTKH = plus(einsum("BTD,DKH->BTKH", x_BTD, w_k_DKH, matmul=c.matmul), b_k_KH)
        v_BTKH = plus(einsum("BTD,DKH->BTKH", x_BTD, w_v_DKH, matmul=c.matmul), b_v_KH)
        if c.qk_norm:
            q_BTNH = (rms(q_BTNH, c.norm_eps) * self.param("scale_q_H", nn.initializers.ones, (H,))).astype(dtype)
            k_BTKH = (rms(k_BTKH, c.norm_eps) * self.param("scale_k_H", nn.initializers.ones, (H,))).astype(dtype)
        if c.position == "rotary":
            q_BTNH, k_BTKH = rotate(q_BTNH, context.positions_BT, c.rotary_base), rotate(k_BTKH, context.positions_BT, c.rotary_base)
        k_BKSH = self.remember("k_BKSH", k_BTKH.swapaxes(1, 2), context)
        v_BKSH = self.remember("v_BKSH", self.values(v_BTKH, context).swapaxes(1, 2), context)
        mixed_BNTH = attention(
            q_BTNH.swapaxes(1, 2),
            k_BKSH,
            v_BKSH,
            context.visibility,
            implementation=c.attention,
            scale=attention_scale(c),
            dropout=c.dropout,
            dropout_key=self.make_rng("dropout") if context.train and c.dropout else None,
        )
        mixed_BNTH = checkpoint_name(mixed_BNTH, "attention")  # what two policies of `remat` keep
        return plus(einsum("BNTH,NHD->BTD", mixed_BNTH, w_out_NHD, matmul=c.matmul), b_out_D)

    def bias(self, name: str, shape: tuple[int, ...]) -> Array | None:
        return self.param(name, nn.initializers.zeros, shape) if self.config.biases else None

    def values(self, v_BTKH: Float[Array, "B T K H"], context: Context) -> Float[Array, "B T K H"]:
        """The values to mix: a door for ablations."""
        return v_BTKH

    def remember(self, name: str, new_BKTH: Float[Array, "B K T H"], context: Context) -> Float[Array, "B K S H"]:
        """The keys or values of the whole text so far: the cache with the new ones written in, or the new ones where there is no cache."""
        if not (context.cache_len or self.has_variable("cache", name)):
            return new_BKTH
        B, K, _, H = new_BKTH.shape
        past = self.variable("cache", name, jnp.zeros, (B, K, context.cache_len, H), new_BKTH.dtype)
        start = context.visibility.start
        assert start is not None, "a call with a cache says where it starts"
        past.value = jax.lax.dynamic_update_slice_in_dim(past.value, new_BKTH, start, axis=2)
        return past.value


class Mlp(nn.Module):
    """The position-wise network."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        D, F = c.d_model, c.d_ff
        w_up_DF = self.param("w_up_DF", normal(hidden_std(c)), (D, F))
        b_up_F = self.param("b_up_F", nn.initializers.zeros, (F,)) if c.biases else None
        w_down_FD = self.param("w_down_FD", normal(residual_std(c)), (F, D))
        b_down_D = self.param("b_down_D", nn.initializers.zeros, (D,)) if c.biases else None
        h_BTF = plus(einsum("BTD,DF->BTF", x_BTD, w_up_DF, matmul=c.matmul), b_up_F)
        if c.activation == "swiglu":
            w_gate_DF = self.param("w_gate_DF", normal(hidden_std(c)), (D, F))
            h_BTF = jax.nn.silu(einsum("BTD,DF->BTF", x_BTD, w_gate_DF, matmul=c.matmul)) * h_BTF
        elif c.activation == "relu2":
            h_BTF = jnp.square(jax.nn.relu(h_BTF))
        else:
            h_BTF = jax.nn.gelu(h_BTF, approximate=c.activation == "gelu_tanh")
        return plus(einsum("BTF,FD->BTD", h_BTF, w_down_FD, matmul=c.matmul), b_down_D)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the MLP, each added to the residual stream."""

    config: ModelConfig

    def setup(self) -> None:
        self.norm_1, self.attention = Norm(self.config), Attention(self.config)
        self.norm_2, self.mlp = Norm(self.config), Mlp(self.config)
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
    def __call__(
        self,
        tokens_BT: Int[Any, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        start: Any = None,
        padding_B: Int[Array, "B"] | None = None,
        cache_len: int = 0,
        only_last: bool = False,
        train: bool = False,
        hidden_only: bool = False,
    ) -> Float[Array, "B _ V"] | Float[Array, "B _ D"]:
        """Logits, float32, of the token after each position, or `only_last` after the last; the last V - vocab_size, of padding, are -inf.

        A token sees those before it in its own segment. Positions count from 0 unless given. `train=True` turns dropout on and needs
        rngs={"dropout": key}. `hidden_only` gives x_BTD, what `head` makes the logits from, in their place.

        For generation `cache_len` makes a "cache" collection for that many positions (apply with mutable=["cache"]), and `start` is how
        many it holds already in a call that continues one. The first `padding_B` positions of a row are padding, which nothing sees.

        Raises:
          InputError: more positions than the model can embed, or no host memory for `remat` to offload to.
        """
        c, T, tokens_BT = self.config, tokens_BT.shape[1], jnp.asarray(tokens_BT)
        if c.context_len < T:
            raise InputError("tokens", f"{T} positions", f"model.context_len = {c.context_len} is the most this model can embed", "Shorten the text")
        cached = bool(cache_len or start is not None)
        start = jnp.asarray(0 if start is None else start, jnp.int32)
        index_T = start + jnp.arange(T)
        if padding_B is not None:
            S = cache_len or self.cache_len() or T
            q_segments_BT = (index_T[None, :] >= padding_B[:, None]).astype(jnp.int32)
            k_segments_BS = (jnp.arange(S)[None, :] >= padding_B[:, None]).astype(jnp.int32)
            positions_BT = jnp.maximum(index_T[None, :] - padding_B[:, None], 0)
        else:
            q_segments_BT = k_segments_BS = segments_BT
            positions_BT = jnp.broadcast_to(index_T, tokens_BT.shape) if positions_BT is None else positions_BT
        visibility = Visibility(start=start if cached else None, q_segments_BT=q_segments_BT, k_segments_BS=k_segments_BS)

        dtype = jnp.dtype(c.compute_dtype)
        w_token_VD = self.param("w_token_VD", embedding_init(c), (c.padded_vocab_size, c.d_model))
        # Each device looks up its part of D for the rows of all that share it; then they change places. That is less to send than the table, and
        # nothing of its gradient is left to sum.
        x_RTD = w_token_VD[constrain(tokens_BT, "RT")]
        if c.position == "learned":
            w_position_TD = self.param("w_position_TD", normal(c.init_std / 2), (c.context_len, c.d_model))
            x_RTD = x_RTD + w_position_TD[constrain(positions_BT, "RT")]
        x_BTD = constrain(constrain(x_RTD.astype(dtype), "RTD"), "BTD")
        x_BTD = nn.Dropout(c.dropout)(x_BTD, deterministic=not train)

        context = Context(tokens_BT, x_BTD, positions_BT, visibility, cache_len=cache_len, train=train)
        if self.stacked:
            call = remat(c, lambda block, x, context: block(x, context))
            scan = nn.scan(
                lambda block, x, context: (call(block, x, context), None),
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
        x_BTD = Norm(c, name="norm_f")(x_BTD[:, -1:] if only_last else x_BTD)
        if not c.tied_head:
            self.param("w_head_VD", embedding_init(c), w_token_VD.shape)
        return x_BTD if hidden_only else constrain(self.head(x_BTD), "BTV")

    @property
    def head_name(self) -> str:
        """The name of the parameter that `head` reads, the only one."""
        return "w_token_VD" if self.config.tied_head else "w_head_VD"

    def head(self, x_BTD: Float[Array, "B _ D"]) -> Float[Array, "B _ V"]:
        """The logits, float32, of what the last norm gives."""
        w_head_VD: Any = self.get_variable("params", self.head_name)
        return self.finish(einsum("BTD,VD->BTV", x_BTD, w_head_VD, dtype=jnp.float32))

    def finish(self, logits_BTV: Float[Array, "B _ V"]) -> Float[Array, "B _ V"]:
        """The logits scaled for muP, capped and with the padding of the vocabulary out of reach, where the configuration asks for it."""
        c = self.config
        if c.mup_base_width:
            logits_BTV = logits_BTV / c.width_multiplier
        if c.logit_softcap:
            logits_BTV = c.logit_softcap * jnp.tanh(logits_BTV / c.logit_softcap)
        if c.padded_vocab_size > c.vocab_size:
            logits_BTV = jnp.where(jnp.arange(c.padded_vocab_size) < c.vocab_size, logits_BTV, -jnp.inf)
        return logits_BTV

    def cache_len(self) -> int:
        """S of the cache in use; 0 without one."""
        leaves = jax.tree.leaves(self.variables.get("cache", {}))
        return leaves[0].shape[-2] if leaves else 0


def remat(config: ModelConfig, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, a function of a block and its arguments, that keeps for the backward pass what `config.remat` says and computes the rest anew.

    Raises:
      InputError: the device has no pinned host memory to offload to.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost.
    """
    if config.remat == "none":
        return call
    policies = jax.checkpoint_policies
    if config.remat == "offload":
        device = jax.local_devices()[0]
        if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
            remedy = "Set model.remat = attention, which keeps the same on the device"
            raise InputError("model.remat", "offload", f"{device.device_kind} has no pinned_host memory", remedy)
        offloaded = {"offload_src": "device", "offload_dst": "pinned_host"}
        policy = policies.save_and_offload_only_these_names(names_which_can_be_saved=[], names_which_can_be_offloaded=["attention"], **offloaded)
    else:
        policy = {
            "full": policies.nothing_saveable,
            "dots": policies.save_only_these_names("product"),  # of an `einsum`; scores and probabilities, which grow as T S, go
            "attention": policies.save_only_these_names("attention"),
        }[config.remat]
    # Within a loop the compiler cannot merge the second computation with the first; where the loop is unrolled it would, and keep all,
    # as XLA does on a CPU in any case.
    return nn.remat(call, policy=policy, prevent_cse=config.unroll_layers)


intercept = nn.intercept_methods  # sees every call of a part of the model; flax is imported in this folder alone


def rotate(x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], base: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding: pair i, numbers i and i + H/2 of a head, is turned by position * base^(-2i/H) radians.

    Source: Su et al. 2021, equation 34; the pairing is that of GPT-NeoX.
    """
    H = x_BTNH.shape[-1]
    angles_BTH = positions_BT[..., None] * base ** (-jnp.arange(0, H, 2) / H)
    cos, sin = jnp.cos(angles_BTH)[:, :, None], jnp.sin(angles_BTH)[:, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def attention_scale(config: ModelConfig) -> float:
    """What a query times a key is multiplied by: 1 / sqrt(H); in muP 8 / H, the same at H = 64.

    Source: Yang et al. 2022, definition 4.1 and appendix B.1.
    """
    return 8 / config.head_dim if config.mup_base_width else config.head_dim**-0.5


def embedding_init(config: ModelConfig) -> Callable[..., Array]:
    """N(0, init_std) for the rows of the vocabulary, zeros for its padding."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        rows = normal(config.init_std)(key, (config.vocab_size, *shape[1:]), dtype)
        return jnp.pad(rows, ((0, shape[0] - config.vocab_size), (0, 0)))

    return init


def hidden_std(config: ModelConfig) -> float:
    """Initial standard deviation of the weights inside the blocks: init_std; in muP over sqrt(m).

    Source: Yang et al. 2022, table 8.
    """
    return config.init_std / config.width_multiplier**0.5


def residual_std(config: ModelConfig) -> float:
    """Initial standard deviation of the projections into the residual stream: that of the others over sqrt(2 L).

    Source: Radford et al. 2019, section 2.3 (two residual layers in a block).
    """
    return hidden_std(config) / (2 * config.n_layers) ** 0.5


def init(model: Model, key: jax.Array) -> Params:
    """New parameters of `model`, float32, with GPT-2's initialisation: N(0, init_std), positions half of it, biases 0, gains 1.

    Source: openai/gpt-2, src/model.py (0.02 and 0.01).
    """
    # As if it went on from a text: so few tokens are no work for the kernels of attention.
    return dict(model.init(key, jnp.zeros((1, 1), jnp.int32), start=0)["params"])


def n_params(params: Any) -> int:
    """Number of parameters, the tied head counted once."""
    return sum(x.size for x in jax.tree.leaves(params))


def unstack(params: Params) -> Params:
    """The parameters with one dict per block, for `GPT2(..., stacked=False)`."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    L = jax.tree.leaves(params["blocks"])[0].shape[0]
    return rest | {f"block_{layer}": jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"]) for layer in range(L)}
