"""Random access to the tokens of a folder of token shards, on disk or in a bucket.

Where a source has prompts, not every token is learned. In the rows that `read_many` and `fill` give, one array says both: a token that is
not learned stands there as its bitwise complement, ~id, which is negative; `objectives.causal` tells them apart again.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from mlm_jax import storage
from mlm_jax.config import InputError
from mlm_jax.data.shards import HEADER_INTS, REMEDY, Manifest, Shard, SourceTokens, check_shard, open_shard, read_manifest
from mlm_jax.storage import File, Place

HEADER_BYTES = HEADER_INTS * 4


@dataclasses.dataclass(frozen=True)
class InBucket:
    """Numbers in a file of a bucket, of which slices are read when they are asked for."""

    path: Any
    count: int
    dtype: np.dtype
    offset: int = 0  # bytes of header

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Integer[np.ndarray, "_"]:
        first, stop, _ = part.indices(self.count)
        return self.of(storage.read_ranges([self.range(first, max(stop, first))])[0])

    def range(self, first: int, stop: int) -> tuple[Any, int, int]:
        """The file, and the bytes in it, of these numbers."""
        return self.path, self.offset + first * self.dtype.itemsize, self.offset + stop * self.dtype.itemsize

    def of(self, raw: bytes) -> Integer[np.ndarray, "_"]:
        return np.frombuffer(raw, self.dtype)


Numbers = Integer[np.ndarray, "_"] | InBucket  # tokens or masks of one shard
Part = tuple["Tokens", int, Int[np.ndarray, "_"]]  # so many tokens from there on, and where they are to be written


class Tokens:
    """The tokens of one split as one circle over its shards."""

    def __init__(
        self,
        shards: Sequence[Numbers],
        masks: Sequence[Numbers | None] = (),
        *,
        name: str = "",
        starts: Callable[[], Integer[np.ndarray, "_"]] | None = None,
    ) -> None:
        """`masks` has for each shard 1 for a token that is learned and 0 for one that is not, or None where all are; without it all are.

        `name` is that of the source, and `starts` gives what `Tokens.starts` is, where that is known.
        """
        self._shards = list(shards)
        self._masks = list(masks) or [None] * len(self._shards)
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))
        self._starts = starts
        self.name = name

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> Integer[np.ndarray, "T"]:
        """`length` ids from `start` on, uint16 or uint32, learned or not; after the last comes the first again."""
        start %= self._ends[-1]
        index = bisect.bisect_right(self._ends, start)
        shard, offset = self._shards[index], start - (self._ends[index] - len(self._shards[index]))
        part = shard[offset : offset + length]
        if len(part) == length:  # nearly always
            return part
        return np.concatenate([part, self.read(start + len(part), length - len(part))])

    def read_many(self, starts: Sequence[int], length: int) -> Int[np.ndarray, "B W"]:
        """For each of `starts` a row of `length` tokens from there on, int32; those that are not learned as their complement.

        From a bucket all rows are fetched at once.

        Raises:
          NotReached: they are in a bucket that cannot be read.
        """
        rows = np.empty((len(starts), length), np.int32)
        fill([(self, start, row) for start, row in zip(starts, rows, strict=True)])
        return rows

    def piece(self, start: int, length: int) -> tuple[Numbers, Numbers | None, int, int]:
        """The shard and its mask of the token at `start`, its place there, and how many of `length` tokens are in that shard."""
        start %= self._ends[-1]
        index = bisect.bisect_right(self._ends, start)
        left = self._ends[index] - start
        shard = self._shards[index]
        return shard, self._masks[index], len(shard) - left, min(left, length)

    @functools.cached_property
    def starts(self) -> Integer[np.ndarray, "_"]:
        """Where each document starts, its `<|endoftext|>`: tokens from the start of the split. Read when it is first asked for; on disk it is mapped.

        Raises:
          InputError: nobody has written them down, or the file with them is missing or damaged.
          NotReached: they are in a bucket that cannot be read.
        """
        if self._starts is None:
            raise InputError("data.tokens", self.name, "nothing tells where the documents start", "Prepare the tokens again in a new folder")
        return self._starts()


def fill(parts: Iterable[Part]) -> None:
    """Writes tokens as `read_many` gives them, of any sources and of any lengths; what is in buckets is fetched at once.

    Raises:
      NotReached: they are in a bucket that cannot be read.
    """
    far: list[tuple[Any, InBucket, int, bool]] = []
    for tokens, start, row in parts:
        column, length = 0, len(row)
        while column < length:
            shard, mask, first, n = tokens.piece(start + column, length - column)
            piece = row if n == length else row[column : column + n]  # nearly always all of it
            column += n
            if isinstance(shard, InBucket):
                far.append((piece, shard, first, False))
                far += [(piece, mask, first, True)] if isinstance(mask, InBucket) else []
                continue
            piece[:] = shard[first : first + n]
            if mask is not None:
                _hide(piece, mask[first : first + n])
    fetched = storage.read_ranges([numbers.range(first, first + len(piece)) for piece, numbers, first, _ in far])
    for (piece, numbers, _, is_mask), raw in zip(far, fetched, strict=True):  # the ids of a piece come before their mask
        if is_mask:
            _hide(piece, numbers.of(raw))
        else:
            piece[:] = numbers.of(raw)


def _hide(row: Int[np.ndarray, "_"], mask: Integer[np.ndarray, "_"]) -> None:
    np.invert(row, where=mask == 0, out=row)


def open_sources(folder: Place, split: str) -> list[Tokens]:
    """The tokens of a split ("train" or "val") of each source in a folder that `prepare` wrote, checked against headers and manifest.

    Raises:
      InputError: no such tokens, or a shard is missing, truncated or foreign; the message names the file, both sizes and the remedy.
      NotReached: they are in a bucket that cannot be read.
    """
    manifest = read_manifest(folder)
    sizes = {} if isinstance(folder, Path) else storage.files(folder)
    found = [_open(folder, source, split, manifest, sizes) for source in manifest.sources]
    if not sum(map(len, found)):
        reason = f"{folder} has no {split} tokens"
        raise InputError("data.val_fraction", manifest.config.val_fraction, reason, "Prepare with another fraction or more text")
    return found


def open_tokens(folder: Place, split: str) -> Tokens:
    """The tokens of a split of all sources in one circle, one source after the other.

    Raises: as `open_sources`.
    """
    sources = open_sources(folder, split)
    if len(sources) == 1:
        return sources[0]
    before = list(itertools.accumulate(map(len, sources), initial=0))

    def starts() -> Integer[np.ndarray, "_"]:
        return np.concatenate([source.starts + np.uint64(n) for source, n in zip(sources, before[:-1], strict=True)])

    return Tokens([s for one in sources for s in one._shards], [m for one in sources for m in one._masks], starts=starts)


def _open(folder: Place, source: SourceTokens, split: str, manifest: Manifest, sizes: Mapping[str, File]) -> Tokens:
    stated = source.splits[split]
    shards = _open_shards([(_place(folder, shard.file), shard) for shard in stated.shards], manifest.token_bytes, sizes)
    masks = [_plain(_place(folder, s.mask), s.tokens, np.dtype("u1"), sizes) if s.mask_sha256 else None for s in stated.shards]

    def starts() -> Integer[np.ndarray, "_"]:
        if not stated.documents:
            return np.zeros(0, np.uint64)
        return _plain(folder / stated.starts, stated.documents, np.dtype("<u8"), sizes)[:]

    return Tokens(shards, masks, name=source.name, starts=starts if stated.starts else None)


def _place(folder: Place, file: str) -> Place:
    """A file of the folder; one that stays elsewhere is named by its whole path."""
    return storage.place(file) if "/" in file else folder / file


def _open_shards(shards: Sequence[tuple[Place, Shard]], token_bytes: int, sizes: Mapping[str, File]) -> list[Numbers]:
    """The tokens of shards; the headers of those in a bucket are fetched at once."""
    dtype = np.dtype(f"<u{token_bytes}")
    found = [
        open_shard(path, shard, token_bytes) if isinstance(path, Path) else InBucket(path, shard.tokens, dtype, HEADER_BYTES if shard.header else 0)
        for path, shard in shards
    ]
    far = [(numbers, shard) for numbers, (_, shard) in zip(found, shards, strict=True) if isinstance(numbers, InBucket)]
    there = [_size(numbers.path, numbers.offset + shard.tokens * token_bytes, sizes) for numbers, shard in far]
    headers = storage.read_ranges([(numbers.path, 0, min(numbers.offset, size)) for (numbers, _), size in zip(far, there, strict=True)])
    for (numbers, shard), size, header in zip(far, there, headers, strict=True):
        check_shard(str(numbers.path), shard, token_bytes, size, np.frombuffer(header[: len(header) // 4 * 4], "<i4") if shard.header else None)
    return found


def _plain(path: Place, count: int, dtype: np.dtype, sizes: Mapping[str, File]) -> Numbers:
    """The `count` numbers that a file holds, and nothing else."""
    size, expected = _size(path, count * dtype.itemsize, sizes), count * dtype.itemsize
    if size != expected:
        raise InputError("data.tokens", str(path), f"{'cut short' if size < expected else 'too long'}: {size} bytes, {expected} expected", REMEDY)
    return np.asarray(np.memmap(path, dtype, mode="r")) if isinstance(path, Path) else InBucket(path, count, dtype)


def _size(path: Place, expected: int, sizes: Mapping[str, File]) -> int:
    """The bytes of a file, in a bucket as `sizes` lists them. Raises InputError where it is missing."""
    there = path.is_file() if isinstance(path, Path) else path.name in sizes
    if not there:
        raise InputError("data.tokens", str(path), f"is missing, manifest.json tells of {expected} bytes", REMEDY)
    return path.stat().st_size if isinstance(path, Path) else sizes[path.name].bytes
