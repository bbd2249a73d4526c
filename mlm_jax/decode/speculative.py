"""Speculative decoding: a small model drafts tokens that the model itself checks several at a time; what is written follows its distribution."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mlm_jax.config import InputError, SampleConfig, Sampling
from mlm_jax.decode import loop
from mlm_jax.decode.sampling import adjust, filtered
from mlm_jax.model import gpt2
from mlm_jax.sharding import constrain


@functools.partial(jax.jit, static_argnames=("model", "draft", "drafted", "room", "sampling", "eot_id"))
def write(
    model: gpt2.Model,
    params: Any,
    cache: Any,
    logits_BV: Float[Array, "B V"],
    draft: gpt2.Model,
    draft_params: Any,
    draft_cache: Any,
    cached: Any,
    padding_B: Int[Any, "B"],
    keys_B: Array,
    max_tokens: Any,
    *,
    drafted: int,
    room: int,
    sampling: Sampling,
    eot_id: int,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"], Int[Array, "B"]]:
    """(up to `max_tokens` tokens for each row, their log-probabilities by the model itself, how often it was called).

    Both caches hold `cached` positions of prompt.
    """
    vocab_size = model.config.vocab_size  # that of the draft too; the padding may differ

    def distribution(logits_TV: Float[Array, "T V"]) -> Float[Array, "T V"]:
        return jax.nn.softmax(filtered(adjust(logits_TV, None, 0, eot_id, sampling), sampling), axis=-1)

    def logprobs_of(logits_TV: Float[Array, "T V"], tokens_T: Int[Array, "T"]) -> Float[Array, "T"]:
        return jnp.take_along_axis(logits_TV, tokens_T[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_TV, axis=-1)

    def one_row(cache: Any, draft_cache: Any, logits_V: Float[Array, "V"], padding: Any, key: Array) -> tuple[Array, Array, Array]:
        """The same for one row, whose caches have no axis B."""

        def call(model: gpt2.Model, params: Any, cache: Any, tokens_T: Array, start: Any) -> tuple[Array, Any]:
            batched = jax.tree.map(lambda x: x[None], cache)
            variables = {"params": params, "cache": batched}
            logits_1TV, grown = model.apply(variables, tokens_T[None], start=start, padding_B=padding[None], mutable=["cache"])
            return logits_1TV[0, :, :vocab_size], jax.tree.map(lambda x: x[0], grown["cache"])

        def draw(n: Any, use: int, probs_V: Float[Array, "V"]) -> Int[Array, ""]:
            """A token for position `n`; each `use` of a position has draws of its own."""
            return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, n), use), jnp.log(probs_V)).astype(jnp.int32)

        def going(carry: Any) -> Array:
            n, _, _, tokens_T, _, _ = carry
            return (n < max_tokens) & (tokens_T[n - 1] != eot_id)

        def step(carry: Any) -> Any:
            n, cache, draft_cache, tokens_T, logprobs_T, calls = carry
            start = cached + n - 1  # of the last token, which neither cache holds

            def guess(carry: Any, i: Any) -> Any:
                draft_cache, token = carry
                logits_1V, draft_cache = call(draft, draft_params, draft_cache, token[None], start + i)
                (probs_V,) = distribution(logits_1V)
                token = draw(n + i, 0, probs_V)
                return (draft_cache, token), (token, probs_V)

            # One guess more than is checked: it brings the last checked one into the draft's cache.
            (draft_cache, _), (guesses_T, q_TV) = jax.lax.scan(guess, (draft_cache, tokens_T[n - 1]), jnp.arange(drafted + 1))
            guesses_T, q_TV = guesses_T[:drafted], q_TV[:drafted]
            logits_TV, cache = call(model, params, cache, jnp.concatenate([tokens_T[n - 1][None], guesses_T]), start)
            p_TV = distribution(logits_TV)

            at = jnp.arange(drafted)
            u_T = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, n + i), 1)))(at)
            accepted = jnp.cumprod(u_T * q_TV[at, guesses_T] < p_TV[at, guesses_T]).sum()
            # Behind the accepted ones: from what the draft gave too little, or from the model itself where all were accepted.
            rest_TV = jnp.concatenate([jnp.maximum(p_TV[:-1] - q_TV, 0), p_TV[-1:]])
            rest_V = rest_TV[accepted]
            rest_V = jnp.where(rest_V.sum() > 0, rest_V, p_TV[accepted])  # rounding may leave nothing
            last = draw(n + accepted, 2, rest_V / rest_V.sum())
            new_T = jnp.where(jnp.arange(drafted + 1) < accepted, jnp.append(guesses_T, 0), last)
            ends_T = new_T == eot_id
            new = jnp.where(ends_T.any(), jnp.minimum(ends_T.argmax(), accepted), accepted) + 1  # tokens that count
            tokens_T = jax.lax.dynamic_update_slice_in_dim(tokens_T, new_T, n, axis=0)
            logprobs_T = jax.lax.dynamic_update_slice_in_dim(logprobs_T, logprobs_of(logits_TV, new_T), n, axis=0)
            return n + new, cache, draft_cache, tokens_T, logprobs_T, calls + 1

        logits_1V = logits_V[None, :vocab_size]
        first = draw(0, 0, distribution(logits_1V)[0])
        tokens_T = jnp.zeros(room + drafted + 1, jnp.int32).at[0].set(first)
        logprobs_T = jnp.zeros(room + drafted + 1).at[0].set(logprobs_of(logits_1V, first[None])[0])
        carry = (jnp.int32(1), cache, draft_cache, tokens_T, logprobs_T, jnp.int32(0))
        n, _, _, tokens_T, logprobs_T, calls = jax.lax.while_loop(going, step, carry)
        return jnp.where(jnp.arange(room) < jnp.minimum(n, max_tokens), tokens_T[:room], max(eot_id, 0)), logprobs_T[:room], calls

    tokens_BT, logprobs_BT, calls_B = jax.vmap(one_row)(cache, draft_cache, logits_BV, padding_B, keys_B)
    return constrain(tokens_BT, ".."), constrain(logprobs_BT, ".."), constrain(calls_B, ".")


def speculative(
    model: gpt2.Model,
    params: Any,
    draft: gpt2.Model,
    draft_params: Any,
    prompts: Sequence[loop.Ids],
    config: SampleConfig,
    eot_id: int,
    *,
    drafted: int = 4,
) -> tuple[list[tuple[Int[np.ndarray, "_"], Float[np.ndarray, "_"]]], float]:
    """(`config.num` continuations of each prompt, as `loop.Decoding.rows` gives them; tokens written per call of the model).

    The draft guesses `drafted` tokens; a guess x stays with probability min(1, p(x) / q(x)), p the model's and q the draft's, and the first
    that goes is replaced by a draw from max(p - q, 0), so that the text is distributed as the model's own. Greedy text is the model's own.

    Source: Leviathan et al. 2023, algorithm 1.

    Raises:
      InputError: the two vocabularies differ, a setting looks at the text so far, or the model cannot follow a prompt or a setting.
    """
    most = min(model.config.context_len, draft.config.context_len) - 1
    if type(drafted) is not int or not 1 <= drafted <= most:
        raise InputError("drafted", drafted, f"not a number of tokens from 1 to {most}, one less than the context", f"Give {min(4, most)}")
    if draft.config.vocab_size != model.config.vocab_size:
        remedy = "Draft with a model of the same tokenizer"
        raise InputError("draft", f"{draft.config.vocab_size} tokens", f"the model has a vocabulary of {model.config.vocab_size}", remedy)
    defaults = Sampling()
    for name in ("repetition_penalty", "frequency_penalty", "min_tokens", "forced"):
        if getattr(config, name) != getattr(defaults, name):
            raise InputError(
                name, getattr(config, name), "looks at the text so far, which speculative decoding does not follow", "Do without a draft"
            )
    if config.overflow == "window" or config.beams > 1:
        raise InputError("draft", "", "neither slides past the context length nor searches with beams", "Do without a draft")
    rows = [np.asarray(prompt, np.int32) for prompt in prompts for _ in range(config.num)]
    for checked in (model, draft):
        loop.check(checked.config, rows, config)
    prompt_BT, padding_B = loop.pad_left(rows, min(model.config.context_len, draft.config.context_len))
    room = loop.bucket(config.max_tokens)
    cache_len = loop.bucket(prompt_BT.shape[1] + config.max_tokens + drafted + 1)
    sides = []
    for side, weights in ((model, params), (draft, draft_params)):
        side, weights = side.clone(stacked=False), loop.flat(weights)
        logits_BV, cache = loop.prefill(side, weights, prompt_BT[:: config.num], padding_B[:: config.num], cache_len=cache_len)
        loop.check_finite(logits_BV)
        sides.append((side, weights, *jax.tree.map(lambda x: jnp.repeat(x, config.num, axis=0), (cache, logits_BV))))
    (model, params, cache, logits_BV), (draft, draft_params, draft_cache, _) = sides
    tokens_BT, logprobs_BT, calls_B = write(
        model,
        params,
        cache,
        logits_BV,
        draft,
        draft_params,
        draft_cache,
        np.int32(prompt_BT.shape[1]),
        padding_B,
        loop.row_keys(rows, config.num, config.seed),
        np.int32(config.max_tokens),
        drafted=drafted,
        room=room,
        sampling=config.sampling,
        eot_id=eot_id,
    )
    tokens_BT, logprobs_BT = np.asarray(tokens_BT)[:, : config.max_tokens], np.asarray(logprobs_BT)[:, : config.max_tokens]
    lengths = [next(iter(np.flatnonzero(row == eot_id)), config.max_tokens) for row in tokens_BT]
    texts = [(tokens_BT[b, :n], logprobs_BT[b, : n + 1]) for b, n in enumerate(lengths)]
    return texts, sum(lengths) / max(int(np.asarray(calls_B).sum()), 1)
