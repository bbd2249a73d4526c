"""The benchmarks run at a toy size, and stop where two sides do not do the same work; what breaks a run is told from what does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import bench_faults

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, str(ROOT / "experiments" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


TOY = ("--size", "toy", "--batch", "2x16", "--rounds", "1", "--seconds", "0.01", "--threads", "1")


@pytest.mark.slow
def test_our_step_is_measured_where_there_is_no_pytorch():
    out = run("bench_train.py", *TOY, "--alone", "--set", "model.n_layers=1")
    assert re.search(r"\| toy \| 2 x 16 \| mlm_jax, float32 \| [\d,]+ \([\d,]+ to [\d,]+\) \| 1 \| - \|", out)
    assert re.search(r"products of a block's shapes run at \d+ GFLOP/s", out)


@pytest.mark.parity
def test_both_sides_of_the_training_benchmark_have_the_same_losses():
    out = run("bench_train.py", *TOY)
    rows = re.findall(r"^\| toy .*$", out, re.MULTILINE)
    assert [row.split(" | ")[2] for row in rows] == [
        "mlm_jax, float32",
        "PyTorch, float32",
        "PyTorch keeping freed memory, float32",
        "PyTorch keeping freed memory, bfloat16",
    ]
    assert all(float(row.split(" | ")[-1].rstrip(" |")) < 1e-4 for row in rows[:3])


@pytest.mark.parity
def test_sides_that_do_not_do_the_same_work_stop_the_training_benchmark():
    assert "not the same work" in run("bench_train.py", *TOY, "--set", "optim.peak_lr=0.1", status=1)


def test_reading_batches_is_measured_against_a_loop_that_reads_the_same():
    out = run("bench_batches.py", "--tokens", "50000", "--window", "64", "--steps", "20", "--rounds", "1")
    assert re.search(r"\| Batches \| \d+ .*\n\| NumPy \| \d+ ", out)


@pytest.mark.slow
def test_encoding_is_measured_against_datasets_with_the_same_ids():
    pytest.importorskip("datasets")
    out = run("bench_tokenize.py", "--megabytes", "0.2", "--rounds", "1")
    assert re.search(r"^[\d,]+ documents, 0.2 MB, [\d,]+ tokens, 2 threads; the same ids from all sides$", out, re.MULTILINE)
    assert re.findall(r"^\| ([\w.]+) \| [\d.]+ \([\d.]+ to [\d.]+\) \| ", out, re.MULTILINE) == ["datasets.map", "tokenizers", "mlm_jax"]


@pytest.mark.slow
def test_a_save_and_its_bytes_are_measured(tmp_path):
    small = {"model.n_layers": 1, "model.n_heads": 2, "model.d_model": 32, "model.d_ff": 64, "model.vocab_size": 100}
    sets = [word for path, value in small.items() for word in ("--set", f"{path}={value}")]
    out = run("bench_checkpoint.py", "--batch", "2x16", "--rounds", "1", "--steps", "2", *sets, "--out", str(tmp_path / "out"))
    V, T, D, F = 128, 16, 32, 64  # the vocabulary is padded
    n_params = V * D + T * D + (4 * D * D + 4 * D) + (2 * D * F + F + D) + 3 * 2 * D
    assert f"gpt2_124m, {n_params:,} parameters, steps of 2 x 16 " in out
    (size,) = re.findall(r"^bytes on disk +([\d,]+), ", out, re.MULTILINE)
    assert int(size.replace(",", "")) > 12 * n_params  # parameters and two moments in float32, and what describes them
    assert re.search(r"^lost by a save +-?[\d.]+ s .* of 100 steps$", out, re.MULTILINE) and re.search(r"^restoring +[\d.]+ s ", out, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_on_other_devices_has_its_row_in_the_table_of_faults(monkeypatch, capsys):
    """On fewer devices and then on more: two changes of the four that the table has."""
    ways = [bench_faults.on_mesh(2, 4), bench_faults.on_mesh(2, 1), bench_faults.on_mesh(1, 4)]
    monkeypatch.setitem(bench_faults.FAULTS, "mesh", lambda bench, row: bench_faults.elsewhere(bench, row, "mesh", ways))
    monkeypatch.setattr(sys, "argv", ["bench_faults", "--only", "mesh"])
    assert bench_faults.main() == 0
    out = capsys.readouterr().out
    found = re.search(r"^\| mesh \| 2 SIGTERM \| 75 \(2\) \| mlm-jax: stopped as asked, .* \| 0 \| loss (\S+), logits (\S+) \|$", out, re.MULTILINE)
    assert found and 0 < max(map(float, found.groups())) <= 1e-5


def curve(**changed):
    rows = [{"step": step, "loss": 1 / step, "step_s": 0.5} for step in range(1, bench_faults.STEPS + 1)]
    rows[30] |= changed
    return [*rows, {"step": bench_faults.STEPS, "save_s": 0.1}]


def test_curves_are_the_same_whatever_the_clock_said_and_not_where_a_figure_or_a_step_is_another():
    same = curve()
    assert bench_faults.different_figures(curve(step_s=0.7), same) == ""
    assert bench_faults.different_figures(same[:-1], same) == ""
    next_float = np.nextafter(1 / 31, 1).item()
    assert "instead of {'step': 31, 'loss': 0.03225806451612903}" in bench_faults.different_figures(curve(loss=next_float), same)
    for steps in (same[:30] + same[31:], same[:31] + same[30:]):
        assert "not every step" in bench_faults.different_figures(steps, same)
    assert "another number" in bench_faults.different_figures([*same, {"step": 60, "val_loss": 1.0}], same)


def test_arrays_are_compared_bit_for_bit():
    arrays = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    assert bench_faults.different_arrays(arrays, {name: x.copy() for name, x in arrays.items()}) == ""
    assert bench_faults.different_arrays(arrays | {"a": -arrays["a"]}, arrays) == "a of the last checkpoint differs"
    assert bench_faults.different_arrays({"a": arrays["a"]}, arrays) == "other arrays: b"


@pytest.mark.slow
def test_what_the_rules_of_cleaning_find_and_how_fast_they_are_is_measured():
    out = run("bench_clean.py", "--documents", "10", "--rounds", "1")
    rows = dict(re.findall(r"^\| ([a-z: ,]+) \| 10 \| \d+ \| [\d.]+ \| ([\d.]+) \|$", out, re.MULTILINE))
    assert len(rows) == 12 and min(map(float, rows.values())) >= 0.9
    assert re.search(r"^\| pii \| [\d.]+ \| none \|$", out, re.MULTILINE)


@pytest.mark.slow
def test_cleaning_and_the_memory_of_prepare_are_measured():
    out = run("bench_data.py", "--megabytes", "0.2", "--rounds", "1", "--sizes", "1", "2")
    assert re.search(r"^\| mlm_jax \| [\d.]+ \(.*\n\| datatrove alone \| [\d.]+ \(", out, re.MULTILINE)
    assert re.findall(r"^\| (\d+) \| ([12],000) \| [\d.]+ ", out, re.MULTILINE) == [("1", "1,000"), ("2", "2,000")]
