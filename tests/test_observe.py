"""Time is split without a gap, compiled programs are counted and kept, and a trace has the steps that were asked for."""

import concurrent.futures
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mlm_jax import cli, observe
from mlm_jax.config import InputError
from mlm_jax.metrics import read_metrics
from tests import compilation


def given(step, at, end, data_s=0.0):
    finished = concurrent.futures.Future()
    finished.set_result(end)
    return observe.Dispatched(step, {}, at, finished, data_s)


def test_a_clock_splits_all_of_the_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(observe.time, "monotonic", lambda: now[0])
    clock = observe.Clock()
    # The first batch took 2 s, and 1 s more went by until the step was given to the devices, which took 3 s for it.
    assert clock.step(given(1, at=103.0, end=106.0, data_s=2.0)) == {"step_s": 6.0, "idle_s": 3.0, "data_s": 2.0}
    # The second was given while the first was at work: no time between them, however long the loop waited for the batch.
    assert clock.step(given(2, at=105.5, end=108.0, data_s=2.0)) == {"step_s": 2.0, "idle_s": 0.0, "data_s": 0.0}
    now[0] = 110.0
    assert clock.lap("validation") == 2.0
    assert clock.step(given(3, at=110.5, end=112.0)) == {"step_s": 2.0, "idle_s": 0.5, "data_s": 0.0}
    assert clock.seconds == {"steps": 6.5, "waiting for data": 2.0, "idle": 1.5, "validation": 2.0}
    assert sum(clock.seconds.values()) == 112.0 - 100.0
    assert str(clock) == "12s: steps 54.2%, waiting for data 16.7%, idle 12.5%, validation 16.7%"


def test_a_step_that_fails_on_the_devices_fails_the_loop():
    failed = concurrent.futures.Future()
    failed.set_exception(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        observe.Clock().step(observe.Dispatched(1, {}, 0.0, failed, 0.0))


def test_the_memory_in_use_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, now, peak):
            self.stats = now and {"bytes_in_use": now, "peak_bytes_in_use": peak}

        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5, 9), Device(7, 8)])
    assert observe.memory() == {"memory_bytes": 7, "memory_peak_bytes": 9}
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None, None)])
    assert observe.memory() == {}


def test_what_a_program_needs_counts_donated_arrays_once():
    x = jax.ShapeDtypeStruct((1 << 28,), jnp.float32)  # 1 GiB, never made
    assert observe.need(jax.jit(lambda x: x + 1).lower(x).compile()).startswith("2.00 GiB a device")
    assert observe.need(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()).startswith("1.00 GiB a device")


COMPILE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from mlm_jax import observe
before = observe.compilation()
observe.keep_compiled(Path(sys.argv[1]))
jax.block_until_ready(jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8))))
found = observe.compilation().since(before)
print(found.programs, found.programs_from_cache, found.compile_s > 0)
"""


@pytest.mark.slow
def test_a_second_process_takes_every_program_from_the_first_ones_cache(tmp_path):
    environment = {name: value for name, value in compilation.as_users().items() if "CACHE" not in name}

    def start(folder, **more):
        done = subprocess.run([sys.executable, "-c", COMPILE, str(folder)], env=environment | more, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    programs, cached, took_time = start(tmp_path / "run/compiled")
    assert int(programs) > 0 and (cached, took_time) == ("0", "True")
    assert start(tmp_path / "run/compiled") == [programs, programs, "True"]
    assert start(tmp_path / "other", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "run/compiled")) == [programs, programs, "True"]
    assert not (tmp_path / "other").exists()


def test_a_trace_has_the_steps_that_were_asked_for(tiny_experiment, tmp_path, capfd):
    argv = ["train", str(tiny_experiment), "--out", str(tmp_path / "run"), "--set", "train.steps=6", "--profile", "2:4"]
    assert cli.main(argv) == 0
    assert f"step 4: the trace of steps 2 to 4 is in {tmp_path / 'run/profile'}" in capfd.readouterr().err
    (trace,) = (tmp_path / "run/profile").rglob("*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    assert sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train") == [2, 3, 4]
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]

    assert cli.main(argv) == 2  # the run is done
    assert "--profile = 2:4: there are no steps to come. Leave it out, or start another run with --out." in capfd.readouterr().err


def test_bad_steps_of_a_trace_are_refused_before_anything_is_made(tiny_experiment, tmp_path, capfd):
    assert cli.main(["run", str(tiny_experiment), "--out", str(tmp_path / "run"), "--profile", "0:3"]) == 2
    assert "--profile = 0:3: not FIRST:LAST within the steps that are to come, 1 to 20" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_command_keeps_what_it_compiled_in_the_run_and_a_second_start_says_that_it_took_all_of_it(tiny_experiment, tmp_path):
    environment = {name: value for name, value in compilation.as_users().items() if "CACHE" not in name}
    argv = [sys.executable, "-m", "mlm_jax.cli", "train", str(tiny_experiment), "--out", str(tmp_path / "run"), "--set", "train.save_every=5"]

    def compiled():
        done = subprocess.run(argv, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        return re.search(r"(\d+) programs compiled in [\d.]+ s, (\d+) of them taken from the cache; a step needs", done.stderr).groups()

    first = compiled()
    assert list((tmp_path / "run/compiled").iterdir()) and int(first[0]) > int(first[1])
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    second = compiled()
    assert second[0] == second[1] == first[0]


@pytest.mark.parametrize("text", ["10", "10-13", "13:10", "0:3", "a:b", "10:", "10:21", "4:6"])
def test_a_trace_of_steps_that_do_not_come_is_refused(text):
    with pytest.raises(InputError, match=r"--profile = .*: not FIRST:LAST within the steps that are to come, 5 to 20\. Write, for example, 14:17"):
        observe.Profile.parse(text, 5, 20)
