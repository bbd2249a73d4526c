"""Beam search: the likeliest continuations that a bounded search finds."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mlm_jax.config import SampleConfig
from mlm_jax.decode import loop
from mlm_jax.decode.sampling import Seen, adjust
from mlm_jax.model import gpt2
from mlm_jax.sharding import constrain

NEVER = -1e9  # a score that no hypothesis has


class Beams(NamedTuple):
    """The search of P prompts with W beams each: those that run, and the best that have finished."""

    n: Int[Array, ""]  # tokens chosen
    tokens_PWT: Int[Array, "P W T"]
    logprobs_PWT: Float[Array, "P W T"]  # of each token, by the model itself
    scores_PW: Float[Array, "P W"]  # summed log-probabilities, after penalties and bans
    done_tokens_PWT: Int[Array, "P W T"]
    done_logprobs_PWT: Float[Array, "P W T"]
    done_scores_PW: Float[Array, "P W"]  # over length ** length_penalty
    done_lengths_PW: Int[Array, "P W"]
    done_PW: Bool[Array, "P W"]
    hopeful_P: Bool[Array, "P"]  # a running beam may still beat the worst finished one
    exhausted_P: Bool[Array, "P"]  # no beam can run on
    seen: Any


@functools.partial(jax.jit, static_argnames=("model", "config", "eot_id"))
def search(
    model: gpt2.Model,
    params: Any,
    cache: Any,
    logits_PV: Float[Array, "P V"],
    beams: Beams,
    cached: Any,
    padding_P: Any,
    *,
    config: SampleConfig,
    eot_id: int,
) -> Beams:
    """The finished search; `logits_PV` follow the prompts, whose `cached` positions are in the cache.

    Source: the rules are those of transformers 5, generation/utils.py, _beam_search: in each step the 2 W best candidates are looked at,
    those of the W best that end are finished, and the W best that do not run on.
    """
    P, W = beams.scores_PW.shape
    rows = lambda x: x.reshape(P * W, *x.shape[2:])  # noqa: E731
    padding_B = jnp.repeat(padding_P, W, axis=0)

    def candidates(beams: Beams, logits_BV: Float[Array, "B V"]) -> tuple[Beams, Array]:
        """(the beams after one more token each, which row each of them continues)."""
        n, V = beams.n, logits_BV.shape[-1]
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        adjusted_BV = adjust(logprobs_BV, beams.seen, n, eot_id, config.sampling)
        total_PV = (adjusted_BV.reshape(P, W, V) + beams.scores_PW[:, :, None]).reshape(P, W * V)
        best_PC, index_PC = jax.lax.top_k(total_PV, 2 * W)
        from_PC, ids_PC = index_PC // V, (index_PC % V).astype(jnp.int32)
        longer = lambda x_PWT, new_PC: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            jnp.take_along_axis(x_PWT, from_PC[:, :, None], axis=1), new_PC[:, :, None], n, axis=2
        )
        tokens_PCT = longer(beams.tokens_PWT, ids_PC)
        logprobs_PCT = longer(beams.logprobs_PWT, jnp.take_along_axis(logprobs_BV.reshape(P, W * V), index_PC, axis=1))
        ends_PC = (ids_PC == eot_id) | (n + 1 >= config.max_tokens)

        # finished: the old ones against the new ones among the W best
        score_PC = best_PC / (n + 1).astype(jnp.float32) ** config.length_penalty
        closed_P = (beams.done_PW.all(axis=1) & config.early_stopping) | ~beams.hopeful_P
        new_PC = ends_PC & (jnp.arange(2 * W) < W)
        score_PC = jnp.where(new_PC & ~closed_P[:, None], score_PC, NEVER)
        all_scores = jnp.concatenate([beams.done_scores_PW, score_PC], axis=1)
        done_scores_PW, keep_PW = jax.lax.top_k(all_scores, W)
        merged = lambda old, new: jnp.take_along_axis(  # noqa: E731
            jnp.concatenate([old, new], axis=1), keep_PW.reshape(P, W, *[1] * (old.ndim - 2)), axis=1
        )
        done_tokens_PWT, done_logprobs_PWT = merged(beams.done_tokens_PWT, tokens_PCT), merged(beams.done_logprobs_PWT, logprobs_PCT)
        done_lengths_PW = merged(beams.done_lengths_PW, jnp.full((P, 2 * W), n + 1))
        done_PW = merged(beams.done_PW, new_PC & ~closed_P[:, None])

        # running: the W best that have not ended
        scores_PW, go_PW = jax.lax.top_k(jnp.where(ends_PC, best_PC + NEVER, best_PC), W)
        from_PW, ids_PW = jnp.take_along_axis(from_PC, go_PW, axis=1), jnp.take_along_axis(ids_PC, go_PW, axis=1)
        from_B = (from_PW + jnp.arange(P)[:, None] * W).reshape(-1)
        seen = Seen.add(jax.tree.map(lambda x: x[from_B], beams.seen), ids_PW.reshape(-1))
        best_P = scores_PW[:, 0] / (n + 1).astype(jnp.float32) ** config.length_penalty
        worst_PW = jnp.where(done_PW, done_scores_PW.min(axis=1, keepdims=True), NEVER)
        hopeful_P = beams.hopeful_P & (best_P[:, None] > worst_PW).any(axis=1)
        tokens_PWT, logprobs_PWT = (jnp.take_along_axis(x_PCT, go_PW[:, :, None], axis=1) for x_PCT in (tokens_PCT, logprobs_PCT))
        done = (done_tokens_PWT, done_logprobs_PWT, done_scores_PW, done_lengths_PW, done_PW)
        return Beams(n + 1, tokens_PWT, logprobs_PWT, scores_PW, *done, hopeful_P, ends_PC.all(axis=1), seen), from_B

    def going(carry: Any) -> Array:
        _, beams, _ = carry
        full_P = beams.done_PW.all(axis=1) & config.early_stopping
        return (beams.hopeful_P & ~full_P & ~beams.exhausted_P).any()

    def step(carry: Any) -> Any:
        cache, beams, from_B = carry
        cache = jax.tree.map(lambda x: x[from_B], cache)
        last_B1 = rows(jax.lax.dynamic_slice_in_dim(beams.tokens_PWT, beams.n - 1, 1, axis=2))
        start = cached + beams.n - 1
        logits_B1V, grown = model.apply({"params": params, "cache": cache}, last_B1, start=start, padding_B=padding_B, mutable=["cache"])
        beams, from_B = candidates(beams, logits_B1V[:, 0])
        return grown["cache"], beams, from_B

    cache = jax.tree.map(lambda x: jnp.repeat(x, W, axis=0), cache)
    beams, from_B = candidates(beams, jnp.repeat(logits_PV, W, axis=0))
    beams = jax.lax.while_loop(going, step, (cache, beams, from_B))[1]
    return jax.tree.map(lambda x: constrain(x, "." * x.ndim), beams)  # whole on every device, so that each process can read it


def beam_search(
    model: gpt2.Model, params: Any, prompts: Sequence[loop.Ids], config: SampleConfig, eot_id: int
) -> list[list[tuple[Int[np.ndarray, "_"], Float[np.ndarray, "_"], float]]]:
    """For each prompt its `config.num` best continuations, best first: (token ids without the end of text, log-probabilities with it, score).

    The log-probabilities, in nats, are the model's own. The score is their sum, after penalties and bans, over length ** length_penalty;
    the length counts the end of text.

    Raises:
      InputError: a prompt or a setting that the model cannot follow.
    """
    limit, rows = model.config.context_len, [np.asarray(prompt, np.int32) for prompt in prompts]
    loop.check(model.config, rows, config)
    model, params = model.clone(stacked=False), loop.flat(params)
    prompt_PT, padding_P = loop.pad_left(rows, limit)
    P, W, T = len(rows), config.beams, loop.bucket(config.max_tokens)
    logits_PV, cache = loop.prefill(model, params, prompt_PT, padding_P, cache_len=loop.bucket(prompt_PT.shape[1] + config.max_tokens))
    loop.check_finite(logits_PV)
    tokens_PWT, logprobs_PWT, scores_PW = jnp.zeros((P, W, T), jnp.int32), jnp.zeros((P, W, T)), jnp.full((P, W), NEVER)
    repeated = jnp.repeat(jnp.asarray(prompt_PT), W, axis=0), jnp.repeat(jnp.asarray(padding_P), W, axis=0)
    beams = Beams(
        jnp.int32(0),
        tokens_PWT,
        logprobs_PWT,
        scores_PW.at[:, 0].set(0.0),  # the beams of a prompt are one until they part
        tokens_PWT,
        logprobs_PWT,
        scores_PW,
        jnp.zeros((P, W), jnp.int32),
        jnp.zeros((P, W), bool),
        jnp.ones(P, bool),
        jnp.zeros(P, bool),
        Seen.start(config.sampling, *repeated, model.config.padded_vocab_size),
    )
    cached, static = np.int32(prompt_PT.shape[1]), dataclasses.replace(config, prompt="", num=1, seed=0)
    beams = jax.tree.map(np.asarray, search(model, params, cache, logits_PV, beams, cached, padding_P, config=static, eot_id=eot_id))
    out = []
    for prompt in zip(beams.done_tokens_PWT, beams.done_logprobs_PWT, beams.done_lengths_PW, beams.done_scores_PW, strict=True):
        found = []
        for tokens, logprobs, length, score in zip(*prompt, strict=True):
            ended = int(length > 0 and tokens[length - 1] == eot_id)
            found.append((tokens[: length - ended], logprobs[:length], float(score)))
        out.append(found[: config.num])
    return out
