"""Seconds and memory of a conversion on the CPU: a Hugging Face folder through our parameters to another (`mlm-jax export`), and to a run
directory (`mlm-jax import`), against `from_pretrained` and `save_pretrained` of transformers.

Run      python experiments/bench_convert.py [--size 1558M]         (needs PyTorch: pip install torch)
Work     a GPT-2 of random float32 weights in one safetensors file is read and written again; each round is a new process, the sides take
         turns, and the files are in the page cache; the clock starts after the imports. A run directory's files are also read again, for
         their checksums
Memory   the largest resident set of the process over the size of the weights, with the libraries that it imports, and without; mapped pages
         of files count
Result   see README.md
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}  # layers, heads, width


def write_random(size: str, folder: Path) -> None:
    """Writes the model that is converted."""
    import numpy as np

    from mlm_jax import huggingface, weights
    from mlm_jax.config import ModelConfig

    n_layers, n_heads, width = SIZES[size]
    config = ModelConfig(vocab_size=50_257, n_layers=n_layers, n_heads=n_heads, d_model=width, d_ff=4 * width)
    rng = np.random.default_rng(0)
    shapes = {huggingface.PREFIX + name: shape for name, shape in huggingface.tensor_shapes(config).items()}
    folder.mkdir()
    weights.write_safetensors(folder / "model.safetensors", shapes, lambda name: 0.02 * rng.standard_normal(shapes[name], np.float32))
    values = {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1024, "n_layer": n_layers, "n_head": n_heads, "n_embd": width}
    (folder / "config.json").write_text(json.dumps(values | {"architectures": ["GPT2LMHeadModel"]}))


def peak() -> int:
    """Bytes of the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def convert(side: str, source: Path, out: Path) -> None:
    """One round, in a process of its own: prints seconds and peak memory as JSON."""
    if side == "transformers":
        from transformers import GPT2LMHeadModel
    else:
        import jax
        from transformers import GenerationConfig, GPT2Config  # noqa: F401  # an export writes these two

        from mlm_jax import huggingface, runs

        jax.devices()
    # In a virtual machine memory that was not used of late is first asked of the host, which takes longer than all else: not for us to measure.
    subprocess.run([sys.executable, "-c", f"b'1' * {3 * (source / 'model.safetensors').stat().st_size // 2}"], check=True)
    imported, start = peak(), time.perf_counter()
    if side == "transformers":
        GPT2LMHeadModel.from_pretrained(source).save_pretrained(out)
    elif side == "export":
        weights = huggingface.open_weights(source)
        huggingface.export_weights(weights.config, weights.unread(), out)
    else:
        runs.import_model(str(source), out, tokenizer="gpt2", say=lambda line: None)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak(), "imported": imported}))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", choices=SIZES, default="124M")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--write", help=argparse.SUPPRESS)
    arguments.add_argument("--convert", nargs=3, metavar=("SIDE", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.write:
        return write_random(args.size, Path(args.write))
    if args.convert:
        side, source, out = args.convert
        return convert(side, Path(source), Path(out))
    rounds: dict[str, list[dict[str, float]]] = {"export": [], "import": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        # In a process too: the peak of a new process begins at that of its parent.
        subprocess.run([sys.executable, __file__, "--size", args.size, "--write", str(source)], check=True)
        size = (source / "model.safetensors").stat().st_size
        for _ in range(args.rounds):
            for side, done in rounds.items():
                os.sync()  # else a round waits for the disk to take what the one before it wrote
                command = [sys.executable, __file__, "--convert", side, str(source), str(out)]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                done.append(json.loads(printed.splitlines()[-1]))
                if sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) < 0.999 * size:
                    raise SystemExit(f"{side} did not write the whole model")
                shutil.rmtree(out)
    print(f"GPT-2 {args.size}, {size / 1e9:.2f} GB of weights, medians of {args.rounds}; peak memory over the weights, less the libraries")

    def median(side: str, what: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(what, rounds[side]))

    for side, done in rounds.items():
        seconds, memory = median(side, lambda r: r["seconds"]), median(side, lambda r: r["peak"])
        low, high = min(r["seconds"] for r in done), max(r["seconds"] for r in done)
        ratio = seconds / median("transformers", lambda r: r["seconds"])
        without = median(side, lambda r: r["peak"] - r["imported"])
        print(f"{side:13s} {seconds:6.2f} s ({low:.2f} to {high:.2f}), ratio {ratio:.2f}   peak {memory / size:.2f}, {without / size:.2f}")


if __name__ == "__main__":
    main()
