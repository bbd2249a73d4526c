"""Text generation: one pass over the prompt fills a key/value cache, then one position at a time."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mlm_jax.config import InputError
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.model import gpt2
from mlm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits; a new setting compiles the decoder anew."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", self.temperature, "not a temperature", "Give 0 for greedy decoding, or a positive number")
        if self.top_k < 0:
            raise InputError("top_k", self.top_k, "not a number of tokens", "Give 0 for all, or 1 or more")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "not a probability", "Give a value above 0, at most 1")


def choose(logits_BV: Float[Array, "B V"], keys_B: Array, sampling: Sampling) -> Int[Array, "B"]:
    """One token per row, drawn with its own key: temperature first, then the `top_k` likeliest, then the nucleus of mass `top_p`.

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, section 3.1 (top-p).
    """
    V = logits_BV.shape[-1]
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    best_BV, ids_BV = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p < 1:
        probs_BV = jax.nn.softmax(best_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # mass of the likelier tokens; the likeliest always stays
        best_BV = jnp.where(before_BV < sampling.top_p, best_BV, -jnp.inf)
    picked_B = jax.vmap(jax.random.categorical)(keys_B, best_BV)
    return jnp.take_along_axis(ids_BV, picked_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "cache_len"))
def prefill(model: Any, params: Any, prompt_BT: Int[Any, "B T"], length: Any, *, cache_len: int) -> tuple[Float[Array, "B V"], Any]:
    """(logits_BV after the first `length` tokens of the prompt, the cache they filled); what follows them is padding.

    Padding is written into the cache too, at positions that no query sees before they are overwritten.
    """
    logits_BTV, filled = model.apply({"params": params}, prompt_BT, cache_len=cache_len, mutable=["cache"])
    return jax.lax.dynamic_index_in_dim(logits_BTV, length - 1, axis=1, keepdims=False), filled["cache"]


@functools.partial(jax.jit, static_argnames=("model", "n", "room", "sampling", "eot_id"))
def decode(
    model: Any,
    params: Any,
    cache: Any,
    logits_1V: Float[Array, "1 V"],
    length: Any,
    max_tokens: Any,
    key: Array,
    *,
    n: int,
    room: int,
    sampling: Sampling,
    eot_id: int,
) -> Int[Array, "B T"]:
    """`max_tokens` new tokens for each of `n` continuations of a prompt of `length` tokens, whose cache and last logits have B = 1.

    The result has `room` columns; from the first `eot_id` of a row on, and past `max_tokens`, it holds `eot_id`. Row i draws from
    (key, i, position), so it does not depend on how many others are drawn.
    """
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))

    def pick(logits_BV: Array, i: Any) -> Array:
        return choose(logits_BV, jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B), sampling)

    cache = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), cache)
    tokens_B = pick(jnp.repeat(logits_1V, n, axis=0), 0)
    out_BT = jnp.full((n, room), eot_id, jnp.int32).at[:, 0].set(tokens_B)

    def going(carry: Any) -> Array:
        i, _, tokens_B, _ = carry
        return (i < max_tokens) & (tokens_B != eot_id).any()

    def step(carry: Any) -> Any:
        i, cache, tokens_B, out_BT = carry
        variables = {"params": params, "cache": cache}
        logits_BTV, grown = model.apply(variables, tokens_B[:, None], start=length + i - 1, mutable=["cache"])
        tokens_B = jnp.where(tokens_B == eot_id, eot_id, pick(logits_BTV[:, 0], i))
        return i + 1, grown["cache"], tokens_B, jax.lax.dynamic_update_slice_in_dim(out_BT, tokens_B[:, None], i, axis=1)

    out_BT = jax.lax.while_loop(going, step, (jnp.int32(1), cache, tokens_B, out_BT))[3]
    return constrain(out_BT, "..")  # whole on every device, so that each process can read it


def bucket(n: int, limit: int) -> int:
    """`n` rounded up to a power of two of at least 16, at most `limit`: a few compiled shapes serve every length."""
    return min(max(16, 1 << (n - 1).bit_length()), limit)


def continuations(
    model: gpt2.Model,
    params: Any,
    prompt: Sequence[int] | Int[np.ndarray, "_"],
    *,
    num: int,
    max_tokens: int,
    eot_id: int,
    sampling: Sampling,
    seed: int,
) -> list[Int[np.ndarray, "_"]]:
    """`num` continuations of a prompt of token ids, each of at most `max_tokens` ids and without the `eot_id` that ended it.

    Raises:
      InputError: the prompt and `max_tokens` are more than the model can embed, or an id is outside its vocabulary.
    """
    config, prompt = model.config, np.asarray(prompt, np.int32)
    if num < 1 or max_tokens < 1:
        raise InputError("num" if num < 1 else "max_tokens", num if num < 1 else max_tokens, "nothing to generate", "Give 1 or more")
    if len(prompt) + max_tokens > config.context_len:
        most = config.context_len - len(prompt)
        remedy = f"Ask for at most {most}" if most > 0 else f"Shorten the prompt to fewer than {config.context_len} tokens"
        raise InputError("max_tokens", max_tokens, f"with {len(prompt)} prompt tokens more than model.context_len = {config.context_len}", remedy)
    if prompt.max() >= config.vocab_size:
        raise InputError("prompt", f"token {prompt.max()}", f"outside the model's vocabulary of {config.vocab_size}", "Use the model's own tokenizer")
    flat = model.clone(stacked=False)
    padded = np.full((1, bucket(len(prompt), config.context_len)), eot_id, np.int32)
    padded[0, : len(prompt)] = prompt
    room = bucket(max_tokens, config.context_len)
    cache_len = min(padded.shape[1] + room, config.context_len)
    params = jax.jit(gpt2.unstack)(params)
    logits_BV, cache = prefill(flat, params, padded, len(prompt), cache_len=cache_len)
    key = jax.random.key(seed)
    out = np.asarray(decode(flat, params, cache, logits_BV, len(prompt), max_tokens, key, n=num, room=room, sampling=sampling, eot_id=eot_id))
    return [row[: min([max_tokens, *np.flatnonzero(row == eot_id)[:1]])] for row in out]


def generate(
    model: gpt2.Model,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    num: int = 1,
    max_tokens: int = 50,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """`num` continuations of the prompt, without the prompt; an empty prompt starts a document.

    Raises:
      InputError: a setting out of range, or more tokens than the model can embed.
    """
    sampling = Sampling(temperature, top_k, top_p)
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eot_id]
    rows = continuations(model, params, ids, num=num, max_tokens=max_tokens, eot_id=tokenizer.eot_id, sampling=sampling, seed=seed)
    return [tokenizer.decode(row) for row in rows]
