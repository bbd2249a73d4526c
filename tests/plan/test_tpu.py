"""Train steps compiled for TPUs that are not there. They are compiled in processes of their own, which need no TPU and libtpu."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_jax.plan import topology, tpu

ROOT = Path(__file__).parents[2]
GIB = 2**30


# What libtpu 0.0.42.1 says.
ALONE = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (66.05G) exceeds available HBM (15.75G)."


def test_what_the_compiler_says_is_too_large_is_read():
    slice_ = topology.parse("v5e:2x4")
    found = tpu._too_large(ALONE, 2 * GIB, slice_)
    assert found is not None and found.need == int(66.05 * GIB) + 2 * GIB
    assert str(found) == "needs 68.05 GiB on a device that has 15.75: 52.30 GiB too much"
    assert tpu._too_large("INTERNAL: something else", 0, slice_) is None


def planned(*arguments: str) -> dict:
    """What `mlm-jax plan` says, as JSON."""
    command = [sys.executable, "-m", "mlm_jax.cli", "plan", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def sent(plan: dict, *kinds: str) -> float:
    """MB that a device sends in a step, by these kinds of exchange or by all."""
    return sum(one["bytes"] for one in plan["exchanged"] if not kinds or one["kind"] in kinds) / 1e6


SMALL = ("model.n_layers=4", "model.d_model=256", "model.n_heads=4", "model.d_ff=1024", "model.context_len=256", "model.vocab_size=8192")


@pytest.fixture(scope="module")
def small() -> dict:
    """A small GPT-2 over FSDP of eight."""
    pytest.importorskip("libtpu")
    changes = (*SMALL, "train.batch_size=64", "mesh.fsdp=8", "model.remat=full", "model.attention=blocked")
    return planned("experiments/gpt2_124m.py", "--topology", "v5litepod-8", *(word for one in changes for word in ("--set", one)))


@pytest.mark.tpu_aot
def test_a_parameter_is_gathered_and_its_gradient_summed_in_parts(small):
    """4 layers of 12 D^2 parameters in bfloat16: gathered forward and again backward, 7/8 of each; gradients once. The table: V D, once each."""
    layers, table = 4 * 12 * 256**2 * 2 / 1e6 * 7 / 8, 8192 * 256 * 2 / 1e6 * 7 / 8
    gathered = 2 * layers + table
    assert gathered <= sent(small, "all-gather") < 1.1 * gathered
    assert layers + table <= sent(small, "reduce-scatter") + sent(small, "all-reduce") / 2 < 1.15 * (layers + table)
    assert sent(small, "collective-permute") == 0, "no product is cut into one for each device"
    whole = [one for one in small["exchanged"] if one["kind"] == "all-reduce" and one["bytes"] / max(one["times"], 1) > 2 * 8192 * 256 * 2 * 7 / 8]
    assert not whole, "none as large as the table"


@pytest.mark.tpu_aot
def test_exchanges_and_cycles_are_told_by_lines_and_parts_of_the_model(small):
    lines = {one["source"] for one in small["exchanged"]}
    assert any(re.fullmatch(r"mlm_jax/model/gpt2\.py:\d+", line) for line in lines)
    assert {one["axes"] for one in small["exchanged"]} == {"fsdp"}
    assert {"attention", "mlp", "norm", "head and loss"} <= set(small["cycles"]["forward"])
    assert small["fits"] and small["memory"]["parameters"] * 8 == pytest.approx(4 * small["n_params"], rel=0.01)
    assert small["memory"]["optimizer"] == pytest.approx(2 * small["memory"]["parameters"], rel=0.01)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_auto_is_splash_and_the_kernels_are_named(topology):
    pytest.importorskip("libtpu")
    changes = (*SMALL, "model.n_layers=2", "train.batch_size=8")
    found = planned("experiments/gpt2_124m.py", "--topology", topology, *(word for one in changes for word in ("--set", one)))
    kernels = {kernel["phase"]: kernel for kernel in found["kernels"]}
    assert kernels.keys() == {"forward", "backward"} and all("splash" in kernel["name"] for kernel in kernels.values())
    assert {phase: kernel["times"] for phase, kernel in kernels.items()} == {"forward": 2, "backward": 2}
    # One row of 4 heads on a device: two products of 2 T^2 H, halved, for each of 2 layers; five backward.
    assert kernels["forward"]["flops"] == 2 * 2 * 4 * 256**2 * 64 and kernels["backward"]["flops"] == 2.5 * kernels["forward"]["flops"]
