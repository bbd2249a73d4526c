"""What each knob saves: the memory of a train step as the compiler plans it, on this machine or on a TPU that is not there.

Run      python experiments/bench_memory.py --topology v5e:2x4        (needs libtpu: pip install "jax[tpu]"); without: the devices at hand
Work     the step of `mlm-jax train`, compiled and not run, laid out over the devices as a run lays it out. With a topology by default GPT-2 124M
         in bfloat16 with FSDP, 64 x 1,024 tokens, so 8 rows on each chip of v5e:2x4; without, 8 x 1,024 in float32 on the first device. A
         row takes one to two minutes on a core
Columns  GiB on one device: state and batch (arguments); what of the new state is written over the old (alias); what the step needs beside them
         (temporaries); the peak, arguments, results and temporaries, what is shared counted once; temporaries in the host's memory
Result   see README.md. Believe the table of a TPU: on a CPU, XLA merges what `model.remat` computes again with the first computation where it
         can, and the host's memory is the device's
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from mlm_jax import experiment, sharding
from mlm_jax.config import OPTIMIZERS, Config, ModelConfig, OptimConfig, override, parse_set
from mlm_jax.model import gpt2
from mlm_jax.plan import topology
from mlm_jax.train import abstract_state, lower_step

VOCAB_SIZE = 50_257  # where the experiment leaves it to a tokenizer
TPU = {"train.batch_size": 64, "mesh.data": 1, "mesh.fsdp": -1}  # what `--set` may change
HERE = {"train.batch_size": 8, "model.compute_dtype": "float32"}


def named(name: str) -> dict[str, Any]:
    """The changes to optimizer `name`: what it does not read is as by default."""
    return {"optim.name": name} | {f"optim.{field}": getattr(OptimConfig, field) for field in OPTIMIZERS["muon"] if field not in OPTIMIZERS[name]}


ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"micro_batches = {k}": {"train.micro_batches": k} for k in (2, 4, 8)},
    "loss_chunks = 8": {"train.loss_chunks": 8},
    **{f"remat = {name}": {"model.remat": name} for name in ("full", "attention", "offload", "dots")},
    "remat = full, loss_chunks = 8": {"model.remat": "full", "train.loss_chunks": 8},
    "moment_dtype = bfloat16": {"optim.moment_dtype": "bfloat16"},
    **{f"optim.name = {name}": named(name) for name in ("adafactor", "lion", "muon")},
    "ema_decay = 0.999": {"optim.ema_decay": 0.999},
}


class Memory(NamedTuple):
    """Bytes on one device."""

    state: int  # its part of the TrainState, by the shapes
    arguments: int
    outputs: int
    alias: int  # of the outputs, that are written over arguments
    temporaries: int
    host: int  # temporaries in the host's memory

    @property
    def peak(self) -> int:
        """What has to fit."""
        return self.arguments + self.outputs - self.alias + self.temporaries


def measure(config: Config, devices: Sequence[Any] | None = None, build: Callable[[ModelConfig], gpt2.Model] = gpt2.GPT2) -> Memory:
    """The memory of the train step of `config`, compiled for `devices` (default: all of this machine) as `train` compiles it."""
    c = config.train
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(mesh, c.batch_size, config.model.context_len, c.micro_batches)
    model = build(config.model)
    with jax.sharding.set_mesh(mesh):
        state = abstract_state(config, model, mesh)
        plan: Any = lower_step(config, model, mesh, c.batch_size).compile().memory_analysis()
    mine = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    sizes = (getattr(plan, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp", "host_temp"))
    return Memory(mine, *sizes)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--experiment", default="experiments/gpt2_124m.py")
    arguments.add_argument(
        "--topology", default="", metavar="NAME", help="of a TPU slice, for example v5e:2x4; default: the first device of this machine"
    )
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field in all rows; repeatable")
    arguments.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"some of: {'; '.join(ROWS)}")
    args = arguments.parse_args()
    found = experiment.load(args.experiment)
    size = {} if found.config.model.vocab_size else {"model.vocab_size": VOCAB_SIZE}
    base = override(found.config, size | (TPU if args.topology else HERE) | parse_set(args.set))
    devices = topology.parse(args.topology).devices() if args.topology else jax.devices()[:1]
    work = f"{base.train.batch_size} x {base.model.context_len} tokens in {base.model.compute_dtype}"
    print(f"{base.name}, {work} on {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}\n")
    print("| GiB on a device | arguments | written over | temporaries | peak | on the host |\n|---|---|---|---|---|---|", flush=True)
    for row in args.rows:
        started = time.monotonic()
        try:
            got = measure(override(base, ROWS[row]), devices, found.build)
            cells = [f"{size / 2**30:.2f}" for size in (got.arguments, got.alias, got.temporaries, got.peak, got.host)]
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            cells = ["does not fit: " + " ".join(str(e).split())[:200], "", "", "", ""]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
