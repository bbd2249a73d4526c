"""Tokens per second of training: our step against a PyTorch loop on transformers' GPT2LMHeadModel, the same work, taking turns.

Run      python experiments/bench_train.py                                     (PyTorch beside ours where it is installed: pip install torch)
         python experiments/bench_train.py --size 355M --batch 16x1024         (on a GPU)
Work     the whole optimizer step: forward, backward, clipping at norm 1, AdamW (fused in PyTorch) with decay on weights alone, no dropout,
         vocabulary 50,257, new tokens in each step, the same for both. Both start from the same weights: the first losses must be equal.
         Our step is compiled as `train` does, with model.unroll_layers = True, as an experiment may set it. Each side is a process of its own
         with its own threads, on the same cores, and waits while the others work. On a CPU float32; beside PyTorch as it is, PyTorch that keeps
         freed memory as `mlm-jax` does (the allocator of the C library spares it page faults), in float32 and with bfloat16 autocast. On a GPU
         bfloat16 on both sides, with the share of the peak (formula: mlm_jax/metrics.py; peaks: chips.py)
Result   see README.md
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZES = {"toy": (2, 2, 32), "124M": (12, 12, 768), "355M": (24, 16, 1024)}  # layers, heads, width
VOCAB = 50_257
OPTIM: dict[str, Any] = {"peak_lr": 3e-4, "weight_decay": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": 1.0}
OURS, STOCK, KEEPING = "mlm_jax", "PyTorch", "PyTorch keeping freed memory"
CHECKED = 3  # steps whose losses are compared
LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}  # of their difference, in nats

Run = Callable[[str, int], list[float]]  # takes that many steps in that precision and returns their losses


class Work(NamedTuple):
    """What one step is."""

    size: str
    rows: int
    context_len: int
    set: tuple[str, ...]  # changes of our configuration

    @property
    def tokens(self) -> int:
        return self.rows * self.context_len

    def batch(self, step: int) -> np.ndarray:
        """The windows of a step, int32, each one token longer than its inputs."""
        return np.random.default_rng(step).integers(0, VOCAB, (self.rows, self.context_len + 1), np.int32)


def configuration(work: Work, platform: str) -> Any:
    """Our configuration."""
    from mlm_jax.config import Config, ModelConfig, OptimConfig, TrainConfig, override, parse_set

    n_layers, n_heads, width = SIZES[work.size]
    shape = {"n_layers": n_layers, "n_heads": n_heads, "d_model": width, "d_ff": 4 * width, "context_len": work.context_len, "unroll_layers": True}
    config = Config(
        name="bench_train",
        model=ModelConfig(vocab_size=VOCAB, **shape, compute_dtype="float32" if platform == "cpu" else "bfloat16"),
        optim=OptimConfig(**OPTIM, schedule="constant", warmup_steps=0),
        train=TrainConfig(batch_size=work.rows),
    )
    return override(config, parse_set(list(work.set)))


def ours(work: Work, folder: Path) -> tuple[Run, dict[str, Any]]:
    """Our step, and what is said about it."""
    import jax

    from mlm_jax import chips, huggingface, metrics, sharding
    from mlm_jax.model import gpt2
    from mlm_jax.train import first_state, lower_step

    device = jax.devices()[0]
    config = configuration(work, device.platform)
    model, mesh = gpt2.GPT2(config.model), sharding.make_mesh(config.mesh, jax.devices()[:1])
    jax.sharding.set_mesh(mesh)
    state = first_state(config, model, mesh)
    n_params = gpt2.n_params(state.params)
    huggingface.export_weights(config.model, jax.tree.map(np.asarray, state.params), folder)
    start = time.perf_counter()
    step = lower_step(config, model, mesh, work.rows).compile()
    facts = {"compiled_s": time.perf_counter() - start, "device": device.device_kind, "platform": device.platform}
    done = 0

    def run(precision: str, steps: int) -> list[float]:
        nonlocal state, done
        losses = []
        for _ in range(steps):
            shape = (work.rows, work.context_len + 1)
            batch = sharding.put_rows(lambda start, stop, s=done: work.batch(s)[start:stop], shape, np.int32, mesh)
            state, figures = step(state, batch)
            losses.append(figures["loss"])
            done += 1
        jax.block_until_ready(state)
        return [float(loss) for loss in losses]

    flops = work.tokens * metrics.flops_per_token(config.model, n_params)
    return run, facts | {"precision": config.model.compute_dtype, "peak": chips.peak_flops(device.device_kind), "flops": flops}


def theirs(work: Work, folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    """PyTorch's step, and what is said about it."""
    import torch  # pyright: ignore[reportMissingImports]  # no dependency of ours
    import transformers

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    without = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa", **without)
    model = model.train().to(device)
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.dim() > 1].append(parameter)
    decays = [{"params": group, "weight_decay": OPTIM["weight_decay"] * decays} for decays, group in groups.items()]
    adamw = torch.optim.AdamW(decays, lr=OPTIM["peak_lr"], betas=(OPTIM["b1"], OPTIM["b2"]), eps=OPTIM["eps"], fused=True)
    done = 0

    def run(precision: str, steps: int) -> list[float]:
        nonlocal done
        losses = []
        for _ in range(steps):
            tokens = torch.from_numpy(work.batch(done)).long().to(device)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(tokens[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB).float(), tokens[:, 1:].reshape(-1))
            del logits
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["clip_norm"])
            adamw.step()
            adamw.zero_grad()
            losses.append(loss.detach())
            done += 1
        return [loss.item() for loss in losses]  # waits for the device

    return run, {"version": f"PyTorch {torch.__version__}, transformers {transformers.__version__}"}


def gemm_rate(work: Work, platform: str) -> float:
    """FLOP/s of our compiler's products with weights, of the step's shapes: forward, and both gradients; no smaller than what a step can have."""
    import jax
    import jax.numpy as jnp

    _, _, D = SIZES[work.size]
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    seconds = flops = 0.0
    for inputs, outputs, times in ((D, D, 4), (D, 4 * D, 1), (4 * D, D, 1)):  # of a block
        x, w, y = (jnp.ones(shape, dtype) for shape in ((work.tokens, inputs), (inputs, outputs), (work.tokens, outputs)))
        for letters, a, b in (("bi,io->bo", x, w), ("bo,io->bi", y, w), ("bi,bo->io", x, y)):
            product = jax.jit(lambda a, b, letters=letters: jnp.einsum(letters, a, b))
            found = []
            for _ in range(4):
                start = time.perf_counter()
                product(a, b).block_until_ready()
                found.append(time.perf_counter() - start)
            seconds += times * min(found)
            flops += times * 2 * work.tokens * inputs * outputs
    return flops / seconds


def serve(side: str, work: Work, folder: Path, threads: int) -> None:
    """The process of a side: takes the steps that it is told to, one line of JSON for each turn."""
    from mlm_jax.cli import keep_freed_memory

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA makes as many threads as there are cores
    if side != STOCK:
        keep_freed_memory()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no reply
    run, facts = ours(work, folder) if side == OURS else theirs(work, folder, threads)
    replies.write(json.dumps(facts) + "\n")
    for line in sys.stdin:
        precision, steps = json.loads(line)
        if precision == "gemm":
            replies.write(json.dumps(gemm_rate(work, facts["platform"])) + "\n")
            continue
        start = time.perf_counter()
        losses = run(precision, steps)
        replies.write(json.dumps({"seconds": time.perf_counter() - start, "losses": losses}) + "\n")


class Side:
    """A process that runs `serve`."""

    def __init__(self, side: str, work: Work, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--size", work.size, "--batch", f"{work.rows}x{work.context_len}", "--threads", str(threads)]
        command += [f"--set={change}" for change in work.set] + ["--side", side, str(folder)]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment | {"PYTHONPATH": path}
        )
        self.facts = self.reply()

    def reply(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, precision: str, steps: int = 0) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps((precision, steps)) + "\n")
        self.process.stdin.flush()
        return self.reply()

    def close(self) -> None:
        self.process.communicate()  # its input ends, and so does it


def measure(work: Work, rounds: int, seconds: float, threads: int, torch: bool) -> list[list[str]]:
    """The rows of the table for `work`; prints what is not in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hf"
        us = Side(OURS, work, folder, threads)  # writes the weights that the others read
        precision, on_cpu = us.facts["precision"], us.facts["platform"] == "cpu"
        turns = {f"{OURS}, {precision}": (us, precision)}
        if torch and on_cpu:
            turns[f"{STOCK}, {precision}"] = (Side(STOCK, work, folder, threads), precision)
        if torch:
            them = Side(KEEPING if on_cpu else STOCK, work, folder, threads)
            turns |= {f"{KEEPING if on_cpu else STOCK}, {kind}": (them, kind) for kind in dict.fromkeys((precision, "bfloat16"))}
    losses: dict[str, list[float]] = {}
    steps: dict[str, int] = {}
    for name, (side, kind) in turns.items():  # the first steps warm up
        replies = [side.ask(kind, 1) for _ in range(CHECKED if kind == precision else 1)]
        steps[name] = max(1, round(seconds / replies[-1]["seconds"]))
        if kind == precision:
            losses[name] = [loss for reply in replies for loss in reply["losses"]]
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, (side, kind) in turns.items():
            found[name].append(side.ask(kind, steps[name])["seconds"] / steps[name])
    rate, busy = us.ask("gemm"), os.getloadavg()[0]
    for side in {id(side): side for side, _ in turns.values()}.values():
        side.close()

    own, us_facts = found[f"{OURS}, {precision}"], us.facts
    versions = [side.facts["version"] for name, (side, _) in turns.items() if not name.startswith(OURS)][:1] or ["no PyTorch"]
    print(f"{work.size}, {work.rows} x {work.context_len} on {us_facts['device']}, {threads} threads, load {busy:.1f}; {versions[0]}")
    at_rate = us_facts["flops"] / rate
    print(
        f"our step compiled in {us_facts['compiled_s']:.0f} s; products of a block's shapes run at {rate / 1e9:.0f} GFLOP/s; "
        f"the {us_facts['flops'] / 1e9:,.0f} model GFLOP of a step would take {at_rate:.2f} s so, our fastest took {min(own):.2f} s"
    )
    gaps = {name: max(abs(a - b) for a, b in zip(losses[f"{OURS}, {precision}"], found, strict=True)) for name, found in losses.items()}
    print("\n".join(f"first losses of {name}: {', '.join(f'{loss:.5f}' for loss in losses[name])}" for name in losses), flush=True)
    for name, gap in gaps.items():
        if not gap <= LIMITS[precision]:
            raise SystemExit(f"the first losses of {name} differ from ours by {gap:.1e}, more than {LIMITS[precision]}: not the same work")
    rows = []
    for name, times in found.items():
        median, best = statistics.median(times), min(times)
        rates = f"{work.tokens / median:,.0f} ({work.tokens / max(times):,.0f} to {work.tokens / best:,.0f})"
        ratio = "1" if times is own else f"{median / statistics.median(own):.2f} ({best / min(own):.2f})"
        rows.append([work.size, f"{work.rows} x {work.context_len}", name, rates, ratio, f"{gaps[name]:.0e}" if name in gaps and torch else "-"])
        if us_facts["peak"]:
            rows[-1].append(f"{us_facts['flops'] / (median * us_facts['peak']):.1%}")
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", choices=SIZES, action="append", help="repeatable (default 124M)")
    arguments.add_argument("--batch", metavar="ROWSxPOSITIONS", action="append", help="repeatable (default 4x128 and 2x1024)")
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    arguments.add_argument("--seconds", type=float, default=4.0, help="how many steps are a turn: about so long, at least one (default 4)")
    arguments.add_argument("--threads", type=int, default=2, help="of each side, on a CPU (default 2)")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of our configuration; repeatable")
    arguments.add_argument("--alone", action="store_true", help="without PyTorch")
    arguments.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    sizes, batches = args.size or ["124M"], args.batch or ["4x128", "2x1024"]
    works = [Work(size, int(rows), int(T), tuple(args.set)) for size in sizes for rows, T in (batch.split("x") for batch in batches)]
    if args.side:
        return serve(args.side[0], works[0], Path(args.side[1]), args.threads)
    torch = not args.alone and importlib.util.find_spec("torch") is not None
    rows = [row for work in works for row in measure(work, args.rounds, args.seconds, args.threads, torch)]
    heads = ["GPT-2", "batch", "side", "tokens/s, median (range)", "ours over it, medians (fastest steps)", "first losses differ by", "of the peak"]
    print()
    for row in (heads[: len(rows[0])], ["---"] * len(rows[0]), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
