"""Seconds and memory of Hugging Face -> ours -> Hugging Face, against `from_pretrained` and `save_pretrained` of transformers, on the CPU.

Run      python experiments/bench_convert.py [--size 1558M]         (needs PyTorch: pip install torch)
Work     a GPT-2 of random float32 weights in one safetensors file is read and written again; each round is a new process, the two take
         turns, and the files are in the page cache; the clock starts after the imports
Memory   the largest resident set of the process over the size of the weights, with the libraries that it imports and, in brackets,
         without; mapped pages of files count
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
    if side == "mlm_jax":
        from transformers import GenerationConfig, GPT2Config  # noqa: F401  # an export writes these two

        from mlm_jax import huggingface
    else:
        from transformers import GPT2LMHeadModel
    imported, start = peak(), time.perf_counter()
    if side == "mlm_jax":
        huggingface.export_weights(*huggingface.import_weights(source), out)
    else:
        GPT2LMHeadModel.from_pretrained(source).save_pretrained(out)
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
    rounds: dict[str, list[dict[str, float]]] = {"mlm_jax": [], "transformers": []}
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
                if (out / "model.safetensors").stat().st_size < 0.999 * size:
                    raise SystemExit(f"{side} did not write the whole model into one file")
                shutil.rmtree(out)
    seconds = {side: statistics.median(r["seconds"] for r in done) for side, done in rounds.items()}
    memory = {side: statistics.median(r["peak"] for r in done) / size for side, done in rounds.items()}
    without = {side: statistics.median(r["peak"] - r["imported"] for r in done) / size for side, done in rounds.items()}
    print(f"GPT-2 {args.size}, {size / 1e9:.2f} GB of weights, medians of {args.rounds}")
    for side, done in rounds.items():
        low, high = min(r["seconds"] for r in done), max(r["seconds"] for r in done)
        print(f"{side:13s} {seconds[side]:6.2f} s ({low:.2f} to {high:.2f})   peak {memory[side]:.2f} x the weights ({without[side]:.2f})")
    ratio, memory_ratio = seconds["mlm_jax"] / seconds["transformers"], memory["mlm_jax"] / memory["transformers"]
    print(f"ratio         {ratio:6.2f}                      {memory_ratio:.2f}")


if __name__ == "__main__":
    main()
