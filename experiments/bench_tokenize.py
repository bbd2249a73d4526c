"""Tokens per second of encoding text with GPT-2's vocabulary: ours against `datasets.Dataset.map` and `tokenizers`, the same ids, taking turns.

Run      python experiments/bench_tokenize.py                              (needs datasets: pip install "mlm_jax[data]")
Work     the documentation of this Python, or --text, again and again, from documents in memory (`map`: in an Arrow file, as its users have
         them) to ids on disk. Ours and `tokenizers.encode_batch_fast` get groups of documents and write uint16, as `prepare` does; `map` runs
         the fast GPT-2 tokenizer of `transformers`, read from our folder, batched, in as many processes as the others have threads, without
         its cache. All on the same cores. Before the clock starts all sides run once, and their ids must be equal
Result   see README.md
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mlm_jax.config import DataConfig
from mlm_jax.data import sources
from mlm_jax.data import tokenizer as tokenizers

GROUP = 1 << 22  # characters that `prepare` encodes at once
OURS, MAP, PLAIN = "mlm_jax", "datasets.map", "tokenizers"

Encode = Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]]


def repeated(source: str, n_bytes: int) -> list[str]:
    """The documents of a source, again and again, `n_bytes` in all, or a little more."""
    once = [document.text for document in sources.documents(DataConfig(source=source))]
    found, size = [], 0
    while size < n_bytes:
        for document in once:
            found.append(document)
            size += len(document.encode("utf-8"))
            if size >= n_bytes:
                break
    return found


def groups(documents: list[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group


def write(encode: Encode, documents: list[str], eot_id: int, path: Path) -> None:
    """The ids of the documents, each behind the end of a text, as uint16."""
    with path.open("wb") as file:
        for group in groups(documents):
            for ids in encode(group):
                file.write(np.concatenate([[eot_id], ids]).astype(np.uint16).tobytes())


def mapped(documents: list[str], tokenizer: tokenizers.Tokenizer, folder: Path, processes: int) -> tuple[Callable[[], None], Callable[[], bytes]]:
    """What runs `datasets.map`, and what then gives its ids as `write` lays them out."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer.save(folder / "tokenizer")
    fast = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(folder / "text")
    text = datasets.Dataset.load_from_disk(folder / "text")
    made = []

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": fast(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]}

    def run() -> None:
        made.clear()
        for path in folder.glob("mapped*"):
            path.unlink()
        done = text.map(
            encode,
            batched=True,
            num_proc=processes,
            remove_columns="text",
            load_from_cache_file=False,
            cache_file_name=str(folder / "mapped.arrow"),
        )
        made.append(done)

    def ids() -> bytes:
        return b"".join(np.array([tokenizer.eot_id, *row], np.uint16).tobytes() for row in made[0]["ids"])

    return run, ids


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--text", default="python-docs", help="the source of the documents (default python-docs)")
    arguments.add_argument("--megabytes", type=float, default=32.0, help="of text (default 32)")
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    arguments.add_argument("--threads", type=int, default=2, help="or processes, and cores, of each side (default 2)")
    args = arguments.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # `tokenizers` makes as many threads as there are cores
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": str(args.threads)}
    documents, tokenizer = repeated(args.text, int(args.megabytes * 1e6)), tokenizers.gpt2()

    def plain(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer._core.encode_batch_fast(texts, add_special_tokens=False)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, ids = mapped(documents, tokenizer, folder, args.threads)
        sides: dict[str, Callable[[], None]] = {
            MAP: run,
            PLAIN: lambda: write(plain, documents, tokenizer.eot_id, folder / PLAIN),
            OURS: lambda: write(lambda texts: tokenizer.encode_batch(texts, threads=args.threads), documents, tokenizer.eot_id, folder / OURS),
        }
        for run in sides.values():
            run()
        found = {MAP: ids(), PLAIN: (folder / PLAIN).read_bytes(), OURS: (folder / OURS).read_bytes()}
        if len(set(found.values())) > 1:
            raise SystemExit("the sides found different ids: not the same work")
        n_tokens = len(found[OURS]) // 2 - len(documents)
        print(
            f"{len(documents):,} documents, {args.megabytes:g} MB, {n_tokens:,} tokens, {args.threads} threads; the same ids from all sides",
            flush=True,
        )
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}\n")
    print("| encoding | M tokens/s, median (range) | ours over it, medians (range of rounds) |\n|---|---|---|")
    for name, times in seconds.items():
        rates = [n_tokens / value / 1e6 for value in times]
        ratios = [a / b for a, b in zip(times, seconds[OURS], strict=True)]
        against = f"{statistics.median(times) / statistics.median(seconds[OURS]):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) | {'1' if name == OURS else against} |")


if __name__ == "__main__":
    main()
