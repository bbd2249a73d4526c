"""Copies of documents and of paragraphs, found over the whole corpus in bounded memory; the first of them stays.

Exact ones by 128 bits of a hash: 16 bytes for each document and 24 for each paragraph on disk, of which at most `PART_BYTES` are sorted at once,
and 12 for each copy. Near ones by datatrove's MinHash: 68 bytes on disk for each document and bucket, and some 500 bytes of memory, in one
process, for each document that has a near one.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mlm_jax.config import CleanConfig, InputError
from mlm_jax.data.document import Document

PART_BYTES = 1 << 26  # of hashes sorted at once: some 300 MB of memory

DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8")])
PARAGRAPH = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4"), ("line", "<u4")])
_PLACE = np.dtype([("task", "<u4"), ("document", "<u4"), ("line", "<u4")])


def digest_of(document: Document) -> bytes:
    """SHA-256 of the clean text, and of its prompt: 32 bytes. It makes two documents the same, and chooses their split."""
    text = f"{document.prompt}\0{document.text}" if document.prompt else document.text
    return hashlib.sha256(text.encode("utf-8")).digest()


def paragraphs(text: str, least: int) -> Iterator[tuple[int, bytes]]:
    """The lines of at least `least` characters, by number, with a hash of 16 bytes of what they say without spaces around it."""
    for number, line in enumerate(text.split("\n")):
        line = line.strip()
        if len(line) >= least:
            yield number, hashlib.sha256(line.encode("utf-8")).digest()[:16]


@dataclasses.dataclass(frozen=True)
class FindCopies:
    """A step of `executor.run`: one part, by hash, of all that tasks wrote as {task}.npy into `hashes` -> the places of copies, as {part}.npy.

    Beside it, {part}.sizes.npy says of how many documents or paragraphs the groups are.
    """

    hashes: Path
    found: Path
    n_sources: int  # tasks that wrote hashes

    def __call__(self, data: Any, part: int, n_parts: int) -> None:
        rows = []
        for task in range(self.n_sources):
            read = np.load(self.hashes / f"{task}.npy", mmap_mode="r")
            chosen = np.flatnonzero(read["high"] % np.uint64(n_parts) == part)
            row = np.zeros(len(chosen), [*PARAGRAPH.descr, ("task", "<u4")])
            row["high"], row["low"], row["task"] = read["high"][chosen], read["low"][chosen], task
            row["document"], row["line"] = (read["document"][chosen], read["line"][chosen]) if "line" in (read.dtype.names or ()) else (chosen, 0)
            rows.append(row)
        all_rows = np.concatenate(rows)
        del rows
        # Stable, and the rows come in the order of the corpus: the first of its kind is the first of its group.
        order = np.lexsort((all_rows["low"], all_rows["high"]))
        high, low = all_rows["high"][order], all_rows["low"][order]
        again = np.zeros(len(order), bool)
        again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        copies = all_rows[np.sort(order[again])]
        places = np.zeros(len(copies), _PLACE)
        for name in _PLACE.names or ():
            places[name] = copies[name]
        firsts = np.flatnonzero(~again)
        sizes = np.diff(np.append(firsts, len(order)))
        self.found.mkdir(parents=True, exist_ok=True)
        np.save(self.found / f"{part}.npy", places)
        np.save(self.found / f"{part}.sizes.npy", sizes[sizes > 1])


def n_parts(hashes: Path) -> int:
    """In how many parts the hashes in a folder are sorted."""
    return -(-sum(path.stat().st_size for path in hashes.glob("*.npy")) // PART_BYTES)


def copies_of(found: Path, task: int) -> Shaped[np.ndarray, "N"]:
    """The places of the copies that are in this task, in order."""
    parts = []
    for path in sorted(path for path in found.glob("*.npy") if ".sizes" not in path.name):
        places = np.load(path, mmap_mode="r")
        first, last = np.searchsorted(places["task"], [task, task + 1])
        parts.append(np.array(places[first:last]))
    joined = np.concatenate([np.zeros(0, _PLACE), *parts])
    return joined[np.lexsort((joined["line"], joined["document"]))]


def group_sizes(found: Path) -> dict[str, int]:
    """How many groups of copies there are of each size."""
    sizes = np.concatenate([np.zeros(0, int), *(np.load(path) for path in found.glob("*.sizes.npy"))])
    return {str(size): int(count) for size, count in zip(*np.unique(sizes, return_counts=True), strict=True)}


def minhash_steps(config: CleanConfig, folder: Path, documents: Any) -> list[tuple[str, list[Any], int]]:
    """datatrove's MinHash as steps of `executor.run`: their name, the steps, and the number of tasks, 0 for as many as there are of documents.

    `documents` is the step that gives the (index, Document) pairs of a task.

    Raises:
      InputError: datatrove is not installed.
    """
    try:
        from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig
    except ImportError as e:
        reason = f"needs a package that is not installed ({e})"
        raise InputError("data.clean.near_duplicates", "True", reason, 'pip install "mlm_jax[data]"') from e
    # Not xxhash, which datatrove gives texts where its newer versions take bytes alone.
    hashes = HashConfig(precision=64, hash_fc="sha1")
    settings = MinhashConfig(num_buckets=config.minhash_buckets, hashes_per_bucket=config.minhash_hashes, hash_config=hashes)
    signatures, pairs, clusters = (str(folder / name) for name in ("signatures", "pairs", "clusters"))
    return [
        ("signatures", [documents, AsDatatrove(), MinhashDedupSignature(signatures, config=settings)], 0),
        ("pairs", [MinhashDedupBuckets(signatures, pairs, config=settings)], config.minhash_buckets),
        ("clusters", [MinhashDedupCluster(pairs, clusters, config=settings, save_cluster_id=True)], 1),
    ]


@dataclasses.dataclass(frozen=True)
class AsDatatrove:
    """A step: our (index, Document) pairs -> datatrove's documents."""

    def __call__(self, data: Any, task: int, n_tasks: int) -> Iterator[Any]:
        import datatrove.data

        for index, document in data:
            text = f"{document.prompt}\n{document.text}" if document.prompt else document.text
            yield datatrove.data.Document(text=text, id=str(index))


def keep_first(folder: Path, n_tasks: int) -> dict[str, int]:
    """Writes {task}.npy, the places of documents, among those that were given, that are near an earlier one; returns group sizes."""
    seen: dict[int, int] = {}
    for task in range(n_tasks):
        path, drop = folder / "clusters" / f"{task:06d}.clusters", []
        for place, cluster in struct.iter_unpack("<2I", path.read_bytes()) if path.is_file() else ():
            if cluster in seen:
                drop.append(place)
            seen[cluster] = seen.get(cluster, 0) + 1
        np.save(folder / f"{task}.npy", np.array(drop, int))
    sizes, counts = np.unique(np.array(list(seen.values()), int), return_counts=True)
    return {str(size): int(count) for size, count in zip(sizes, counts, strict=True)}
