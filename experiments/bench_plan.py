"""Is a plan any good: on the machine at hand estimated against measured, ten small models; on TPUs whether it moves as theory says.

Run      python experiments/bench_plan.py
         python experiments/bench_plan.py --topology v5e:2x4    (pip install -e ".[tpu]", no TPU; eight compilations of GPT-2 124M)
Work     the step of `mlm-jax train` in float32 on a machine of one device, with random tokens: a small GPT-2, and changes of it one by one. All are
         compiled first (some seconds each), then measured in turns, so that what else the machine does hits all alike
Columns  what is counted in the step's jaxpr (mlm_jax/plan/counted.py): FLOPs of products, bytes through memory; then seconds: the least that the
         machine's rates allow, the estimate, and the median and range of what was measured. Below the table, Spearman's rank correlation
         With --topology: cycles, kernels and memory as `mlm-jax plan` has them, and what became of the first row's
Result   see README.md
"""

import argparse
import concurrent.futures
import multiprocessing
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax import sharding
from mlm_jax.cli import keep_freed_memory
from mlm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, override
from mlm_jax.model import gpt2
from mlm_jax.plan import counted
from mlm_jax.train import trace_step

BASE = Config(
    name="bench_plan",
    model=ModelConfig(vocab_size=2048, n_layers=4, n_heads=4, d_model=128, d_ff=512, context_len=128),
    train=TrainConfig(batch_size=4),
    mesh=MeshConfig(data=1),
)
WIDE = {"model.d_model": 256, "model.d_ff": 1024}
ROWS: dict[str, dict[str, Any]] = {
    "4 layers, D 128, 4 x 128 tokens, V 2048": {},
    "2 layers, 2 x 128 tokens": {"model.n_layers": 2, "train.batch_size": 2},
    "8 layers": {"model.n_layers": 8},
    "D 256": WIDE,
    "16 x 128 tokens": {"train.batch_size": 16},
    "4 x 512 tokens": {"model.context_len": 512},
    "2 layers, D 512, 1 x 16 tokens": {"model.n_layers": 2, "model.d_model": 512, "model.d_ff": 2048, "model.context_len": 16, "train.batch_size": 1},
    "V 16384, loss_chunks = 4": {"model.vocab_size": 16_384, "train.loss_chunks": 4},
    "16 x 128 tokens, remat = full": {"train.batch_size": 16, "model.remat": "full"},
    "D 256, 16 x 128 tokens, micro_batches = 4": WIDE | {"train.batch_size": 16, "train.micro_batches": 4},
}

KNOBS_BASE: dict[str, Any] = {"train.batch_size": 32, "mesh.data": 1, "mesh.fsdp": -1, "model.vocab_size": 50_304, "model.attention": "flash"}
KNOBS: dict[str, dict[str, Any]] = {
    "4 x 1024 tokens on each of 8 chips, 12 layers, bfloat16, flash attention": {},
    "8 x 1024 tokens": {"train.batch_size": 64},
    "6 layers": {"model.n_layers": 6},
    "float32": {"model.compute_dtype": "float32"},
    "remat = full": {"model.remat": "full"},
    "remat = dots": {"model.remat": "dots"},
    "loss_chunks = 8": {"train.loss_chunks": 8},
    "splash attention": {"model.attention": "splash"},
}


def knobs(plans: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the plans of KNOBS, one after the other."""
    lines = ["| step | forward | again | backward | all, M cycles | of the first | kernels, GFLOP | kept, GiB | temporaries, GiB |", "|---" * 9 + "|"]
    totals = [sum(n for parts in made["cycles"].values() for n in parts.values()) for made in plans]
    for row, made, total in zip(KNOBS, plans, totals, strict=True):
        phases = " | ".join(f"{sum(made['cycles'].get(phase, {}).values()) / 1e6:.1f}" for phase in ("forward", "recomputed", "backward"))
        kernels, m = sum(kernel["flops"] for kernel in made["kernels"]) / 1e9, made["memory"]
        memory = f"{m['activations'] / 2**30:.2f} | {m['temporaries'] / 2**30:.2f}"
        lines.append(f"| {row} | {phases} | {total / 1e6:.1f} | {total / totals[0]:.2f} | {kernels:.0f} | {memory} |")
    return lines


def planned(topology: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The plan of GPT-2 124M with `changes`, in a process of its own."""
    from experiments.gpt2_124m import CONFIG
    from mlm_jax.plan import topology as topologies
    from mlm_jax.plan import tpu

    return tpu.plan(override(CONFIG, KNOBS_BASE | changes), gpt2.GPT2, topologies.parse(topology)).to_json()


def count(config: Config) -> counted.Counted:
    """The work of the step of `config` on one device."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.sharding.set_mesh(mesh):
        return counted.count(trace_step(config, gpt2.GPT2(config.model), mesh, config.train.batch_size).jaxpr)


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: the correlation of the ranks; no two values are the same."""
    a, b = (np.argsort(np.argsort(values)) for values in (x, y))
    return float(np.corrcoef(a, b)[0, 1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--topology", metavar="SLICE", help="TPUs that are not there, in place of the machine at hand")
    args = arguments.parse_args()
    if args.topology:
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            plans = list(pool.map(planned, [args.topology] * len(KNOBS), KNOBS.values()))
        return print("\n".join(knobs(plans)))
    keep_freed_memory()
    configs = {row: override(BASE, changes) for row, changes in ROWS.items()}
    works = {row: count(config) for row, config in configs.items()}
    steps = {row: counted.stepper(config, gpt2.GPT2) for row, config in configs.items()}
    machine = counted.measure_machine(("float32",))
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for number in range(1 + args.rounds):  # the first warms up
        for row, step in steps.items():
            seconds = step()
            if number:
                found[row].append(seconds)
    rates = f"{machine.flops_per_s['float32'] / 1e9:.0f} GFLOP/s, {machine.bytes_per_s / 1e9:.0f} GB/s"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {rates}\n")
    print("| step | GFLOP | GB | at least, ms | estimate, ms | measured, ms | over the estimate |\n|---|---|---|---|---|---|---|")
    estimates, medians = [], []
    for row, work in works.items():
        times, guess = found[row], counted.estimate(work, machine)
        estimates.append(guess.step_s)
        medians.append(statistics.median(times))
        counts = f"{sum(work.flops.values()) / 1e9:.1f} | {work.bytes / 1e9:.2f}"
        measured = f"{1e3 * medians[-1]:.0f} ({1e3 * min(times):.0f} to {1e3 * max(times):.0f})"
        print(f"| {row} | {counts} | {1e3 * guess.lower_s:.0f} | {1e3 * guess.step_s:.0f} | {measured} | {medians[-1] / guess.step_s:.2f} |")
    print(
        f"\nrank correlation {rank_correlation(estimates, medians):.2f}, the slowest step takes {max(medians) / min(medians):.1f} times the quickest"
    )


if __name__ == "__main__":
    main()
