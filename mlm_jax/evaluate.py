"""How well a model predicts text: loss, perplexity and bits per byte, beside what a compressor needs."""

import lzma
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mlm_jax import objectives, sharding
from mlm_jax.config import TrainConfig
from mlm_jax.data.batches import ValidationWindows, validation_windows
from mlm_jax.data.shards import read_manifest
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.data.tokens import Tokens, open_tokens
from mlm_jax.objectives import Documents
from mlm_jax.storage import Place

XZ_BYTES = 64 << 20  # xz -9 looks back 64 MiB (its dictionary), and takes a minute for that much

EvalStep = Callable[[Any, Any, Any], Array]


def make_eval_step(model: Any, config: TrainConfig = TrainConfig(), documents: Documents | None = None) -> EvalStep:  # noqa: B008  # it is frozen
    """A jitted (params, tokens_BW, weights_BT) -> summed nats of the targets that count; the logits are made in `config.loss_chunks` parts.

    `documents` is what the model is told of documents.
    """

    def eval_step(params: Any, tokens_BW: Int[Array, "B W"], weights_BT: Float[Array, "B T"]) -> Float[Array, ""]:
        examples = objectives.causal(tokens_BW)._replace(weights_BT=weights_BT)
        return objectives.model_losses(model, params, examples, config, documents).nats

    return jax.jit(eval_step)


def mean_loss(
    eval_step: EvalStep, params: Any, windows: ValidationWindows, mesh: jax.sharding.Mesh, *, batch_size: int, at_most: int | None = None
) -> tuple[float, int]:
    """(nats per token, number of tokens predicted) over all windows, or over `at_most` of them, evenly spread; NaN where no token of them counts."""
    chosen = np.arange(len(windows)) if at_most is None else np.unique(np.linspace(0, len(windows) - 1, min(at_most, len(windows))).astype(int))
    nats, count = [], 0.0
    for first in range(0, len(chosen), batch_size):
        some = chosen[first : first + batch_size].tolist()
        tokens_BW, weights_BT = windows.rows(some + [len(windows)] * (batch_size - len(some)))  # those past the end weigh nothing
        put = lambda x: sharding.put_rows(lambda start, stop: x[start:stop], x.shape, x.dtype, mesh)  # noqa: E731
        nats.append(eval_step(params, put(tokens_BW), put(weights_BT)))
        count += float(weights_BT.sum())
    return math.fsum(float(x) for x in nats) / count if count else math.nan, round(count)


def measure(
    model: Any,
    params: Any,
    tokens: Tokens,
    mesh: jax.sharding.Mesh,
    *,
    n_bytes: int,
    n_characters: int,
    documents: Documents | None = None,
) -> dict[str, Any]:
    """Loss over all of `tokens`, every one but the first predicted once; they spell `n_bytes` bytes of UTF-8 and `n_characters` characters.

    Prompts, which are not learned, are neither predicted nor among the bytes and characters. `documents` is what the model is told of
    documents. Keys: val_loss (nats per token), perplexity, val_bits_per_byte, val_nats_per_character, val_tokens, val_bytes.
    """
    windows = validation_windows(tokens, model.config.context_len)
    batch_size = max(4096 // model.config.context_len // mesh.size, 1) * mesh.size
    loss, n_tokens = mean_loss(make_eval_step(model, documents=documents), params, windows, mesh, batch_size=batch_size)
    nats = loss * n_tokens
    return {
        "val_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # a float holds no more
        "val_bits_per_byte": nats / math.log(2) / n_bytes,
        "val_nats_per_character": nats / n_characters,
        "val_tokens": n_tokens,
        "val_bytes": n_bytes,
    }


def plain_text(tokens: Tokens, tokenizer: Tokenizer) -> bytes:
    """The text that the tokens spell, without what is not learned, in UTF-8, one line feed between documents."""
    (ids,) = tokens.read_many([0], len(tokens))
    ids = ids[ids >= 0]
    documents = [part[part != tokenizer.eot_id] for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot_id))]
    return b"\n".join(tokenizer.decode(part).encode() for part in documents if len(part))


def compressors(folder: Place, tokenizer: Tokenizer) -> dict[str, float]:
    """What xz needs for the validation text in a folder of token shards; nothing where there is none, or it is too long to wait for it."""
    if sum(split.bytes for split in read_manifest(folder).splits.values()) > XZ_BYTES:
        return {}
    val, train = (plain_text(open_tokens(folder, name), tokenizer) for name in ("val", "train"))
    if not val:
        return {}
    return {"xz_bits_per_byte": xz_bits_per_byte(val), "xz_primed_bits_per_byte": xz_bits_per_byte(val, primed_by=train + b"\n")}


def describe(result: dict[str, Any]) -> str:
    """The figures of `measure` and `compressors` in words."""
    nats = f"{result['val_loss']:.4f} nats/token, perplexity {result['perplexity']:.2f}, {result['val_nats_per_character']:.4f} nats/character"
    lines = [
        f"evaluate: {nats}",
        f"validation, {result['val_bytes']:,} bytes:  model {result['val_bits_per_byte']:.4f} bits/byte",
    ]
    if "xz_bits_per_byte" in result:
        lines[1] += f"   xz -9 {result['xz_bits_per_byte']:.4f}   xz -9 primed by the training text {result['xz_primed_bits_per_byte']:.4f}"
    return "\n".join(lines)


def xz_bits_per_byte(text: bytes, primed_by: bytes = b"") -> float:
    """Bits that `xz -9` needs per byte of `text`: alone, or on top of `primed_by`, which it has compressed before."""
    before = len(lzma.compress(primed_by, preset=9)) if primed_by else 0
    return 8 * (len(lzma.compress(primed_by + text, preset=9)) - before) / len(text)
