"""Generating text on TPUs that are not there."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_jax import cli
from mlm_jax.plan import generate, topology, tpu
from tests import compilation

ROOT = Path(__file__).parents[2]
SLICE = topology.parse("v5e:2x4")
GIB = 2**30


def made_up() -> list[generate.Stage]:
    sent = [tpu.Exchanged("all-reduce", "mlm_jax/model/gpt2.py:1", "decode", "tensor", 10, 5_000_000, 0.010, False)]
    first = generate.Stage("prefill", 8, 100, GIB, GIB // 4, GIB // 4, GIB, 16 * GIB, {"attention": 3_000_000}, [], 0.002, 0.0005, 0.001)
    return [first, generate.Stage("decode", 8, 10, GIB, GIB // 4, GIB // 4, 2 * GIB, 16 * GIB, {"mlp": 1_000_000}, sent, 0.001, 0.0001, 0.020)]


def test_a_stage_takes_as_long_as_its_work_or_as_reading_and_then_its_exchanges():
    first, then = made_up()
    assert first.seconds == 0.002 and first.tokens_per_s == 8 * 100 / 0.002 and first.total == 2.5 * GIB
    assert dataclasses.replace(first, compute_s=None).seconds == 0.001, "for want of a clock"
    assert then.seconds == pytest.approx(0.020 + 0.010) and then.tokens_per_s == pytest.approx(8 * 10 / 0.030)


def test_the_page_has_the_prefill_beside_one_token_of_all_rows():
    page = generate.describe(made_up(), SLICE)
    for words in (
        "Generating on v5e:2x4: 8 rows (sample.num), prompts of 100 tokens and 11 more (sample.max_tokens)",
        "all, of 16.00                           2.50    3.50",
        "FLOPs at peak                                                    0.50     0.01",
        "reading weights, and keys and values, once                       1.00     2.00",
        "estimate: the longest of these but exchanges, and then these     2.00     3.00",
        "400,000 tokens/s of prompts, 2,667 tokens/s written by all rows together",
        "No exchanges between devices in the prefill",
        "Exchanges of a device in 10 rounds of the decoding loop: 5.0 MB sent (all-reduce 5.0)",
    ):
        assert words in page, page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample.max_tokens": 1024}, "sample.max_tokens = 1024: leaves no room for a prompt in model.context_len = 1024. Set it to 2 to 1023."),
        ({"sample.max_tokens": 1}, "sample.max_tokens = 1: leaves nothing to decode after the prefill"),
        ({"sample.beams": 2, "sample.num": 1, "sample.temperature": 1.0}, "sample.beams = 2: beam search is not planned. Leave it at 1."),
    ],
)
def test_what_is_not_planned_is_refused_before_anything_is_compiled(changes, words, monkeypatch, capsys):
    monkeypatch.setattr(tpu, "plan", lambda *a, **k: pytest.fail("the train step is compiled first"))
    sets = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    assert cli.main(["plan", str(ROOT / "experiments" / "gpt2_124m.py"), "--topology", "v5e:2x4", "--generate", *sets]) == 2
    assert words in capsys.readouterr().err


def test_generation_is_planned_for_slices_alone(capsys):
    assert cli.main(["plan", str(ROOT / "experiments" / "tiny.py"), "--topology", "cpu", "--generate"]) == 2
    assert "neither search nor generation is planned for it" in capsys.readouterr().err


SMALL = """
import json
from experiments import gpt2_124m
from mlm_jax.config import override
from mlm_jax.model import gpt2
from mlm_jax.plan import generate, topology

small = {"n_layers": 2, "n_heads": 4, "d_model": 256, "d_ff": 1024, "context_len": 256, "vocab_size": 8192}
config = override(gpt2_124m.CONFIG, {f"model.{name}": value for name, value in small.items()} | {"mesh.tensor": 4, "mesh.data": 2})
found = {}
for num in (8, 64):
    stages = generate.plan(override(config, {"sample.num": num, "sample.max_tokens": 56}), gpt2.GPT2, topology.parse("v5e:2x4"))
    found[num] = [stage.to_json() for stage in stages]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def small(once) -> dict:
    """Plans of 8 and of 64 rows, over 2 x 4 devices."""
    pytest.importorskip("libtpu")

    def make() -> dict:
        done = subprocess.run([sys.executable, "-c", SMALL], cwd=ROOT, env=compilation.as_users(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return once("generated", make)


@pytest.mark.tpu_aot
def test_keys_and_values_take_their_bytes_by_hand_and_so_do_the_weights(small):
    """2 layers of keys and of values, 256 positions of 4 heads of 64 in bfloat16, over 2 x 4 devices; the weights are split in four."""
    for num, (first, then) in small.items():
        assert first["cache"] == then["cache"] == 2 * 2 * int(num) * 256 * 4 * 64 * 2 // 8
        assert (first["rows"], first["positions"], then["positions"]) == (int(num), 200, 55)
        matrices = 4 * (8192 * 256 + 2 * 12 * 256**2)
        assert then["loaded"] == pytest.approx(4 * 2 * 12 * 256**2 / 4, rel=0.02), "the blocks, once more"
        assert matrices / 4 <= then["parameters"] - 4 * 256 * 256 < 1.01 * matrices / 4, "positions are on every device"


@pytest.mark.tpu_aot
def test_a_token_takes_the_reading_of_weights_and_cache_at_least_and_the_prefill_as_many_times_the_cycles_as_rows(small):
    first, then = small["64"]
    assert then["read_s"] == pytest.approx(55 * (then["parameters"] / 2 + then["cache"]) / 819e9)
    assert then["seconds"] >= then["read_s"] + then["communication_s"]
    few = small["8"][0]
    assert 4 < sum(first["cycles"].values()) / sum(few["cycles"].values()) < 9
    assert {"attention", "mlp", "norm", "head and loss"} <= set(then["cycles"])


@pytest.mark.tpu_aot
def test_where_heads_and_mlp_are_split_each_layer_sums_its_two_outputs_and_gathers_no_weight(small):
    """Over 4 devices; each all-reduce of 4 rows of a device in bfloat16, 6/4 of it on the wire, in each of 55 rounds."""
    _, then = small["8"]
    sums = [one for one in then["exchanged"] if one["kind"] == "all-reduce" and one["axes"] == "tensor" and "gpt2.py" in one["source"]]
    layers = [one for one in sums if one["times"] == 2 * 55]
    assert len(layers) == 2 and all(one["bytes"] == 2 * 55 * 4 * 256 * 2 * 6 // 4 for one in layers)
    assert not [one for one in then["exchanged"] if one["kind"] == "all-gather" and one["bytes"] / one["times"] > 100_000]
