"""How far our GPT-2 is from that of `transformers` in PyTorch: logits, loss and gradient, in every size, layout of weights and attention.

Run      python experiments/bench_parity.py [--sizes distilgpt2 124M]        (needs PyTorch: pip install torch)
Work     random float32 weights, wide enough that logits spread as a trained model's do, and 2 x 128 random tokens, on the CPU. PyTorch
         writes weights, logits, loss and gradient in a process of its own; another reads the weights as `mlm-jax import` does and compares.
         Layouts are those of distilgpt2; attentions are compared with our reference, those for TPUs interpreted
Columns  the standard deviation of the logits; the largest difference of a logit; of the loss; of an entry of a gradient over the largest of
         its tensor, and which tensor that is. The true gradient of a key bias is zero, as a softmax does not see it: its entries are
         measured by the largest of the c_attn.bias that it is part of. Memory is the largest resident set, in GB
Result   see README.md; exit status 1 where a difference is above its limit
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZES = {"distilgpt2": (6, 12, 768), "124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}
SHARDS, BIN, BARE, BUFFERS = "safetensors in shards", "pytorch_model.bin", "no prefix", "mask buffers"
HEAD, NANOGPT, MINGPT = "a head of its own", "nanoGPT's ckpt.pt", "minGPT's model.pt"
LAYOUTS = (SHARDS, BIN, BARE, BUFFERS, HEAD, NANOGPT, MINGPT)
ATTENTIONS = ("xla", "splash", "flash")  # that run on a CPU
LIMITS = {"logits": 1e-4, "loss": 1e-5, "gradient": 1e-4}
LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # (out, in) in nanoGPT and minGPT


class Computed(NamedTuple):
    """What a model makes of the tokens."""

    logits_BTV: Any
    loss: float
    names: Mapping[str, Any]  # of the tensors, as Hugging Face has them
    gradient: Callable[[str], np.ndarray]


def tokens() -> Any:
    return np.random.default_rng(0).integers(0, 50_257, (2, 128))


def peak() -> float:
    """GB of the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def theirs(size: str, layout: str, folder: Path) -> dict[str, Any]:
    """Writes a model's weights in a layout, its logits, loss and gradient; returns its peak memory."""
    import torch  # pyright: ignore[reportMissingImports]  # no dependency of ours
    import transformers
    from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]

    n_layer, n_head, n_embd = SIZES[size]
    shape: dict[str, Any] = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    torch.manual_seed(0)
    activation = "gelu" if layout == NANOGPT else "gelu_new"
    config = transformers.GPT2Config(**shape, tie_word_embeddings=layout not in (HEAD, MINGPT), activation_function=activation)
    model: Any = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))  # no mistake hides behind a zero or a one
            else:
                parameter.mul_((5 if "wte" in name or "lm_head" in name else 3) * (768 / n_embd) ** 0.5)

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    masks = {f"transformer.h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 1024, 1024)) for i in range(n_layer if layout in (BUFFERS, MINGPT) else 0)}
    weights = folder / "weights"
    weights.mkdir()
    if layout in ("safetensors", SHARDS, HEAD):
        model.save_pretrained(weights, max_shard_size="100MB" if layout == SHARDS else "100GB")
    elif layout == BIN:
        torch.save(state, weights / "pytorch_model.bin")
    elif layout == BARE:
        save_file({name.removeprefix("transformer."): t for name, t in state.items() if name != "lm_head.weight"}, weights / "model.safetensors")
    elif layout == BUFFERS:
        scalars = {name.replace(".bias", ".masked_bias"): torch.tensor(-1e4) for name in masks}
        save_file({name: t for name, t in (state | masks | scalars).items() if name != "lm_head.weight"}, weights / "model.safetensors")
    else:
        linear = {name: t.T.contiguous() if name.endswith(LINEAR) else t for name, t in state.items()}
        args = {**shape, "block_size": 1024, "vocab_size": 50_257, "bias": True, "dropout": 0.0}
        compiled = {f"_orig_mod.{name}": t for name, t in linear.items()}
        torch.save({"model": compiled, "model_args": args} if layout == NANOGPT else linear | masks, weights / layout.split()[-1])
    if layout not in (NANOGPT, MINGPT):
        config.save_pretrained(weights)
    del state

    out = model(input_ids=torch.from_numpy(tokens()), labels=torch.from_numpy(tokens()), use_cache=False)
    np.savez(folder / "out.npz", logits_BTV=out.logits.detach().numpy(), loss=out.loss.detach().numpy())
    out.loss.backward()
    save_file({name: parameter.grad.contiguous() for name, parameter in model.named_parameters()}, folder / "gradient.safetensors")
    return {"memory": peak()}


def ours(source: Any, attention: str = "reference") -> Computed:
    """What our model makes of the weights in `source`."""
    import jax
    import jax.numpy as jnp

    from mlm_jax import huggingface, objectives, sharding
    from mlm_jax.config import MeshConfig
    from mlm_jax.model import gpt2

    model = gpt2.GPT2(dataclasses.replace(source.config, attention=attention))
    tokens_BT = jnp.asarray(tokens(), jnp.int32)

    def loss_of(params: Any) -> tuple[Any, Any]:
        logits_BTV: Any = model.apply({"params": params}, tokens_BT)
        examples = objectives.causal(tokens_BT)
        return objectives.weighted_mean(objectives.cross_entropy(logits_BTV[:, :-1], examples.targets_BT), examples.weights_BT), logits_BTV

    params = source.params(sharding.make_mesh(MeshConfig(data=1)))  # each onto the device as it is read: one copy of the weights
    (loss, logits_BTV), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    return Computed(np.asarray(logits_BTV), float(loss), *huggingface.to_tensors(source.config, gradient))


def parts(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray, float]]:
    """(name, entries, what they are measured by) of a gradient; queries, keys and values lie side by side and differ in size."""
    if ".c_attn." not in name:
        yield name, tensor, float(np.abs(tensor).max())
        return
    for letter, part in zip("qkv", np.split(tensor, 3, axis=-1), strict=True):
        zero = letter == "k" and name.endswith("bias")
        yield f"{name} ({letter})", part, float(np.abs(tensor if zero else part).max())


def compare(found: Computed, bar: Computed) -> dict[str, Any]:
    """The differences, as a row of the table has them."""
    worst = (0.0, "")
    for name in bar.names:
        for (part, expected, unit), (_, got, _) in zip(parts(name, bar.gradient(name)), parts(name, found.gradient(name)), strict=True):
            worst = max(worst, (float(np.abs(got - expected).max()) / unit, part))
    logits, loss = float(np.abs(found.logits_BTV - bar.logits_BTV).max()), abs(found.loss - bar.loss)
    return {"std": float(bar.logits_BTV.std()), "logits": logits, "loss": loss, "gradient": worst[0], "tensor": worst[1], "memory": peak()}


def ours_against_theirs(size: str, layout: str, folder: Path) -> dict[str, Any]:
    """The row of a size and a layout that PyTorch has written."""
    from safetensors import safe_open

    from mlm_jax import huggingface

    settings = {"n_heads": SIZES[size][1], "activation": "gelu_tanh"} if layout == MINGPT else {}
    file = folder / "weights" / layout.split()[-1] if layout in (NANOGPT, MINGPT) else folder / "weights"
    found = ours(huggingface.open_weights(file, settings=settings))
    out = np.load(folder / "out.npz")
    with safe_open(folder / "gradient.safetensors", framework="numpy") as gradient:
        named = {name.removeprefix("transformer."): name for name in gradient.keys()}  # noqa: SIM118  # it is no dict
        assert set(named) == set(found.names)
        return compare(found, Computed(out["logits_BTV"], float(out["loss"]), named, lambda name: gradient.get_tensor(named[name])))


def ours_against_ours(size: str, attention: str, folder: Path) -> dict[str, Any]:
    """The row of an attention, against the reference on the same weights."""
    from mlm_jax import huggingface
    from mlm_jax.model.attention import interpreted

    source = huggingface.open_weights(folder / "weights")
    with interpreted():
        return compare(ours(source, attention), ours(source))


def in_a_process(side: str, *arguments: str) -> dict[str, Any]:
    """What the function of that name returns: each framework alone, so that the memory is its own, and on the CPU."""
    command = [sys.executable, __file__, "--side", side, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(f"{side} {' '.join(arguments)} ended with status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, found: Mapping[str, Any], memory: str) -> bool:
    """Prints a line of the table; True where everything is within its limit."""
    differences = " | ".join(f"{found[what]:.1e}" for what in LIMITS)
    print(f"| {name} | {found['std']:.1f} | {differences} | {found['tensor']} | {memory} |", flush=True)
    return all(found[what] <= limit for what, limit in LIMITS.items())  # False for NaN too


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    arguments.add_argument("--only-sizes", action="store_true", help="leave out the other layouts and attentions")
    arguments.add_argument("--side", nargs=4, metavar=("FUNCTION", "SIZE", "WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.side:
        side, size, what, folder = args.side
        side = {function.__name__: function for function in (theirs, ours_against_theirs, ours_against_ours)}[side]
        return print(json.dumps(side(size, what, Path(folder))))

    print("| GPT-2 | std of logits | logits | loss | gradient | of | GB, PyTorch and ours |\n|---|---|---|---|---|---|---|")
    print("| limit | | " + " | ".join(f"{limit:.0e}" for limit in LIMITS.values()) + " | | |", flush=True)
    fits = []
    layouts = () if args.only_sizes else LAYOUTS
    for size, layout in [(size, "safetensors") for size in args.sizes] + [("distilgpt2", layout) for layout in layouts]:
        with tempfile.TemporaryDirectory() as folder:
            bar = in_a_process("theirs", size, layout, folder)
            found = in_a_process("ours_against_theirs", size, layout, folder)
            name = size if layout == "safetensors" else f"{size}, {layout}"
            fits.append(row(name, found, f"{bar['memory']:.1f}, {found['memory']:.1f}"))
            for attention in ATTENTIONS if layout == SHARDS else ():
                found = in_a_process("ours_against_ours", size, attention, folder)
                fits.append(row(f"{size}, attention = {attention}", found, f"{found['memory']:.1f}"))
    if layouts:
        print("| distilgpt2, attention = cudnn | | needs a GPU | | | | |")
    sys.exit(not all(fits))


if __name__ == "__main__":
    main()
