"""Cleaning against datatrove alone, and the memory of `prepare` as the text grows.

Run      python -m experiments.bench_data [--only cleaning | memory]
Work     cleaning: the documents of --text, repeated to --megabytes, through datatrove's Gopher, C4 and FineWeb filters in one process, once as
         `prepare` calls them, with the basic rules, the audit and the hashes that find copies, and once in datatrove's own pipeline of reader,
         filters and writer; the texts that are kept are compared first, and the sides take turns.
         memory: documents of words, all different, in one .jsonl file, through `prepare` with paragraph copies sought and personal data masked,
         in a process of its own for each size: the largest resident set of it and of the largest of its workers
Result   see README.md
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlm_jax.config import FILTERS, CleanConfig, Config, DataConfig, to_json
from mlm_jax.data import prepare, sources
from mlm_jax.data.document import Fault
from mlm_jax.data.rules.filters import C4_SENTENCES, C4_WORDS


def repeated(config: DataConfig, n_bytes: int, path: Path) -> int:
    """Writes the documents of a source, over and over, as JSON lines of so many bytes in all; returns their number."""
    texts = [found.text for part in sources.parts(config) for found in sources.read(config, part) if not isinstance(found, Fault)]
    total = count = 0
    with path.open("w", encoding="utf-8") as file:
        for text in itertools.cycle(texts):
            total += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count += 1
            if total >= n_bytes:
                return count
    return count


def clean_with_prepare(path: Path, folder: Path) -> list[str]:
    """The texts that are left; what `prepare` does up to there."""
    config = DataConfig(source=str(path), workers=1, clean=CleanConfig(filters=FILTERS))
    (folder / "partial").mkdir(parents=True)
    work = prepare._enter(config, folder / "partial" / "work", 1 << 40)
    for task in range(len(work.slices)):
        prepare.Clean(work)(None, task, len(work.slices))
    return [json.loads(line)[0] for task in range(len(work.slices)) for line in work.file("clean", f"{task}.jsonl").open(encoding="utf-8")]


def clean_with_datatrove(path: Path, folder: Path) -> list[str]:
    """The texts that are left by datatrove's own pipeline, in the same order of filters."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.remove()
    c4 = C4QualityFilter(min_num_sentences=C4_SENTENCES, min_words_per_line=C4_WORDS)
    filters = [GopherRepetitionFilter(), GopherQualityFilter(), c4, FineWebQualityFilter()]
    reader = JsonlReader(str(path.parent), glob_pattern=path.name)
    steps = [reader, *filters, JsonlWriter(str(folder / "out"), compression=None)]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(folder / "logs")).run()
    return [json.loads(line)["text"] for file in sorted((folder / "out").glob("*")) for line in file.open(encoding="utf-8")]


def cleaning(text: str, megabytes: float, rounds: int) -> None:
    sides: dict[str, Callable[[Path, Path], list[str]]] = {"mlm_jax": clean_with_prepare, "datatrove alone": clean_with_datatrove}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "text.jsonl"
        count = repeated(DataConfig(source=text), int(megabytes * 1e6), path)
        for round_ in range(rounds + 1):  # the first one compares, and loads what is loaded once
            kept = {}
            for side, run in sides.items():
                folder = Path(name) / f"{side} {round_}"
                folder.mkdir()
                start = time.perf_counter()
                kept[side] = run(path, folder)
                seconds[side] += [time.perf_counter() - start] * (round_ > 0)
            if kept["mlm_jax"] != kept["datatrove alone"]:
                sys.exit("not the same work: the sides keep other texts")
        n = path.stat().st_size / 1e6
    print(
        f"{count:,} documents, {n:.1f} MB, {len(kept['mlm_jax']):,} kept\n\n| cleaning in one process | MB/s, median (range) | ratio |\n|---|---|---|"
    )
    reference = statistics.median(seconds["datatrove alone"])
    for side, found in seconds.items():
        rates = f"{n / statistics.median(found):.2f} ({n / max(found):.2f} to {n / min(found):.2f})"
        print(f"| {side} | {rates} | {reference / statistics.median(found):.2f} |")


def generate(path: Path, n_bytes: int) -> int:
    """Writes documents of some 2,000 bytes in paragraphs, all different, as JSON lines; returns their number."""
    draw = np.random.default_rng(0)
    vocabulary = np.array(["".join(word) for word in draw.choice(list("abcdefghijklmnopqrstuvwxyz"), (20_000, 7))])
    total = count = 0
    with path.open("w", encoding="utf-8") as file:
        while total < n_bytes:
            words = draw.choice(vocabulary, (1000, 6, 40))
            for document in words:
                text = "\n".join(" ".join(paragraph) + "." for paragraph in document)
                total += file.write(json.dumps({"text": text}) + "\n")
                count += 1
    return count


MEASURED = """
import json, resource, sys
from pathlib import Path
from mlm_jax.config import from_json
from mlm_jax.data.prepare import prepare
if __name__ == "__main__":
    config, folder = from_json(Path(sys.argv[1]).read_text()).data, Path(sys.argv[2])
    manifest = prepare(config, folder, say=lambda line: None)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"peaks": peaks, "tokens": manifest.splits["train"].tokens + manifest.splits["val"].tokens}))
"""


def memory(sizes: list[int], workers: int) -> None:
    print("| text, MB | documents | M tokens | seconds | MB/s | peak of the process, MB | of a worker, MB |\n|---|---|---|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            count = generate(folder / "text.jsonl", size * 1_000_000)
            clean = CleanConfig(duplicates="paragraphs", pii="mask")
            config = Config(name="memory", data=DataConfig(source=str(folder / "text.jsonl"), workers=workers, clean=clean))
            (folder / "config.json").write_text(to_json(config))
            (folder / "measured.py").write_text(MEASURED)
            start = time.perf_counter()
            command = [sys.executable, str(folder / "measured.py"), str(folder / "config.json"), str(folder / "tokens")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            taken, found = time.perf_counter() - start, json.loads(done.stdout)
            peaks = [f"{peak / 1024:.0f}" for peak in found["peaks"]]
            print(f"| {size} | {count:,} | {found['tokens'] / 1e6:.1f} | {taken:.1f} | {size / taken:.1f} | {' | '.join(peaks)} |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", choices=("cleaning", "memory"))
    arguments.add_argument("--text", default="python-docs", help="the source of the documents that are cleaned (default python-docs)")
    arguments.add_argument("--megabytes", type=float, default=10)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="megabytes of text (default 10 100 1000)")
    arguments.add_argument("--workers", type=int, default=2)
    args = arguments.parse_args()
    if args.only != "memory":
        cleaning(args.text, args.megabytes, args.rounds)
    if args.only != "cleaning":
        memory(args.sizes, args.workers)


if __name__ == "__main__":
    main()
