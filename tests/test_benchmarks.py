"""The benchmarks of training run at a toy size, and stop where the two sides do not do the same work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, str(ROOT / "experiments" / script), *arguments]
    # Quick to compile: no figure of a toy says anything.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
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
