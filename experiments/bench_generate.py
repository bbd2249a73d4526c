"""Tokens per second of generation: ours, also with int8 weights, against `transformers`, GPT-2 124M, float32, on the CPU, taking turns.

Run      python experiments/bench_generate.py                       (needs PyTorch: pip install torch)
Work     continuations of "Once upon a time", sampled at temperature 1, at three sizes; random weights, the same for both; the end of
         text is banned, so that both write every token. The time to the first token is that of one token, all compiled
Result   see README.md
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import mlm_jax
from mlm_jax import huggingface
from mlm_jax.cli import keep_freed_memory
from mlm_jax.config import ModelConfig
from mlm_jax.data import tokenizer as tokenizers
from mlm_jax.model import gpt2

PROMPT = "Once upon a time"
SIZES = ((5, 50), (1, 128), (8, 256))  # (continuations, tokens of each)

Run = Callable[[int, int], None]


def ours(model: gpt2.Model, params: gpt2.Params) -> Run:
    tokenizer = tokenizers.gpt2()

    def run(num: int, length: int) -> None:
        texts = mlm_jax.generate(model, params, tokenizer, PROMPT, num=num, max_tokens=length, min_tokens=length)
        assert len(texts) == num

    return run


def theirs(folder: str) -> Run:
    import torch  # pyright: ignore[reportMissingImports]  # no dependency of ours
    import transformers

    model: Any = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = tokenizers.gpt2()
    ids = torch.tensor([tokenizer.encode(PROMPT).tolist()])

    def run(num: int, length: int) -> None:
        settings = {"do_sample": True, "top_k": 0, "num_return_sequences": num, "pad_token_id": tokenizer.eot_id}
        with torch.no_grad():
            rows = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=length, max_new_tokens=length, **settings)
        assert rows.shape == (num, ids.shape[1] + length)
        tokenizer.decode(rows[0].numpy())

    return run


def seconds(run: Run, num: int, length: int) -> float:
    start = time.perf_counter()
    run(num, length)
    return time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    keep_freed_memory()
    config = ModelConfig(vocab_size=50_257)
    model = gpt2.GPT2(config)
    params = gpt2.init(model, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        huggingface.export_weights(config, jax.tree.map(np.asarray, params), f"{folder}/hf")
        sides = {"mlm_jax": ours(model, params), "mlm_jax int8": ours(model, mlm_jax.int8(params)), "transformers": theirs(f"{folder}/hf")}
    for num, length in (*SIZES, (1, 1)):
        for run in sides.values():
            run(num, length)  # compiles, and warms up
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, run in sides.items():
                times[name].append(seconds(run, num, length))
        medians = {name: statistics.median(found) for name, found in times.items()}
        ratio = ", ".join(f"{medians['transformers'] / medians[name]:.2f}" for name in list(sides)[:2])
        if length == 1:
            words = [f"{name} {1000 * medians[name]:.0f} ms" for name in sides]
            print(f"first token  {'   '.join(words)}   ratios {ratio}")
            continue
        words = [
            f"{name} {num * length / medians[name]:.1f} ({num * length / max(t):.1f} to {num * length / min(t):.1f})" for name, t in times.items()
        ]
        print(f"{num} x {length:<4d} tokens/s   {'   '.join(words)}   ratios {ratio}", flush=True)


if __name__ == "__main__":
    main()
