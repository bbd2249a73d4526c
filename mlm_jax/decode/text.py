"""Generation in text: what `mlm_jax.generate`, `mlm_jax.stream` and the commands call."""

import dataclasses
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
    tokens: Int[np.ndarray, "_"]
    logprobs: Float[np.ndarray, "_"] | None  # of each token and of the end of text, nats, by the model itself; None for beams and drafts
    score: float | None  # summed log-probability; for beams over length ** length_penalty
    ended_by: str  # "end of text", "stop" or "length"


class Draft(NamedTuple):
    """A smaller model that guesses ahead (speculative decoding)."""

    model: gpt2.Model
    params: Any
    drafted: int = 4  # tokens guessed at a time


def settings_of(settings: dict[str, Any]) -> SampleConfig:
    """The settings given by name, checked.

    Raises:
      InputError: no such setting, or a value out of range.
    """
    for name in settings:
        one_of("setting", name, [field.name for field in dataclasses.fields(SampleConfig) if field.name != "prompt"])
    return SampleConfig(**settings)


def generations(
    model: gpt2.Model, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], config: SampleConfig, *, draft: Draft | None = None
) -> list[list[Generation]]:
    """`config.num` continuations of each prompt; an empty prompt starts a document. `config.prompt` is not looked at.

    Raises:
      InputError: a setting that the model cannot follow, or more tokens than it can embed.
    """
    eot_id = tokenizer.eot_id
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    if config.beams > 1 and draft is None:
        found = beam_search(model, params, ids, config, eot_id)
        return [[finish(tokenizer, config, tokens, None, score) for tokens, score in best] for best in found]
    if draft is not None:
        texts, _ = speculative(model, params, draft.model, draft.params, ids, config, eot_id, drafted=draft.drafted)
        flat = [finish(tokenizer, config, tokens, None, None) for tokens in texts]
    else:
        decoding = loop.Decoding(model, params, ids, config, eot_id)
        while not decoding.ended:
            decoding.advance(decoding.n + CHECK_EVERY if config.stop else config.max_tokens)
            if config.stop:
                decoding.end([b for b, (tokens, _) in enumerate(decoding.rows()) if find_stop(tokenizer.decode(tokens), config.stop) >= 0])
        flat = [finish(tokenizer, config, tokens, logprobs) for tokens, logprobs in decoding.rows()]
    return [flat[i : i + config.num] for i in range(0, len(flat), config.num)]


def finish(
    tokenizer: Tokenizer, config: SampleConfig, tokens: Int[np.ndarray, "_"], logprobs: Float[np.ndarray, "_"] | None, score: float | None = None
) -> Generation:
    """The continuation in text, cut before the first stop string."""
    text = tokenizer.decode(tokens)
    stop = find_stop(text, config.stop)
    ended_by = "stop" if stop >= 0 else "end of text" if len(tokens) < config.max_tokens else "length"
    if logprobs is not None:
        logprobs = logprobs[: len(tokens) + (ended_by == "end of text")]
        score = float(logprobs.sum())
    return Generation(text if stop < 0 else text[:stop], tokens, logprobs, score, ended_by)


def generate(
    model: gpt2.Model, params: Any, tokenizer: Tokenizer, prompt: str | Sequence[str] = "", *, draft: Draft | None = None, **settings: Any
) -> list[Any]:
    """Continuations of a prompt, without it: a list of `num` texts, or for a list of prompts a list of such lists.

    The settings are the fields of `config.SampleConfig`: num, max_tokens, temperature, top_k, seed and so on. A text depends on the prompt,
    the seed and its number alone, not on the prompts beside it.

    Raises:
      InputError: a setting out of range, or more tokens than the model can embed.
    """
    config = settings_of(settings)
    alone = isinstance(prompt, str)
    found = generations(model, params, tokenizer, [prompt] if alone else prompt, config, draft=draft)
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
    return _stream(loop.Decoding(model, params, [encode(tokenizer, prompt)], config, tokenizer.eot_id), tokenizer, config)


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


def encode(tokenizer: Tokenizer, prompt: str) -> Int[np.ndarray, "_"]:
    """The ids of a prompt; of an empty one the end of text, after which a document begins."""
    return tokenizer.encode(prompt) if prompt else np.array([tokenizer.eot_id], np.int32)


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins, -1 where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
