"""The experiments that are meant for one slice each, planned at their full size."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.tpu.plans import FILES, PAGE, slice_of
from mlm_jax import experiment
from mlm_jax.config import diff
from mlm_jax.plan import topology, tpu
from tests import compilation

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_for_one_slice_is_the_run_that_it_begins_from(file):
    """What differs is what a run may go on with: neither the batches nor the loss, but for rounding."""
    base = experiment.load(str(ROOT / "experiments" / f"{'_'.join(file.stem.split('_')[:2])}.py")).config
    config = experiment.load(str(file)).config
    assert set(diff(base, config)) <= {"mesh.data", "mesh.fsdp", "model.remat", "model.attention", "train.micro_batches", "train.loss_chunks"}
    text = file.read_text("utf-8")
    assert f"Run      mlm-jax run experiments/tpu/{file.name}" in text and slice_of(file) in text
    made = re.search(r"^Plan     (\S+) \((\S+)\), mesh .* GiB a device; jax .*, libtpu", text, re.MULTILINE)
    assert made and topology.parse(made[1]) == topology.parse(made[2]) == topology.parse(slice_of(file))


def test_there_is_one_for_each_size_and_slice():
    sizes, slices = ("124m", "1558m"), ("v5e:2x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
    assert {(file.stem.split("_")[1], slice_of(file)) for file in FILES} == {(size, name) for size in sizes for name in slices}


PLAN = """
import json, sys
from pathlib import Path
from experiments.tpu.plans import header, plan
from mlm_jax.plan import describe

made = plan(Path(sys.argv[1]))
print(json.dumps({"plan": made.to_json(), "page": describe.describe(made), "header": header(made)}))
"""


@pytest.fixture(scope="module", params=["gpt2_124m_v5e_2x4", "gpt2_1558m_v5e_16x16", "gpt2_1558m_v5p_4x4x4"])
def planned(request, once) -> dict:
    """The plan of one of them, its page and its header, made in a process of its own."""
    pytest.importorskip("libtpu")
    file = ROOT / "experiments" / "tpu" / f"{request.param}.py"

    def make() -> dict:
        command = [sys.executable, "-c", PLAN, str(file)]
        done = subprocess.run(command, cwd=ROOT, env=compilation.as_users(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return once(request.param, make) | {"file": file, "config": experiment.load(str(file)).config}


def sent(plan: dict, kind: str, axes: str = "") -> float:
    """Bytes that a device sends in a step by exchanges of one kind, along all axes or the one."""
    return sum(one["bytes"] for one in plan["exchanged"] if one["kind"] == kind and axes in ("", one["axes"]))


@pytest.mark.tpu_aot
def test_it_fits_and_its_header_says_what_is_planned(planned):
    assert planned["plan"]["fits"]
    assert planned["header"] in planned["file"].read_text("utf-8"), f"python -m experiments.tpu.plans writes it anew:\n{planned['header']}"


@pytest.mark.tpu_aot
def test_the_page_of_the_readme_is_what_is_planned_but_for_the_numbers_of_lines(planned):
    pages = {found[2].split()[1]: found[3] for found in PAGE.finditer(README) if "--slices" not in found[2]}
    page = pages[str(planned["file"].relative_to(ROOT))]
    assert re.sub(r"\.py:\d+", ".py", page) == re.sub(r"\.py:\d+", ".py", planned["page"])


@pytest.mark.tpu_aot
def test_weights_are_gathered_and_gradients_summed_in_parts_and_nothing_else_is_large(planned):
    """With n devices along fsdp: weights of the blocks in bfloat16 are gathered forward and again backward, (n - 1) / n of them on the wire; their
    gradients are reduce-scattered once, and their parts summed along data; the table and its gradient go once. A batch in parts does so for each."""
    plan, config = planned["plan"], tpu.with_vocabulary(planned["config"])
    m, mesh, parts = config.model, plan["mesh"], config.train.micro_batches
    n, n_data = mesh["fsdp"], mesh["data"]
    blocks, table = 2 * 12 * m.n_layers * m.d_model**2, 2 * m.padded_vocab_size * m.d_model
    share = (n - 1) / n * parts
    assert (2 * blocks + table) * share <= sent(plan, "all-gather") < 1.03 * (2 * blocks + table) * share
    # libtpu cuts what it sums into parts of whole tiles: up to a tenth more.
    assert (blocks + table) * share <= sent(plan, "reduce-scatter", "fsdp") < 1.1 * (blocks + table) * share
    along_data = 2 * (n_data - 1) / n_data * (blocks + table) / n * parts
    assert sent(plan, "all-reduce") < 1.25 * along_data + 20e6 * parts, "gradients of biases and gains, and figures, beside it"
    summed = [one["bytes"] / one["times"] for one in plan["exchanged"] if one["kind"] == "all-reduce" and "fsdp" in one["axes"]]
    assert max(summed, default=0) < 2 * m.d_model**2, "along fsdp no weight is summed whole, not even one of D x D"
    # A device looks its part of D up for the rows of all, and they change places; on the way back again.
    assert sent(plan, "all-to-all") == pytest.approx(2 * plan["rows"] * m.context_len * m.d_model * 2 * (n - 1) / n, rel=0.05)
    assert sent(plan, "collective-permute") < 0.02 * blocks * parts


@pytest.mark.tpu_aot
def test_each_device_holds_its_part_of_the_state_and_nothing_whole_but_the_table_in_bfloat16(planned):
    plan, m = planned["plan"], tpu.with_vocabulary(planned["config"]).model
    n = plan["mesh"]["fsdp"]
    whole = m.n_layers * (3 * m.d_model + m.d_ff)  # the biases of queries, keys, values and of the MLP's first half: no axis of theirs is D
    mine = (plan["n_params"] - whole) // n + whole
    assert plan["memory"]["parameters"] == 4 * mine
    assert 8 * mine <= plan["memory"]["optimizer"] < 8 * mine + 100, "two moments, and counts"
    stack, table = m.n_layers * m.d_model**2, m.padded_vocab_size * m.d_model
    assert plan["largest"][-1]["bytes"] < 2 * stack, "all that could be a whole weight is among those named"
    for one in plan["largest"]:
        dtype, n = one["shape"].split("[")[0], math.prod(int(size) for size in one["shape"].split("[")[1].rstrip("]").split(",") if size)
        assert n not in (stack, stack * m.d_ff // m.d_model), f"the weights of all layers, {one}"
        assert n != table or dtype == "bf16", f"the table, {one}"
    assert {kernel["name"].split("_")[0] for kernel in plan["kernels"]} == {"splash"}
