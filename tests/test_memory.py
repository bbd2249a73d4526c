"""What a train step needs, by the compiler's own account: of the state, to the byte; beside it, in the order that the knobs promise."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import bench_memory
from mlm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, override
from mlm_jax.model import gpt2
from tests import compilation

CONFIG = Config(
    name="test",
    model=ModelConfig(vocab_size=250, vocab_multiple=16, context_len=32, n_layers=2, n_heads=2, d_model=32, d_ff=64),
    train=TrainConfig(batch_size=8),
    mesh=MeshConfig(data=2, fsdp=4),
)
N = gpt2.n_params(jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(CONFIG.model), jax.random.key(0))))


@pytest.mark.parametrize(
    ("changes", "numbers_per_parameter"),
    [({}, 12), pytest.param({"optim.moment_dtype": "bfloat16", "optim.ema_decay": 0.9}, 12, marks=pytest.mark.slow)],
    ids=["adamw", "bfloat16 moments and an average"],
)
def test_the_state_takes_its_bytes_once_and_is_written_over(changes, numbers_per_parameter):
    memory = bench_memory.measure(override(CONFIG, {"mesh.data": 1, "mesh.fsdp": 1, **changes}), jax.devices()[:1])
    rest = memory.state - numbers_per_parameter * N
    assert 0 < rest < 2 * 128 * 4 + 50  # what the guard remembers, and counts
    assert memory.arguments == memory.state + 8 * 33 * 4  # and the batch
    assert memory.alias == memory.state  # donated: nothing of it is there twice
    assert memory.outputs - memory.alias < 1000  # the figures of the step, and where all of this is


def test_on_a_mesh_each_device_holds_its_part_of_the_state():
    memory = bench_memory.measure(CONFIG)
    split = {
        "w_q_DNH",
        "w_k_DKH",
        "w_v_DKH",
        "w_out_NHD",
        "w_up_DF",
        "w_down_FD",
        "w_token_VD",
        "w_position_TD",
        "scale_D",
        "b_D",
        "b_out_D",
        "b_down_D",
    }
    params = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(CONFIG.model), jax.random.key(0)))
    mine = sum(x.size // (4 if path[-1].key in split else 1) for path, x in jax.tree_util.tree_leaves_with_path(params))
    assert 0 < memory.state - 12 * mine < 2 * 128 * 4 + 50
    assert memory.arguments == memory.state + 4 * 33 * 4 // 4  # a row of the batch on each of 8 devices
    assert memory.alias == memory.state


AHEAD_OF_TIME = """
import json, sys
from experiments import bench_memory, gpt2_124m
from mlm_jax.config import override
from mlm_jax.plan import topology

small = {"vocab_size": 8192, "context_len": 256, "n_layers": 4, "n_heads": 4, "d_model": 256, "d_ff": 1024, "attention": "reference"}
config = override(gpt2_124m.CONFIG, {"train.batch_size": 8} | {f"model.{name}": value for name, value in small.items()})
devices = topology.parse("v5e:2x4").devices()[:1]
print(json.dumps({row: bench_memory.measure(override(config, bench_memory.ROWS[row]), devices)._asdict() for row in json.loads(sys.argv[1])}))
"""


@pytest.mark.tpu_aot
def test_for_a_tpu_each_knob_saves_what_it_promises():
    pytest.importorskip("libtpu")
    rows = ["plain", "micro_batches = 8", "loss_chunks = 8", "remat = full", "remat = attention", "remat = dots"]
    command = [sys.executable, "-c", AHEAD_OF_TIME, json.dumps(rows)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=compilation.as_users(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    memory = {row: bench_memory.Memory(**sizes) for row, sizes in json.loads(done.stdout).items()}
    for row, sizes in memory.items():
        print(f"{row:20s} {sizes}")
        # Arrays are padded to the tiles of the chip, here more than in a large model.
        assert sizes.state <= sizes.alias <= sizes.arguments and sizes.outputs - sizes.alias < 0.01 * sizes.state, "the state is donated"
    temp = {row: sizes.temporaries for row, sizes in memory.items()}
    # In so small a model the outputs of attention are no more than what the compiler's schedule moves: full and attention are not ordered.
    assert max(temp["remat = full"], temp["remat = attention"]) < temp["remat = dots"] < temp["plain"]
    assert temp["loss_chunks = 8"] < temp["plain"]
    assert temp["micro_batches = 8"] < temp["plain"]
