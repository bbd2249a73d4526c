"""Tokens per second of generation: ours against `transformers`, GPT-2 124M, float32, on the CPU, taking turns.

Run      python experiments/bench_generate.py                       (needs PyTorch: pip install torch)
Work     5 continuations of 50 tokens of "Once upon a time", sampled at temperature 1; random weights, the same for both; end of text
         is never reached, so that both write every token
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

from mlm_jax import decode, huggingface
from mlm_jax.config import ModelConfig
from mlm_jax.data import tokenizer as tokenizers
from mlm_jax.model import gpt2

PROMPT = "Once upon a time"
NEVER = 50_256


def ours(model: gpt2.Model, params: gpt2.Params, num: int, length: int) -> Callable[[], None]:
    ids = tokenizers.gpt2().encode(PROMPT)
    sampling = decode.Sampling()

    def run() -> None:
        # -1 is no token: nothing stops early.
        rows = decode.continuations(model, params, ids, num=num, max_tokens=length, eot_id=-1, sampling=sampling, seed=0)
        assert [len(row) for row in rows] == [length] * num

    return run


def theirs(folder: str, num: int, length: int) -> Callable[[], None]:
    import torch  # pyright: ignore[reportMissingImports]  # no dependency of ours
    import transformers

    model: Any = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizers.gpt2().encode(PROMPT).tolist()])
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": num, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": NEVER}

    def run() -> None:
        with torch.no_grad():
            rows = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert rows.shape == (num, ids.shape[1] + length)

    return run


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--num", type=int, default=5)
    arguments.add_argument("--length", type=int, default=50)
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    config = ModelConfig(vocab_size=50_257)
    model = gpt2.GPT2(config)
    params = gpt2.init(model, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        huggingface.export_weights(config, jax.tree.map(np.asarray, params), f"{folder}/hf")
        sides = {"mlm_jax": ours(model, params, args.num, args.length), "transformers": theirs(f"{folder}/hf", args.num, args.length)}
        for run in sides.values():
            run()  # compiles, and warms up
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                rates[name].append(args.num * args.length / (time.perf_counter() - start))
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    for name, rate in rates.items():
        print(f"{name:13s} {medians[name]:7.1f} tokens/s   (of {args.rounds}: {min(rate):.1f} to {max(rate):.1f})")
    print(f"ratio         {medians['mlm_jax'] / medians['transformers']:.2f}")


if __name__ == "__main__":
    main()
