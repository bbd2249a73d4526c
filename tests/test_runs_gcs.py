"""A run that lives in a bucket is the run that it would be on disk, whatever becomes of the machines and of the bucket meanwhile."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mlm_jax import checkpoint, cli, metrics, runs, status, storage
from mlm_jax.config import InputError
from tests.conftest import write_experiment
from tests.test_distributed import refusals, run_processes

ROOT = Path(__file__).parents[1]
DEVICES = 2  # of a run; each makes files of its own
# Of the requests that are under way when a save fails, some end after the loop that waited for them.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")]

# What a process does when the row of a step is written.
AT = """
import os, signal
from mlm_jax.metrics import MetricsFile
plain = MetricsFile.write
def write(self, row):
    plain(self, row)
    if row["step"] == {step} and "loss" in row:
        os.kill(os.getpid(), signal.{signal})
MetricsFile.write = write
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An experiment, and what a run of it leaves on disk that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    experiment, text = write_experiment(folder)
    (finished,) = run_processes(folder / "process", ["run", str(experiment), "--out", str(folder / "run")], 1, DEVICES)
    assert finished.status == 0, finished.stderr
    return SimpleNamespace(experiment=experiment, text=text, folder=folder / "run")


def on(machine: Path, *, at: int = 0, signal: str = "SIGKILL") -> str:
    """The start of a process on that machine, which has a working directory of its own; it gets a signal at a step."""
    machine.mkdir(exist_ok=True)
    return f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nos.chdir({str(machine)!r})\n" + (AT.format(step=at, signal=signal) if at else "")


def run_on(machine, experiment, url, *more, at=0, signal="SIGKILL"):
    argv = ["run", str(experiment), "--out", url, *more]
    (finished,) = run_processes(machine.parent / f"process_{machine.name}", argv, 1, DEVICES, code={0: on(machine, at=at, signal=signal)})
    return finished


def rows_of(url, name="metrics.jsonl"):
    return [json.loads(line) for line in (storage.place(url) / name).read_text().splitlines()]


def check_same_run(url, folder):
    """Asserts that the run in the bucket ended as the one on disk: the same parameters and export bit for bit, each step once, the same figures."""
    (ours, *_), (theirs, *_) = (runs.load(run)[1:] for run in (url, folder))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32), strict=True), ours, theirs)
    rows, wanted = rows_of(url), metrics.read_metrics(folder / "metrics.jsonl")
    for name in ("loss", "val_loss"):
        assert [(row["step"], row[name]) for row in rows if name in row] == [(row["step"], row[name]) for row in wanted if name in row]
    home = storage.place(url)
    for name in ("evaluation.json", "samples.txt", "config.json", "hf/model.safetensors", "tokenizer/tokenizer.json", "code/tiny_test.py"):
        assert (home / name).read_bytes() == (folder / name).read_bytes(), name
    assert (home / "report.html").exists() and (home / "loss.png").exists()


def test_a_run_goes_on_on_a_new_machine_and_then_on_the_old_one_again_as_if_nothing_had_been(reference, server, tmp_path):
    url, (a, b) = "gs://bucket/runs/moved", (tmp_path / "a", tmp_path / "b")
    before = []  # what was there when the first checkpoint began
    server.answer = lambda method, name: before.append(server.names()) if "runs/moved/checkpoints/5/" in name and not before else None
    assert run_on(a, reference.experiment, url, at=8).status == -9
    assert {f"runs/moved/{name}" for name in ("metrics.jsonl", "history.jsonl", "config.json", "tokens/manifest.json")} <= before[0]
    assert not any("/checkpoints/" in name for name in before[0])
    assert checkpoint.steps_in(f"{url}/checkpoints") in ([], [5]) and [row["step"] for row in rows_of(url) if "loss" in row] == [1, 2, 3, 4, 5]
    stopped = run_on(b, reference.experiment, url, at=12, signal="SIGTERM")
    assert stopped.status == status.STOPPED and f"fetches the run from {url}" in stopped.stderr
    (step,) = set(checkpoint.steps_in(f"{url}/checkpoints")) - {5, 10}
    assert [row["step"] for row in rows_of(url) if "loss" in row] == list(range(1, step + 1))
    kept = (a / "runs" / "moved" / "metrics.jsonl").read_text()
    assert '"step": 8' in kept  # it has figures of its own
    again = run_on(a, reference.experiment, url)
    assert again.status == 0 and f"fetches the run from {url}" in again.stderr and f"going on from step {step}" in again.stderr
    assert f"done: {url} (" in again.stderr
    check_same_run(url, reference.folder)
    starts = [row["start"] for row in rows_of(url, "history.jsonl") if "start" in row]
    assert len(starts) == 3 and starts[0] == 0 and starts[2] == step
    # what is done is not done again, nor sent or fetched
    written = []
    server.answer = lambda method, name: written.append((method, name.partition(".writable")[1])) if method != "GET" else None
    more = run_on(a, reference.experiment, url)
    assert more.status == 0 and "fetches" not in more.stderr
    assert written == [("POST", ""), ("DELETE", ".writable")]  # a small file's name is not in the address


@pytest.fixture(scope="module")
def finished(running, reference, tmp_path_factory):
    """A finished run in the bucket."""
    url, machine = "gs://bucket/runs/finished", tmp_path_factory.mktemp("finished") / "machine"
    found = run_on(machine, reference.experiment, url)
    assert found.status == 0, found.stderr
    check_same_run(url, reference.folder)
    return url


def told(capsys, *argv):
    capsys.readouterr()
    assert cli.main([*argv, "--json", "--traceback"]) == 0
    return json.loads(capsys.readouterr().out)


def test_any_machine_can_use_the_model(finished, reference, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ("--prompt", "the model", "--max-tokens", "8")
    assert told(capsys, "generate", finished, *more) == told(capsys, "generate", str(reference.folder), *more)
    older = [f"{run}/checkpoints/15" for run in (finished, reference.folder)]
    (ours, *_), (theirs, *_) = (runs.load(run).params.values() for run in older)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert told(capsys, "evaluate", finished) == told(capsys, "evaluate", str(reference.folder))
    told(capsys, "export", finished, "exported")
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (reference.folder / "hf" / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    for argv in (
        ["generate", "gs://bucket/runs/none"],
        ["generate", f"{finished}/checkpoints/7"],
        ["report", finished],
        ["export", finished, finished],
    ):
        assert cli.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_fork_begins_from_a_checkpoint_in_a_bucket(finished, reference, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["train", str(reference.experiment), "--out", "fork", "--set", "optim.peak_lr=0.02", "--from"]
    assert cli.main([*argv, f"{finished}@15"]) == 0
    assert cli.main([*argv, f"{finished}@15"]) == 0 and cli.main([*argv, finished]) == 0
    assert json.loads((tmp_path / "fork" / "run.json").read_text())["origin"]["run"] == finished
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "fork" / "metrics.jsonl") if "loss" in row] == [16, 17, 18, 19, 20]
    assert cli.main([*argv, f"{finished}@20"]) == 2


def refused(capsys, *argv, ended=status.BAD_INPUT):
    """What a command says that is refused, in one line."""
    capsys.readouterr()
    assert cli.main(list(argv)) == ended
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_another_configuration_other_tokens_and_other_files_are_refused(finished, reference, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["run", str(reference.experiment), "--out", finished]
    names = server.names()
    assert cli.main([*argv, "--set", "model.d_ff=128"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"fetches the run from {finished}" and len(said) == 2
    assert f"--out = {finished}: holds a run of another configuration (model.d_ff 64 -> 128). " in said[1]
    assert "model.d_ff" in refused(capsys, *argv, "--set", "model.d_ff=128")  # nothing is fetched twice
    # this directory has copies of that run, and serves no other one
    here = tmp_path / "runs" / "finished"
    assert "has copies of the run in gs://bucket/runs/finished" in refused(capsys, *argv[:2], "--out", str(here))
    assert "holds audit.html of gs://bucket/runs/finished" in refused(capsys, *argv[:2], "--out", "gs://bucket/other/finished")
    # a directory of another run
    shutil.rmtree(here)
    here.mkdir()
    (here / "config.json").write_text("{}")
    assert "holds config.json of something else" in refused(capsys, *argv)
    shutil.rmtree(here)
    # what is in the bucket and no run
    storage.place("gs://bucket/notes/todo.txt").write_text("nothing")
    assert "holds todo.txt and is no run" in refused(capsys, *argv[:2], "--out", "gs://bucket/notes")
    assert server.names() - names == {"notes/todo.txt"} and names <= server.names()


def test_a_text_that_is_another_on_a_new_machine_is_refused(reference, server, tmp_path, monkeypatch, capsys):
    experiment, text = write_experiment(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    argv = ["train", str(experiment), "--out", "gs://bucket/runs/text", "--set", "train.steps=2"]
    monkeypatch.chdir(tmp_path / "a")
    assert cli.main(argv) == 0
    text.write_text(text.read_text()[:-100] + "x" * 100)
    monkeypatch.chdir(tmp_path / "b")
    assert cli.main(argv) == 2
    assert "gives other tokens here than the run in gs://bucket/runs/text has been trained on" in capsys.readouterr().err


def test_a_run_that_has_gone_from_the_bucket_is_not_begun_anew_over_its_copies(reference, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["train", str(reference.experiment), "--out", "gs://bucket/runs/gone", "--set", "train.steps=2"]
    assert cli.main(argv) == 0
    storage.place("gs://bucket/runs/gone").rmtree()
    before = (tmp_path / "runs" / "gone" / "metrics.jsonl").read_bytes()
    assert "no run is there any more, but runs/gone has copies of it" in refused(capsys, *argv)
    assert (tmp_path / "runs" / "gone" / "metrics.jsonl").read_bytes() == before


def test_code_from_a_bucket_is_executed_only_if_it_is_trusted(reference, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment, _ = write_experiment(tmp_path)
    experiment.write_text(experiment.read_text() + "\nfrom mlm_jax.model import gpt2\nMODEL = gpt2.GPT2\n")
    url = "gs://bucket/runs/code"
    assert cli.main(["train", str(experiment), "--out", url, "--set", "train.steps=2"]) == 0
    experiment.unlink()
    with pytest.raises(InputError, match=f"pass --trust-code to execute {url}/code"):
        runs.load(url)
    assert runs.load(url, trust_code=True).params
    (storage.place(url) / "code" / "tiny_test.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match=r"code/tiny_test.py is not what the run recorded"):
        runs.load(url, trust_code=True)


@pytest.mark.parametrize("answer", [403, 0])  # 0: while a library tries again for half a minute
def test_a_bucket_that_vanishes_before_the_rows_are_sent_ends_the_run_which_goes_on_when_it_is_back(reference, server, tmp_path, answer):
    name = f"rows_{answer}"
    url, machine, seen = f"gs://bucket/runs/{name}", tmp_path / "machine", []

    def gone(method, path):
        if (method, path) == ("POST", "") and f"runs/{name}/config.json" in server.names():  # a small file, when all is prepared
            seen.append(path)
        return answer if seen else None

    server.answer = gone
    failed = run_on(machine, reference.experiment, url)
    assert failed.status == 1 and failed.stderr.splitlines()[-1].startswith(f"mlm-jax: {url} cannot be reached: ")
    assert "Traceback" not in failed.stderr
    server.answer = lambda method, name: None
    assert not any(path.startswith(f"runs/{name}/checkpoints/") for path in server.names())  # none without its rows
    assert max(row["step"] for row in metrics.read_metrics(machine / "runs" / name / "metrics.jsonl")) >= 5
    again = run_on(machine, reference.experiment, url)
    assert again.status == 0 and "fetches" not in again.stderr, again.stderr
    check_same_run(url, reference.folder)


def test_a_bucket_that_vanishes_during_a_save_ends_the_run_which_goes_on_when_it_is_back(reference, server, tmp_path):
    url, machine, seen = "gs://bucket/runs/saving", tmp_path / "machine", []

    def gone(method, path):
        if method != "GET" and "runs/saving/checkpoints/10/params" in path:
            seen.append(path)
        return 403 if seen else None

    server.answer = gone
    failed = run_on(machine, reference.experiment, url)
    (line,) = refusals([failed])
    assert failed.status == 1 and line.startswith(f"mlm-jax: checkpoint 10 could not be written to {url}/checkpoints: "), failed.stderr
    server.answer = lambda method, name: None
    assert checkpoint.steps_in(f"{url}/checkpoints") == [5]
    assert max(row["step"] for row in metrics.read_metrics(machine / "runs" / "saving" / "metrics.jsonl")) >= 10
    again = run_on(machine, reference.experiment, url)
    assert again.status == 0 and "going on from step 5" in again.stderr, again.stderr
    check_same_run(url, reference.folder)


def test_a_bucket_that_is_not_there_or_may_not_be_written_to_is_refused_in_one_line(reference, server, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "WAIT_S", 3.0)
    argv = ["run", str(reference.experiment), "--out"]
    assert "--out = gs://nowhere/x: there is no such bucket. " in refused(capfd, *argv, "gs://nowhere/x")
    server.answer = lambda method, name: 403
    assert "--out = gs://bucket/x: cannot be written to (Forbidden: " in refused(capfd, *argv, "gs://bucket/x")
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_bucket_that_does_not_answer_ends_the_start_with_status_1_as_it_may_later(reference, server, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "WAIT_S", 3.0)
    server.answer = lambda method, name: 0
    said = refused(capfd, "run", str(reference.experiment), "--out", "gs://bucket/x", ended=status.FAILED)
    assert said.startswith("mlm-jax: gs://bucket/x cannot be reached: no answer within 3 s")
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_bucket_that_refuses_connections_ends_the_start_within_a_minute(reference, running, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    running.answer = lambda method, name: 0
    try:
        said = refused(capfd, "run", str(reference.experiment), "--out", "gs://bucket/x", ended=status.FAILED)
        assert said.startswith("mlm-jax: gs://bucket/x cannot be reached: ")
    finally:
        running.answer = lambda method, name: None


# The run is taken over, as by another machine, when the row of step 7 is written.
TAKEN = """
import json
from mlm_jax import storage
from mlm_jax.metrics import MetricsFile
plain = MetricsFile.write
def write(self, row):
    plain(self, row)
    if row["step"] == 7 and "loss" in row:
        storage.write_text(storage.place("{url}/.owner"), json.dumps({{"host": "another", "pid": 12, "since": "2026-01-01"}}))
MetricsFile.write = write
"""


def test_of_two_machines_the_one_that_began_last_goes_on(reference, server, tmp_path):
    url = "gs://bucket/runs/taken"
    (ended,) = run_processes(
        tmp_path / "first", ["run", str(reference.experiment), "--out", url], 1, DEVICES, code={0: on(tmp_path / "a") + TAKEN.format(url=url)}
    )
    line = f"mlm-jax: --out = {url}: taken over by process 12 on another since 2026-01-01. Let one machine at a time use it."
    assert (ended.status, ended.stderr.splitlines()[-1]) == (2, line)
    assert checkpoint.steps_in(f"{url}/checkpoints") == [5] and [row["step"] for row in rows_of(url) if "loss" in row] == [1, 2, 3, 4, 5]
    again = run_on(tmp_path / "b", reference.experiment, url)
    assert again.status == 0 and "going on from step 5" in again.stderr
    check_same_run(url, reference.folder)


def test_two_processes_with_directories_of_their_own_make_the_same_run(reference, server, tmp_path):
    url, tokens = "gs://bucket/runs/two", reference.folder / "tokens"
    argv = ["run", str(reference.experiment), "--out", url, "--set", f"data.tokens={tokens}"]
    code = {0: on(tmp_path / "a0", at=12, signal="SIGTERM"), 1: on(tmp_path / "a1")}
    found = run_processes(tmp_path / "first", argv, 2, DEVICES // 2, code=code)
    assert [process.status for process in found] == [status.STOPPED] * 2, [process.stderr for process in found]
    found = run_processes(tmp_path / "second", argv, 2, DEVICES // 2, code={i: on(tmp_path / f"b{i}") for i in range(2)})
    assert [process.status for process in found] == [0, 0], [process.stderr for process in found]
    assert "fetches the run" in found[0].stderr and "fetches the run" not in found[1].stderr
    again = run_processes(tmp_path / "third", argv, 2, DEVICES // 2, code={i: on(tmp_path / f"b{i}") for i in range(2)})
    assert [process.status for process in again] == [0, 0], [process.stderr for process in again]
    assert {path.name for path in (tmp_path / "b1" / "runs" / "two").iterdir()} == {".home"}
    rows, wanted = rows_of(url), metrics.read_metrics(reference.folder / "metrics.jsonl")
    for name in ("loss", "val_loss"):
        assert [row["step"] for row in rows if name in row] == [row["step"] for row in wanted if name in row]
        np.testing.assert_allclose([row[name] for row in rows if name in row], [row[name] for row in wanted if name in row], rtol=1e-5)
    assert {f"runs/two/{name}" for name in ("evaluation.json", "samples.txt", "report.html", "hf/model.safetensors")} <= server.names()
