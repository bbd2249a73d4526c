"""Random access to the tokens of a folder of token shards."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from mlm_jax.config import InputError
from mlm_jax.data.shards import open_shard, read_manifest


class Tokens:
    """The tokens of one split as one circle over its memory-mapped shards."""

    def __init__(self, shards: Sequence[Integer[np.ndarray, "_"]]) -> None:
        self._shards = list(shards)
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, length: int) -> Integer[np.ndarray, "T"]:
        """`length` tokens from `start` on, uint16 or uint32; after the last comes the first again."""
        start %= self._ends[-1]
        index = bisect.bisect_right(self._ends, start)
        shard, offset = self._shards[index], start - (self._ends[index] - len(self._shards[index]))
        part = shard[offset : offset + length]
        if len(part) == length:  # nearly always
            return part
        return np.concatenate([part, self.read(start + len(part), length - len(part))])


def open_tokens(folder: Path, split: str) -> Tokens:
    """The tokens of a split ("train" or "val") of all sources in a folder that `prepare` wrote, checked against header and manifest.

    Raises:
      InputError: no such tokens, or a shard is missing, truncated or foreign; the message names the file, both sizes and the remedy.
    """
    manifest = read_manifest(folder)
    shards = manifest.splits[split].shards
    if not shards:
        reason = f"{folder} has no {split} tokens"
        raise InputError("data.val_fraction", manifest.config.val_fraction, reason, "Prepare with another fraction or more text")
    return Tokens([open_shard(folder / shard.file, shard, manifest.token_bytes) for shard in shards])
