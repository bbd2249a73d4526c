"""Generation in text: what `mlm_jax.generate`, `mlm_jax.stream` and the commands call."""

import dataclasses
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mlm_jax.config import InputError, SampleConfig, one_of
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.decode import loop
from mlm_jax.decode.beam import beam_search
from mlm_jax.decode.speculative import speculative
from mlm_jax.model import gpt2

CHECK_EVERY = 8  # tokens between two looks for a stop string: each waits for the device


class Generation(NamedTuple):
    """One continuation."""

    text: str  # without the prompt, and without what ended it
    tokens: Int[np.ndarray, "_"]  # up to the one that completed a stop string; without the end of text
    logprobs: Float[np.ndarray, "_"]  # of each token and of the end of text, nats, by the model itself
    logprob: float  # their sum
    score: float | None  # what beams are ranked by: the sum, after penalties, over length ** length_penalty; None without beams
    ended_by: str  # "end of text", "stop" or "length"


class Draft(NamedTuple):
    """A smaller model that guesses ahead (speculative decoding)."""

    model: gpt2.Model
    params: Any
    drafted: int = 4  # tokens guessed at a time


def settings_of(settings: dict[str, Any], config: SampleConfig | None = None) -> SampleConfig:
    """The settings given by name, checked; the others are those of `config`.

    Raises:
      InputError: no such setting, or a value out of range.
    """
    for name in settings:
        one_of("setting", name, [field.name for field in dataclasses.fields(SampleConfig) if field.name != "prompt"])
    return dataclasses.replace(config, **settings) if config else SampleConfig(**settings)


def generations(
    model: gpt2.Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SampleConfig | None = None,
    *,
    draft: Draft | None = None,
    **settings: Any,
) -> list[list[Generation]]:
    """`num` continuations of each prompt: their texts, as `generate` gives them, with tokens, log-probabilities and why they ended.

    The settings are those of `generate`; `config` holds those that are not given by name, and its prompt is not looked at.

    Raises:
      InputError: a setting that the model cannot follow, or more tokens than it can embed.
    """
    config = settings_of(settings, config)
    ids, eot_id = [encode(tokenizer, prompt) for prompt in listed(prompts)], tokenizer.eot_id
    if config.beams > 1 and draft is None:
        found = beam_search(model, params, ids, config, eot_id)
        return [[finish(tokenizer, config, *row) for row in best] for best in found]
    if draft is not None:
        rows, _ = speculative(model, params, draft.model, draft.params, ids, config, eot_id, drafted=draft.drafted)
    else:
        decoding = loop.Decoding(model, params, ids, config, eot_id)
        while not decoding.ended:
            decoding.advance(decoding.n + CHECK_EVERY if config.stop else config.max_tokens)
            if config.stop:
                decoding.end([b for b, (tokens, _) in enumerate(decoding.rows()) if stopped(tokenizer, tokens, config.stop)])
        rows = decoding.rows()
    flat = [finish(tokenizer, config, *row) for row in rows]
    return [flat[i : i + config.num] for i in range(0, len(flat), config.num)]


def finish(
    tokenizer: Tokenizer, config: SampleConfig, tokens: Int[np.ndarray, "_"], logprobs: Float[np.ndarray, "_"], score: float | None = None
) -> Generation:
    """The continuation in text, cut before the first stop string; tokens and log-probabilities are cut behind it."""
    if found := stopped(tokenizer, tokens, config.stop):
        (n, text), ended_by = found, "stop"
        tokens, logprobs = tokens[:n], logprobs[:n]
    else:
        text, ended_by = tokenizer.decode(tokens), "end of text" if len(tokens) < config.max_tokens else "length"
        logprobs = logprobs[: len(tokens) + (ended_by == "end of text")]
    return Generation(text, tokens, logprobs, float(logprobs.sum()), score, ended_by)


def generate(
    model: gpt2.Model, params: Any, tokenizer: Tokenizer, prompt: str | Sequence[str] = "", *, draft: Draft | None = None, **settings: Any
) -> list[Any]:
    """Continuations of a prompt, without it: a list of `num` texts, or for a list of prompts a list of such lists.

    The settings are the fields of `config.SampleConfig`: num, max_tokens, temperature, top_k, seed and so on. A text depends on the prompt,
    the seed and its number alone, not on the prompts beside it.

    Raises:
      InputError: a setting out of range, or more tokens than the model can embed.
    """
    alone = isinstance(prompt, str)
    found = generations(model, params, tokenizer, [prompt] if alone else prompt, draft=draft, **settings)
    texts = [[generation.text for generation in row] for row in found]
    return texts[0] if alone else texts


def stream(model: gpt2.Model, params: Any, tokenizer: Tokenizer, prompt: str = "", **settings: Any) -> Iterator[str]:
    """The text that `generate` gives with num=1, piece by piece as it is written; never a part of a character, or of a stop string.

    Raises:
      InputError: as `generate`; beams and several continuations cannot be streamed.
    """
    config = settings_of(settings)
    if config.num > 1 or config.beams > 1:
        field = "num" if config.num > 1 else "beams"
        raise InputError(field, getattr(config, field), "a stream is one continuation, written as it is found", "Set it to 1")
    ids = [encode(tokenizer, prompt) for prompt in listed([prompt])]
    return _stream(loop.Decoding(model, params, ids, config, tokenizer.eot_id), tokenizer, config)


def _stream(decoding: loop.Decoding, tokenizer: Tokenizer, config: SampleConfig) -> Iterator[str]:
    pieces, text, shown, read = tokenizer.pieces(), "", 0, 0
    while True:
        tokens = decoding.rows()[0][0]
        text += "".join(pieces.push(token) for token in tokens[read:])
        read = len(tokens)
        if decoding.ended:
            text += pieces.end()
        stop = find_stop(text, config.stop)
        held = 0 if decoding.ended else held_back(text, config.stop)
        ready = stop if stop >= 0 else len(text) - held
        if ready > shown:
            yield text[shown:ready]
            shown = ready
        if decoding.ended or stop >= 0:
            return
        decoding.advance(decoding.n + 1)


def listed(prompts: Sequence[str]) -> Sequence[str]:
    """The prompts, which are a list of texts.

    Raises:
      InputError: they are something else; one text alone would be read letter by letter.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("prompt", reprlib.repr(prompts), "not a list of texts", "Give a list of str; generate and stream take one str too")
    return prompts


def encode(tokenizer: Tokenizer, prompt: str) -> Int[np.ndarray, "_"]:
    """The ids of a prompt; of an empty one the end of text, after which a document begins."""
    return tokenizer.encode(prompt) if prompt else np.array([tokenizer.eot_id], np.int32)


def stopped(tokenizer: Tokenizer, tokens: Int[np.ndarray, "_"], stops: Sequence[str]) -> tuple[int, str] | None:
    """(the number of tokens with which a first stop string is whole, the text before it); None where there is none."""
    if find_stop(tokenizer.decode(tokens), stops) < 0:
        return None
    pieces, text = tokenizer.pieces(), ""
    for n, token in enumerate(tokens, 1):
        text += pieces.push(token)
        if (at := find_stop(text, stops)) >= 0:
            return n, text[:at]
    return None  # a stop string that begins with U+FFFD, which half a character looks like


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins, -1 where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
