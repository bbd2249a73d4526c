"""A run that is asked to stop takes its step to the end, saves, and goes on later as if nothing had happened."""

import contextlib
import re
import signal
import subprocess
import sys
import threading

import jax
import pytest

from mlm_jax import checkpoint, cli, status, stopping
from mlm_jax.metrics import read_metrics

BLOCKED = """
import ctypes
from mlm_jax.stopping import Requests
with Requests():
    print("ready", flush=True)
    ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))  # as in a computation, Python's own handlers wait for this
    while True:
        ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))
"""


def curve(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on_from_there(number, tiny_run, tmp_path, monkeypatch, capfd):
    heard, said = threading.Event(), stopping._say
    monkeypatch.setattr(stopping, "_say", lambda line: (said(line), heard.set()))

    class Annotation(contextlib.nullcontext):
        def __init__(self, name, step_num):
            super().__init__()
            if step_num == 7:
                signal.raise_signal(number)
                assert heard.wait(60)

    argv = ["train", str(tiny_run.experiment), "--out", str(tmp_path / "run")]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
        assert cli.main(argv) == status.STOPPED
    assert signal.getsignal(number) == before
    err = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: stops after this step and saves" in err
    assert "mlm-jax: stopped as asked, step 8 is saved; the same command goes on from there" in err
    assert checkpoint.steps_in(tmp_path / "run/checkpoints") == [5, 8]
    assert cli.main(argv) == status.DONE
    assert curve(tmp_path / "run") == curve(tiny_run.folder)


def test_a_signal_in_the_last_step_ends_the_run_before_it_evaluates(tiny_run, tmp_path, monkeypatch, capfd):
    heard, said = threading.Event(), stopping._say
    monkeypatch.setattr(stopping, "_say", lambda line: (said(line), heard.set()))

    class Annotation(contextlib.nullcontext):
        def __init__(self, name, step_num):
            super().__init__()
            if step_num == 20:
                signal.raise_signal(signal.SIGTERM)
                assert heard.wait(60)

    argv = ["run", str(tiny_run.experiment), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
        assert cli.main(argv) == status.STOPPED
    assert "mlm-jax: stopped as asked, step 20 is saved" in capfd.readouterr().err
    assert checkpoint.steps_in(tmp_path / "run/checkpoints") == [15, 20] and not (tmp_path / "run/evaluation.json").exists()
    assert cli.main(argv) == status.DONE
    assert "going on" not in capfd.readouterr().err and (tmp_path / "run/evaluation.json").exists()


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_second_signal_ends_the_process_at_once_also_while_it_waits_for_the_devices(number):
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            for line in ("stops after this step and saves; once more ends at once", "again: ends at once"):
                process.send_signal(number)
                assert process.stderr.readline() == "\n"
                assert line in process.stderr.readline()
            assert process.wait(60) == status.SIGNALLED + number
        finally:
            process.kill()


def test_outside_of_the_main_thread_signals_stay_as_they_are():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with stopping.Requests() as requests:
            found.append((requests.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]


# Process 1 is asked to stop in its step 7.
ASKED = """
import os, signal
import jax
annotation = jax.profiler.StepTraceAnnotation
def asked(name, step_num):
    if step_num == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return annotation(name, step_num=step_num)
jax.profiler.StepTraceAnnotation = asked
"""


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step_where_one_is_asked(tiny_run, tmp_path):
    from tests.test_distributed import check_same_run, run_processes

    argv = ["train", str(tiny_run.experiment), "--out", str(tmp_path / "run")]
    finished = run_processes(tmp_path, argv, 2, 2, code={1: ASKED})
    assert [process.status for process in finished] == [status.STOPPED] * 2, [process.stderr for process in finished]
    (step,) = {re.search(r"stopped as asked, step (\d+) is saved", process.stderr)[1] for process in finished}
    assert 7 < int(step) < 20 and checkpoint.steps_in(tmp_path / "run/checkpoints")[-1] == int(step)
    for path in tmp_path.glob("rows_*"):
        path.unlink()
    check_same_run(tmp_path / "run", tiny_run.folder, run_processes(tmp_path, argv, 2, 2), 2, done=int(step))
