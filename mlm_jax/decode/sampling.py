"""Logits to tokens: what each setting of `Sampling` does to a distribution."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm_jax.config import Sampling


class Seen:
    """What the penalties look at, carried along with the text; None where no penalty is on."""

    @staticmethod
    def start(sampling: Sampling, prompt_BT: Int[Array, "B T"], padding_B: Int[Array, "B"], vocab_size: int) -> Any:
        """(how often each token was generated, whether it stands in the prompt), both BV."""
        if sampling.repetition_penalty == 1 and sampling.frequency_penalty == 0:
            return None
        B, T = prompt_BT.shape
        ids_BT = jnp.where(jnp.arange(T) >= padding_B[:, None], prompt_BT, vocab_size)  # out of range: dropped
        in_prompt_BV = jnp.zeros((B, vocab_size), bool).at[jnp.arange(B)[:, None], ids_BT].set(True, mode="drop")
        return jnp.zeros((B, vocab_size), jnp.int32), in_prompt_BV

    @staticmethod
    def add(seen: Any, tokens_B: Int[Array, "B"]) -> Any:
        """The same after one more token in each row."""
        if seen is None:
            return None
        counts_BV, in_prompt_BV = seen
        return counts_BV.at[jnp.arange(tokens_B.shape[0]), tokens_B].add(1), in_prompt_BV


def adjust(logits_BV: Float[Array, "B V"], seen: Any, n: Any, eot_id: int, sampling: Sampling) -> Float[Array, "B V"]:
    """The logits of token number `n` of a continuation after penalties and bans; log-probabilities serve as well.

    Source: Keskar et al. 2019, section 4.1 (repetition penalty); OpenAI API reference, frequency_penalty.
    """
    V = logits_BV.shape[-1]
    if seen is not None:
        counts_BV, in_prompt_BV = seen
        factor = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
        logits_BV = jnp.where(in_prompt_BV | (counts_BV > 0), penalised_BV, logits_BV)
        logits_BV = logits_BV - sampling.frequency_penalty * counts_BV
    if sampling.banned:
        logits_BV = logits_BV.at[:, jnp.array(sampling.banned)].set(-jnp.inf)
    if sampling.min_tokens and 0 <= eot_id < V:
        logits_BV = logits_BV.at[:, eot_id].set(jnp.where(n < sampling.min_tokens, -jnp.inf, logits_BV[:, eot_id]))
    if sampling.forced:
        forced = jnp.array(sampling.forced)[jnp.minimum(n, len(sampling.forced) - 1)]
        only_BV = jnp.where(jnp.arange(V) == forced, jnp.zeros_like(logits_BV), -jnp.inf)
        logits_BV = jnp.where(n < len(sampling.forced), only_BV, logits_BV)
    return logits_BV


def filtered(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits to draw from: over the temperature, then -inf outside the `top_k` likeliest, the nucleus `top_p`, and `min_p`.

    A temperature of 0 leaves the likeliest token alone. Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, section 3.1 (top-p);
    Nguyen et al. 2024, section 3 (min-p).
    """
    V = logits_BV.shape[-1]
    if sampling.temperature == 0:
        best_B = jnp.argmax(logits_BV, axis=-1)
        return jnp.where(jnp.arange(V) == best_B[:, None], 0.0, -jnp.inf)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < V:
        least_B = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1]
        logits_BV = jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        logits_BV = jnp.where(nucleus(jax.nn.softmax(logits_BV, axis=-1), sampling.top_p), logits_BV, -jnp.inf)
    if sampling.min_p > 0:
        least_B = logits_BV.max(axis=-1) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)
    return logits_BV


def nucleus(probs_BV: Float[Array, "B V"], mass: float) -> Bool[Array, "B V"]:
    """True for the likeliest tokens that together hold `mass`: those before which less than `mass` has gathered.

    The least probability inside is found by bisection, which takes no sorting of V numbers; equally likely tokens are in or out together.
    """

    def halve(_: Any, bounds: Any) -> Any:
        low_B, high_B = bounds
        middle_B = (low_B + high_B) / 2
        enough_B = jnp.where(probs_BV > middle_B[:, None], probs_BV, 0).sum(axis=-1) >= mass
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    # Kept: the mass above `low` is at least `mass`, that above `high` is less. They close in on the least probability of the nucleus.
    high_B = probs_BV.max(axis=-1)
    low_B, _ = jax.lax.fori_loop(0, 40, halve, (jnp.full_like(high_B, -1.0), high_B))
    return probs_BV > low_B[:, None]


def choose(logits_BV: Float[Array, "B V"], keys_B: Array, sampling: Sampling) -> Int[Array, "B"]:
    """One token per row, drawn with its own key from `filtered`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filtered(logits_BV, sampling)).astype(jnp.int32)
