"""Documents -> rows of whole documents, as many as fit: which documents are in which row.

The index is made once from the lengths of the documents; then every row is found at once, in any order.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from mlm_jax.config import InputError

_CHUNK = 1 << 16  # lengths that are Python numbers at once


class Stretch(NamedTuple):
    """Tokens that stand in a row one after the other."""

    first: int  # token of the split
    n: int
    is_rest: bool = False  # of a document that other rows begin: an `<|endoftext|>` stands before it, and its first token is not learned


def first_fit(lengths: Integer[np.ndarray, "N"], room: int) -> Int[np.ndarray, "N"]:
    """The bin of each length, from 1 to `room`: in the order given each goes into the first bin that has room for it, else into a new one.

    Takes O(N log bins): the bins are the leaves of a tree in which each node knows the most room below it.

    Source: Johnson et al. 1974, Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms: at most 1.7 times the fewest bins.
    """
    # No two bins are at most half full: the first length of the later would have gone into the earlier. That bounds the bins.
    leaves = 1 << (min(len(lengths), 2 * int(lengths.sum()) // room + 2) - 1).bit_length()
    tree, out = [room] * (2 * leaves), np.empty(len(lengths), np.int64)
    for first in range(0, len(lengths), _CHUNK):
        found = []
        for length in lengths[first : first + _CHUNK].tolist():
            node = 1
            while node < leaves:
                node *= 2
                if tree[node] < length:
                    node += 1
            found.append(node - leaves)
            tree[node] -= length
            while node > 1:
                node //= 2
                left, right = tree[2 * node], tree[2 * node + 1]
                most = left if left > right else right
                if tree[node] == most:
                    break
                tree[node] = most
        out[first : first + _CHUNK] = found
    return out


class Packing:
    """Rows of `room` tokens that hold whole documents; every token of every document is in exactly one row.

    A document that is longer than a row fills rows of its own, and what remains of it is packed as a short document is, with one token of
    room more: else nothing would tell it from the document before it. So is a first document without an `<|endoftext|>`, as nanoGPT has it.
    Documents are packed in a random order: in that of the corpus neighbours, which are alike, would share rows, and one that is sorted by
    length would pack badly.

    What stays in memory is at most 4 bytes a document (8 from 2^32 of them on), 8 a row and 16 a document that is longer than a row, beside
    `starts`, which is mapped where it is on disk and else has 8 bytes a document. While the index is made it takes about 80 bytes a document.
    """

    def __init__(self, starts: Integer[np.ndarray, "N"], n_tokens: int, room: int, seed: int, *, is_begun: bool = True) -> None:
        """`starts` has the first token of each document, of `n_tokens` in all; `seed` is of the order, below 2^64.

        `is_begun` is False where the first document is without its `<|endoftext|>`.

        Raises:
          InputError: there are no documents, or they do not start one after the other.
        """
        lengths = np.diff(starts.astype(np.int64), append=n_tokens)
        if not len(starts) or starts[0] != 0 or lengths.min() < 1:
            reason = f"where documents start is damaged: {len(starts)} of them in {n_tokens} tokens"
            raise InputError("data.tokens", "", reason, "Delete the folder and prepare the tokens again")
        self._starts, self._n_tokens, self._room, self._is_begun = starts, n_tokens, room, is_begun
        full, rests = lengths // room, lengths % room
        order = shuffled(len(starts), seed)
        order = order[rests[order] > 0]
        bins = first_fit(rests[order] + ((full[order] > 0) | ((order == 0) & (not is_begun))), room)
        by_bin = order[np.argsort(bins, kind="stable")]
        self._documents = by_bin.astype(np.uint32) if len(starts) < 1 << 32 else by_bin
        self._ends = np.cumsum(np.bincount(bins)) if len(bins) else np.zeros(0, np.int64)  # in _documents, of each row
        self._long = np.flatnonzero(full)
        self._long_ends = np.cumsum(full[self._long])  # of the rows that each of them fills
        self.n_rows = len(self._ends) + int(self._long_ends[-1] if len(self._long) else 0)

    @property
    def fill(self) -> float:
        """The share of the rows that is tokens of documents; the rest is padding."""
        return self._n_tokens / (self.n_rows * self._room)

    def row(self, index: int) -> list[Stretch]:
        """What stands in a row; but for rows that one document fills, each stretch is up to the end of its document."""
        if index >= len(self._ends):
            index -= len(self._ends)
            which = int(np.searchsorted(self._long_ends, index, side="right"))
            before = int(self._long_ends[which - 1]) if which else 0
            return [Stretch(int(self._starts[self._long[which]]) + (index - before) * self._room, self._room)]
        first, stop = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        found = []
        for document in self._documents[first:stop].tolist():
            start = int(self._starts[document])
            end = int(self._starts[document + 1]) if document + 1 < len(self._starts) else self._n_tokens
            rest = (end - start) % self._room
            found.append(Stretch(end - rest, rest, is_rest=rest < end - start or not (document or self._is_begun)))
        return found


def shuffled(n: int, seed: int) -> Int[np.ndarray, "_"]:
    """The numbers below `n` in a random order that stays what it is with every release of NumPy, as its own shuffles do not.

    Source: Steele et al. 2014, Fast Splittable Pseudorandom Number Generators (splitmix64): the numbers are sorted by what it makes of them.
    """
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
