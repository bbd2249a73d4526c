"""What a checkpoint costs: the time that a run loses by a save in the background, the time to restore it, its bytes on disk.

Run      python experiments/bench_checkpoint.py --out /tmp/bench_checkpoint            (the folder is made, and what is in it removed at the end)
         python experiments/bench_checkpoint.py --experiment experiments/gpt2_355m.py --batch 8x1024 --out /mnt/disk/bench      (on a TPU VM, say)
Work     the train step and the checkpoint of `mlm-jax train`: parameters and both moments of AdamW in float32. A turn is so many steps; every
         other turn saves after its first step. A save is waited for at the end of its turn, if it is not done by then. Lost is the time of a
         turn with a save less that of the turn before it
Result   see README.md
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from mlm_jax import checkpoint, experiment, sharding
from mlm_jax.cli import keep_freed_memory
from mlm_jax.config import override, parse_set
from mlm_jax.model import gpt2
from mlm_jax.train import abstract_state, first_state, lower_step, progress

VOCAB_SIZE = 50_257  # where the experiment leaves it to a tokenizer
EVERY = 100  # steps between two saves, for the share


def words(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--experiment", default=str(Path(__file__).with_name("gpt2_124m.py")), help="an experiment file (default GPT-2 124M)")
    arguments.add_argument("--batch", metavar="ROWSxPOSITIONS", default="4x128", help="of a step (default 4x128)")
    arguments.add_argument("--steps", type=int, default=10, help="of a turn (default 10)")
    arguments.add_argument("--rounds", type=int, default=5, help="turns with and without a save (default 5 each)")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field; repeatable")
    arguments.add_argument("--out", type=Path, required=True, help="a folder on the disk to measure; it must not exist")
    args = arguments.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; name a folder that does not")
    keep_freed_memory()

    B, T = map(int, args.batch.split("x"))
    made = experiment.load(args.experiment)
    changes = {
        "train.batch_size": B,
        "train.micro_batches": 1,
        "model.context_len": T,
        "model.vocab_size": made.config.model.vocab_size or VOCAB_SIZE,
    }
    changes |= {"model.compute_dtype": "float32"} if jax.default_backend() == "cpu" else {}
    config = override(made.config, changes | parse_set(args.set))
    model, mesh = made.build(config.model), sharding.make_mesh(config.mesh)
    draw = np.random.default_rng(0)
    try:
        with jax.sharding.set_mesh(mesh), checkpoint.Checkpoints(args.out, keep=1) as checkpoints:
            state = first_state(config, model, mesh)
            n_params = gpt2.n_params(state.params)
            step = lower_step(config, model, mesh, B).compile()
            tokens = draw.integers(0, config.model.vocab_size, (B, T + 1), np.int32)
            batch = sharding.put_rows(lambda start, stop: tokens[start:stop], tokens.shape, np.int32, mesh)

            def turn(save: int = 0) -> tuple[float, float]:
                """Seconds of a turn, and of these the ones in which the loop stood still for save number `save`."""
                nonlocal state
                start, stood = time.perf_counter(), 0.0
                for n in range(args.steps):
                    state, _ = step(state, batch)
                    jax.block_until_ready(state)
                    if save and n == 0:
                        before = time.perf_counter()
                        checkpoints.save(save, state.params, progress(state))
                        stood = time.perf_counter() - before
                checkpoints.wait()
                return time.perf_counter() - start, stood

            for save in (0, 1):  # compiled, and the first files made
                turn(save)
            without, lost, stood = [], [], []
            for number in range(args.rounds):
                without.append(turn()[0])
                seconds, stands = turn(number + 2)
                lost.append(seconds - without[-1])
                stood.append(stands)
            newest = args.out / str(args.rounds + 1)
            size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
            abstract, restored = abstract_state(config, model, mesh), []
            for _ in range(args.rounds):
                start = time.perf_counter()
                jax.block_until_ready(checkpoint.restore(newest, abstract.params, progress(abstract)))
                restored.append(time.perf_counter() - start)
    finally:
        shutil.rmtree(args.out, ignore_errors=True)
    step_s = statistics.median(without) / args.steps
    print(f"{config.name}, {n_params:,} parameters, steps of {B} x {T} on {mesh.size} x {jax.devices()[0].device_kind}: {step_s:.2f} s each")
    print(f"lost by a save      {words(lost)}, {statistics.median(lost) / (EVERY * step_s):.2%} of {EVERY} steps")
    print(f"the loop stands     {words(stood)}")
    print(f"restoring           {words(restored)}, in a process that knows the files to be whole")
    print(f"bytes on disk       {size:,}, {size / n_params:.3f} a parameter")


if __name__ == "__main__":
    main()
