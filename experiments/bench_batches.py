"""Tokens per second, of one core, of reading training batches from local token shards, against a bare loop over a NumPy memory map.

Run      python experiments/bench_batches.py
Work     batches of 64 windows of 1,024 tokens and the one after, in the shuffled order of `Batches`, as int32, from random uint16 tokens in shards;
         the files are in the page cache. One thread; the sides take turns. The bare loop is told the starts, and its shards are one file.
         Mixture: the same tokens as three sources of 1/2, 1/3 and 1/6. First-fit: the same tokens as documents of 300 on average, in packed rows.
         Then what a batch of random steps costs of files of zeros that are not on disk, of 10 M and of 1 G tokens in three sources
Result   see README.md
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlm_jax.config import MixedSourceConfig
from mlm_jax.data.batches import Batches
from mlm_jax.data.shards import open_shard, write_shards
from mlm_jax.data.tokens import Tokens

ROWS = 64
THREE = [MixedSourceConfig(name=name) for name in ("a", "b", "c")]


def random_documents(n: int) -> Iterator[np.ndarray]:
    """`n` tokens of GPT-2's vocabulary in all."""
    draw = np.random.default_rng(0)
    for first in range(0, n, 1_000_000):
        yield draw.integers(0, 50_257, min(1_000_000, n - first), np.int32)


def random_starts(n: int) -> np.ndarray:
    """Where documents of 2 to 598 tokens start."""
    starts = np.cumsum(np.concatenate([[0], np.random.default_rng(0).integers(2, 599, n // 300 + 1)]))
    return starts[starts < n].astype(np.uint64)


def parts_of(tokens: np.ndarray) -> list[Tokens]:
    """Three sources of 1/2, 1/3 and 1/6 of the tokens."""
    n = len(tokens)
    return [Tokens([part], name=source.name) for part, source in zip(np.split(tokens, [n // 2, n * 5 // 6]), THREE, strict=True)]


def zeros(folder: Path, n: int) -> np.ndarray:
    """`n` tokens of a file that takes no place on the disk."""
    path = folder / f"zeros_{n}.bin"
    path.touch()
    os.truncate(path, 2 * n)
    return np.asarray(np.memmap(path, "<u2", mode="r"))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=200_000_000)
    arguments.add_argument("--window", type=int, default=1024)
    arguments.add_argument("--steps", type=int, default=500, help="batches in a round (default 500)")
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    window = args.window
    how = {"context_len": window, "batch_size": ROWS, "seed": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_shards(random_documents(args.tokens), args.tokens, folder, "train", token_bytes=2, limit=max(args.tokens // 2, 1))
        shards = [open_shard(folder / shard.file, shard, 2) for shard in written]
        batches = Batches(Tokens(shards), **how)
        np.concatenate(list(random_documents(args.tokens))).astype(np.uint16).tofile(folder / "bare.bin")
        bare = np.asarray(np.memmap(folder / "bare.bin", np.uint16, mode="r"))
        starts = [batches.starts(step, 0, ROWS) for step in range(args.steps)]

        def slices(step: int) -> np.ndarray:
            batch = np.empty((ROWS, window + 1), np.int32)
            for row, first in enumerate(starts[step]):
                batch[row] = (
                    bare[first : first + window + 1]
                    if first + window < len(bare)
                    else np.append(bare[first:], bare[: first + window + 1 - len(bare)])
                )
            return batch

        began = time.process_time()
        packed = Batches(Tokens(shards, starts=lambda: random_starts(args.tokens)), **how, padding=50_256)
        packing_s = time.process_time() - began
        sides: dict[str, Callable[[int], np.ndarray]] = {
            "Batches": batches,
            "NumPy": slices,
            "a mixture of three": Batches(parts_of(bare), **how, mixture=THREE),
            "first-fit": packed,
        }
        for step in range(args.steps):  # also brings the files into the page cache
            np.testing.assert_array_equal(batches(step), slices(step))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, read in sides.items():
                start = time.process_time()  # of this thread's core, whatever else the machine does
                for step in range(args.steps):
                    read(step)
                rates[name].append(args.steps * ROWS * window / (time.process_time() - start) / 1e6)

        sizes, costs = [args.tokens // 20, args.tokens * 5], {}
        few = {n: Batches(parts_of(zeros(folder, n)), **how, mixture=THREE) for n in sizes}
        random_steps = np.random.default_rng(0).integers(0, 10**9, args.steps).tolist()
        for _ in range(args.rounds):
            for n, read in few.items():
                start = time.process_time()
                for step in random_steps:
                    read(step)
                costs.setdefault(n, []).append((time.process_time() - start) / args.steps * 1e3)
    print("| reading batches | M tokens/s of a core, median (range) |\n|---|---|")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f}) |")
    share = packed.shares(1)[0].fill
    print(f"first-fit: {len(random_starts(args.tokens)):,} documents in {packing_s:.1f} s, {share:.2%} of the rows is text")
    print("| a batch of | ms, median (range) |\n|---|---|")
    for n, found in costs.items():
        print(f"| {n:,} tokens | {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f}) |")


if __name__ == "__main__":
    main()
