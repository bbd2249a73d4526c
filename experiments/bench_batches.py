"""Tokens per second, of one core, of reading training batches from local token shards, against a bare loop over a NumPy memory map.

Run      python experiments/bench_batches.py
Work     batches of 64 windows of 1,024 tokens and the one after, in the shuffled order of `Batches`, as int32, from random uint16 tokens in shards;
         the files are in the page cache. One thread; the sides take turns. The bare loop is told the starts, and its shards are one file
Result   see README.md
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlm_jax.data import tokens
from mlm_jax.data.batches import Batches


def random_documents(n: int) -> Iterator[np.ndarray]:
    """`n` tokens of GPT-2's vocabulary in all."""
    draw = np.random.default_rng(0)
    for first in range(0, n, 1_000_000):
        yield draw.integers(0, 50_257, min(1_000_000, n - first), np.int32)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=200_000_000)
    arguments.add_argument("--window", type=int, default=1024)
    arguments.add_argument("--steps", type=int, default=500, help="batches in a round (default 500)")
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    rows, window = 64, args.window
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = tokens._write_shards(random_documents(args.tokens), folder, "train", 2, max(args.tokens // 2, 1))
        batches = Batches(
            tokens.Tokens([tokens._open_shard(folder / s.file, s.tokens, 2) for s in shards]), context_len=window, batch_size=rows, seed=0
        )
        np.concatenate(list(random_documents(args.tokens))).astype(np.uint16).tofile(folder / "bare.bin")
        bare = np.memmap(folder / "bare.bin", np.uint16, mode="r")
        starts = [batches.starts(step, 0, rows) for step in range(args.steps)]

        def slices(step: int) -> np.ndarray:
            batch = np.empty((rows, window + 1), np.int32)
            for row, first in enumerate(starts[step]):
                batch[row] = (
                    bare[first : first + window + 1]
                    if first + window < len(bare)
                    else np.append(bare[first:], bare[: first + window + 1 - len(bare)])
                )
            return batch

        sides: dict[str, Callable[[int], np.ndarray]] = {"Batches": batches, "NumPy": slices}
        for step in range(args.steps):  # also brings the files into the page cache
            np.testing.assert_array_equal(batches(step), slices(step))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, read in sides.items():
                start = time.process_time()  # of this thread's core, whatever else the machine does
                for step in range(args.steps):
                    read(step)
                rates[name].append(args.steps * rows * window / (time.process_time() - start) / 1e6)
    print("| reading batches | M tokens/s of a core, median (range) |\n|---|---|")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f}) |")


if __name__ == "__main__":
    main()
