"""The page, of a plan that is made up."""

import json

import pytest

from experiments import bench_plan
from experiments.tpu import plans
from mlm_jax.plan import topology, tpu
from mlm_jax.plan.describe import describe, summary
from mlm_jax.plan.price import Budget

GIB = 2**30
SLICE = topology.parse("v5e:2x4")


def made_up(**changes) -> tpu.Plan:
    fields = {
        "name": "small",
        "topology": SLICE,
        "mesh": {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1, "context": 1},
        "batch_size": 64,
        "tokens": 65_536,
        "rows": 8,
        "steps": 1000,
        "all_tokens": 65_536_000,
        "n_params": 124_475_904,
        "memory": tpu.Memory(GIB, 2 * GIB, 0, 0, GIB, 3 * GIB, 4 * GIB, 0, int(15.75 * GIB)),
        "largest": [(GIB, "f32[2,3]", "blocks/mlp/dot", "mlm_jax/model/gpt2.py:1")],
        "cycles": {"forward": {"attention": 60_000_000}, "backward": {"attention": 80_000_000, "mlp": 10_000_000}},
        "kernels": [tpu.Kernel("splash_mha_fwd", "forward", "mlm_jax/model/attention.py:2", 12, 1e9)],
        "exchanged": [
            tpu.Exchanged("all-gather", "mlm_jax/model/gpt2.py:3", "forward", "fsdp", 12, 7_000_000, 0.015, True),
            tpu.Exchanged("reduce-scatter", "mlm_jax/model/gpt2.py:3", "backward", "fsdp", 12, 5_000_000, 0.010, False),
        ],
        "compute_s": 0.1,
        "kernels_s": (0.005, 0.010),
        "flops_s": 0.033,
        "budget": Budget(0.12, 1000, 8, 1.2),
        "versions": {"jax": "1", "libtpu": "2"},
        "compiled_in_s": 1.0,
    }
    return tpu.Plan(**{**fields, **changes})


def test_the_bounds_of_a_step_by_hand():
    """100 ms of work and 5 to 10 of kernels; 15 ms of exchanges beside them, 10 ms not."""
    plan = made_up()
    assert plan.lower_s == pytest.approx(0.105) and plan.step_s == pytest.approx(0.110 + 0.010) and plan.upper_s == pytest.approx(0.110 + 0.025)
    assert plan.mfu(plan.step_s) == pytest.approx(0.033 / 0.12)
    slow = made_up(exchanged=[tpu.Exchanged("all-gather", "", "forward", "fsdp", 1, 1, 0.5, True)])
    assert slow.lower_s == slow.step_s == pytest.approx(0.5), "no work hides more than it takes"
    across = [tpu.Exchanged("all-reduce", "", "backward", axes, 1, 1, s, False) for axes, s in (("fsdp", 0.5), ("data", 0.3), ("data + fsdp", 0.1))]
    assert made_up(exchanged=across).lower_s == pytest.approx(0.6), "what goes along other links goes on beside it"


def test_the_page_names_what_fits_what_is_large_what_is_sent_and_what_it_costs():
    page = describe(made_up())
    for words in (
        "small, 124,475,904 parameters, on v5e:2x4 (v5litepod-8): 8 chips, 8 cores, mesh fsdp 8",
        "64 x 1024 tokens a step, 8 rows a device",
        "FITS: 11.00 of 15.75 GiB a device, 4.75 GiB free",
        "1.00  parameters",
        "3.00  activations kept for the backward pass",
        "1.00  f32[2,3]  blocks/mlp/dot  mlm_jax/model/gpt2.py:1",
        "without an estimate: kernel splash_mha_fwd, forward, 12 x, 1.0 GFLOP, mlm_jax/model/attention.py:2",
        "12.0 MB sent (all-gather 7.0, reduce-scatter 5.0)",
        "estimate  120.0   546,133  27.5%",
        "1,000 steps, 0.07 billion tokens",
        "0.27 chip-hours, 0.32 USD at 1.20 a chip-hour",
    ):
        assert words in page, words
    assert [line.split() for line in page.splitlines() if line.split()[:1] == ["attention"]] == [["attention", "60.0", "80.0", "140.0"]]


def test_the_json_holds_the_page():
    plan = made_up()
    found = json.loads(json.dumps(plan.to_json()))
    assert found["fits"] is True and found["memory"]["total"] == 11 * GIB and found["topology"]["accelerator_type"] == "v5litepod-8"
    assert found["step_s"] == pytest.approx(plan.step_s) and found["budget"]["days"] == pytest.approx(0.12 * 1000 / 86_400)
    assert found["largest"] == [{"bytes": GIB, "shape": "f32[2,3]", "made_by": "blocks/mlp/dot", "line": "mlm_jax/model/gpt2.py:1"}]
    assert [found[name] for name in ("lower_mfu", "step_mfu", "upper_mfu")] == [pytest.approx(0.033 / s) for s in (0.105, 0.12, 0.135)]
    assert found["exchanged"][0]["kind"] == "all-gather" and found["cycles"]["backward"]["mlp"] == 10_000_000


def test_without_a_clock_the_work_is_that_of_the_flops():
    page = describe(made_up(topology=topology.parse("tpu7x:2x2x1")))
    assert "100.0  FLOPs at peak, for want of a known clock" in page


def test_a_batch_that_is_still_to_grow_takes_less_time_as_it_has_fewer_rows():
    """Half of all steps with half of the batch: three quarters of 65,536,000 tokens, and of 2 minutes."""
    page = describe(made_up(all_tokens=49_152_000, budget=Budget(0.12, 750, 8, 1.2)))
    assert "1,000 steps, 0.05 billion tokens: 1m30s of stepping" in page and "A batch that is still to grow" in page
    assert "still to grow" not in describe(made_up())


def test_the_summary_has_the_memory_the_step_and_the_price():
    """65,536 tokens in 120 ms; 1,000 such steps on 8 chips are 0.27 chip-hours."""
    assert summary(made_up()) == [
        "v5e:2x4 (v5litepod-8), mesh fsdp 8: 11.00 of 15.75 GiB a device; jax 1, libtpu 2",
        "120.0 ms a step, 105.0 at least: 546,133 tokens/s, MFU 27.5%",
        "1,000 steps in 2m00s, 0.27 chip-hours, 0.32 USD at 1.20",
    ]


def test_a_new_plan_takes_the_place_of_the_old_one_in_a_header(tmp_path, monkeypatch):
    text = plans.FILES[0].read_text("utf-8")
    (tmp_path / "file.py").write_text(text, "utf-8")
    monkeypatch.setattr(plans, "plan", lambda file: made_up())
    plans.write(tmp_path / "file.py")
    before, after = text.split("Plan     ")[0], text[text.index("Why      ") :]
    assert (tmp_path / "file.py").read_text("utf-8") == before + plans.header(made_up()) + after


def test_the_table_of_knobs_compares_with_the_first_row():
    twice = made_up(cycles={"forward": {"mlp": 100_000_000}, "recomputed": {"mlp": 50_000_000}, "backward": {"mlp": 150_000_000}})
    _, _, first, second, *_ = bench_plan.knobs([made_up().to_json(), twice.to_json(), *[made_up().to_json()] * (len(bench_plan.KNOBS) - 2)])
    assert first.endswith(" | 60.0 | 0.0 | 90.0 | 150.0 | 1.00 | 1 | 3.00 | 4.00 |")
    assert second.endswith(" | 100.0 | 50.0 | 150.0 | 300.0 | 2.00 | 1 | 3.00 | 4.00 |")
