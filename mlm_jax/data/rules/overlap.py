"""Decontamination: documents that share a run of words with an evaluation set are dropped (Brown et al. 2020, appendix C)."""

import hashlib
import re
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt16, UInt64

from mlm_jax.config import InputError, MixedSourceConfig, SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.document import Document, Dropped, Rule

LEAST_WORDS = 8  # of a passage that is shorter than a run; shorter ones, such as "yes", stand in any text. Source: Brown et al. 2020, appendix C

_FIELD = "data.clean.evaluation_sets"
_APOSTROPHES = str.maketrans("", "", "'’ʼ`´")
_WORD = re.compile(r"[^\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd; 2^64 over the golden ratio (Knuth 1998, section 6.4)


def records_of(name: str) -> Iterator[object]:
    """What an evaluation set holds; of tfds: and hf: NAME@SPLIT names the split.

    Raises:
      InputError: there is none of this kind, or it is damaged.
    """
    source, _, split = name.partition("@") if name.startswith(("tfds:", "hf:")) else (name, "", "")
    try:
        yield from sources.records(SourceConfig(source=source, split=split or "test"))
    except InputError as e:
        raise InputError(_FIELD, name if e.value == source else str(e.value), e.reason, e.remedy) from e


def decontaminate(sets: tuple[str, ...], n_words: int, records: Callable[[str], Iterator[object]] = records_of) -> Rule:
    """Drops documents of which any `n_words` words in a row also stand in a row in a passage of one of the sets.

    Words are what stands between spaces and punctuation, in small letters and without apostrophes: other punctuation, line breaks and
    capitals hide nothing. (Brown et al. delete punctuation, and so make one word of "end—and".) A script without spaces has words as long as
    its clauses. A passage of fewer words counts as a whole if it has `LEAST_WORDS`.

    Kept in memory are 10 bytes for each different run: a passage of w words has w - n_words + 1. Two runs are the same if a hash of 64 bits is.

    Raises:
      InputError: a set cannot be read, or has no passage that is long enough.
    """
    found: dict[int, list[tuple[np.ndarray, int]]] = {}  # by length of the runs: their hashes, and whose they are
    for i, source in enumerate(sets):
        short = True
        for passage in (text for record in records(source) for text in _texts(record)):
            hashes = _word_hashes(passage)
            length = min(n_words, len(hashes))
            if length >= min(n_words, LEAST_WORDS):
                found.setdefault(length, []).append((_runs(hashes, length), i))
                short = False
        if short:
            reason = f"no passage has {min(n_words, LEAST_WORDS)} words or more"
            raise InputError(_FIELD, source, reason, "Name a set of longer passages, or leave it out")
    index = {length: _index(found.pop(length)) for length in sorted(found, reverse=True)}
    labels = _labels(sets)

    def apply(document: Document) -> Document | Dropped:
        hashes = _word_hashes(f"{document.prompt}\n{document.text}" if document.prompt else document.text)
        for length, (runs, owners) in index.items():
            here = _runs(hashes, length)
            places = np.minimum(np.searchsorted(runs, here), len(runs) - 1)
            hits = np.flatnonzero(runs[places] == here)
            if len(hits):
                return Dropped(f"in evaluation set {labels[owners[places[hits[0]]]]}")
        return document

    return Rule("overlap", apply)


def _texts(record: object) -> Iterator[str]:
    """Every text in what JSON has, at any depth."""
    if isinstance(record, str | bytes):
        yield record if isinstance(record, str) else record.decode("utf-8", "replace")
    elif isinstance(record, dict | list | tuple | np.ndarray):
        for part in record.values() if isinstance(record, dict) else record:
            yield from _texts(part)


def _word_hashes(text: str) -> UInt64[np.ndarray, "W"]:
    """64 bits of BLAKE2b for each word."""
    words = _WORD.findall(text.lower().translate(_APOSTROPHES))
    return np.frombuffer(b"".join([hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words]), "<u8").astype(np.uint64)


def _runs(hashes: UInt64[np.ndarray, "W"], length: int) -> UInt64[np.ndarray, "R"]:
    """A hash of each run of `length` words: a polynomial in the hashes of its words, modulo 2^64."""
    n = max(len(hashes) - length + 1, 0)
    runs = np.zeros(n, np.uint64)
    for i in range(length):
        runs = runs * _BASE + hashes[i : i + n]
    return runs


def _index(found: list[tuple[np.ndarray, int]]) -> tuple[UInt64[np.ndarray, "R"], UInt16[np.ndarray, "R"]]:
    """All runs in rising order, and the first set that has each."""
    runs, firsts = np.unique(np.concatenate([hashes for hashes, _ in found]), return_index=True)
    owners = np.repeat(np.array([i for _, i in found], np.uint16), [len(hashes) for hashes, _ in found])
    return runs, owners[firsts]


def _labels(sets: tuple[str, ...]) -> list[str]:
    """A short name for each, or the whole one where two would be called the same."""
    short = [MixedSourceConfig(source=source).label for source in sets]
    return [label if short.count(label) == 1 else source for label, source in zip(short, sets, strict=True)]
