"""metrics.jsonl has each step once whatever happened before; figures that are multiplied and divided by hand."""

import io
import json
import math
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from tensorboardX.proto import event_pb2

from mlm_jax import cli, metrics
from mlm_jax.config import Config, InputError, ModelConfig
from mlm_jax.model import gpt2


def write(path, *lines):
    path.write_text("".join(lines))
    return path


def row(step, **values):
    return json.dumps({"step": step, **values}) + "\n"


def test_rows_are_appended_and_read_back(tmp_path):
    history = metrics.MetricsFile(tmp_path / "metrics.jsonl", resume_at=0)
    history.write({"step": 1, "loss": 2.5})
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]  # at once: a kill loses nothing
    history.write({"step": 2, "loss": float("nan")})
    history.close()
    assert [r["step"] for r in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_resuming_drops_the_rows_that_come_again(tmp_path):
    path = write(tmp_path / "metrics.jsonl", row(1, loss=3), row(2, loss=2), row(2, val_loss=2), row(3, loss=1))
    history = metrics.MetricsFile(path, resume_at=2)
    history.write({"step": 3, "loss": 1.5})
    history.close()
    assert metrics.read_metrics(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 2, "val_loss": 2}, {"step": 3, "loss": 1.5}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def scalars(folder):
    """What TensorBoard shows of the event files in `folder`: {name: {step: value}}; a file that says it goes on at a step hides what is after it."""
    shown = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # records: length, its checksum, the bytes, their checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                shown = {name: {s: v for s, v in values.items() if s < event.step} for name, values in shown.items()}
            for value in event.summary.value:
                assert event.step not in shown.setdefault(value.tag, {})
                shown[value.tag][event.step] = value.simple_value
    return shown


def test_tensorboard_has_every_number_once_over_a_restart(tmp_path):
    killed = metrics.TensorBoard(tmp_path, resume_at=0)
    killed.write({"step": 1, "loss": 99.0})
    killed.close()
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / f"{file.name}.before")  # of another process
    first = metrics.TensorBoard(tmp_path, resume_at=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 10.0 - step, "skipped": [1, 2], "step_s": 0.5})
    first.close()
    again = metrics.TensorBoard(tmp_path, resume_at=3)
    for step in range(4, 7):
        again.write({"step": step, "loss": 20.0 - step})
    again.write({"step": 6, "val_loss": 2.5})
    again.close()
    losses = {1: 9.0, 2: 8.0, 3: 7.0, 4: 16.0, 5: 15.0, 6: 14.0}
    assert scalars(tmp_path) == {"train/loss": losses, "validation/val_loss": {6: 2.5}, "machine/step_s": {1: 0.5, 2: 0.5, 3: 0.5}}


def test_what_was_flushed_is_in_the_files_of_a_process_that_is_killed(tmp_path):
    recorder = metrics.Recorder(tmp_path, Config(name="test"), resume_at=0)
    for step in range(1, 21):
        recorder.write({"step": step, "loss": 1.0})
    recorder.flush()
    assert (
        len(scalars(tmp_path / "tensorboard")["train/loss"]) == len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 20
    )  # nothing is closed yet
    with recorder:
        pass


FULL = """
import resource, sys
from pathlib import Path
from mlm_jax import metrics
board = metrics.TensorBoard(Path(sys.argv[1]), resume_at=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # from here on no file grows
try:
    for step in range(1, 1001):
        board.write({"step": step, "loss": 1.0})
except OSError:
    sys.exit(3)
"""


def test_event_files_that_cannot_grow_are_an_error_and_nothing_waits(tmp_path):
    assert subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=Path(__file__).parents[1], timeout=120).returncode == 3


def test_why_a_run_failed_is_not_hidden_by_files_that_cannot_be_closed(tmp_path, monkeypatch):
    close = metrics.TensorBoard.close

    def fail(self):
        close(self)
        raise OSError("no space left")

    monkeypatch.setattr(metrics.TensorBoard, "close", fail)
    with pytest.raises(OSError, match="no space left"), metrics.Recorder(tmp_path, Config(name="test"), resume_at=0):
        pass
    with pytest.raises(ValueError, match="the reason"), metrics.Recorder(tmp_path, Config(name="test"), resume_at=0):
        raise ValueError("the reason")


class FakeWandb(types.ModuleType):
    """Keeps what is sent."""

    def __init__(self, error=None):
        super().__init__("wandb")
        self.error, self.begun, self.rows, self.ended = error, [], [], 0

    def init(self, **how):
        if self.error:
            raise self.error
        self.begun.append(how)
        return self

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.ended += 1


def test_weights_and_biases_gets_the_numbers_and_the_same_run_after_a_restart(tmp_path, monkeypatch):
    library = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", library)
    for resume_at in (0, 1):
        with metrics.Recorder(tmp_path, Config(name="test"), resume_at=resume_at, wandb="project") as recorder:
            recorder.write({"step": resume_at + 1, "loss": 2.5, "skipped": [3]})
    assert library.rows == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.5}] and library.ended == 2
    first, second = library.begun
    other = tmp_path / "other"
    other.mkdir()
    metrics.Wandb("project", Config(name="test"), other).close()
    assert library.begun.pop()["id"] != first["id"]
    assert first == second and (first["project"], first["name"], first["resume"]) == ("project", "test", "allow")
    assert first["config"]["train"]["steps"] == 1000 and first["dir"] == str(tmp_path)
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, r'is not installed. pip install -e "\.\[wandb\]"'), (FakeWandb(RuntimeError("no key")), "does not start .no key.. Run `wandb login`")],
)
def test_weights_and_biases_that_do_not_start_are_named_and_nothing_is_written(tmp_path, monkeypatch, library, reason):
    monkeypatch.setitem(sys.modules, "wandb", library)
    with pytest.raises(InputError, match=f"--wandb = project: Weights & Biases {reason}" if library is None else f"--wandb = project: {reason}"):
        metrics.Recorder(tmp_path, Config(name="test"), resume_at=0, wandb="project")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_line_names_the_project_that_gets_each_step(tiny_experiment, tmp_path, monkeypatch):
    library = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", library)
    assert cli.main(["train", str(tiny_experiment), "--out", str(tmp_path / "run"), "--set", "train.steps=3", "--wandb", "my-project"]) == 0
    assert [begun["project"] for begun in library.begun] == ["my-project"] and library.ended == 1
    assert [row["step"] for row in library.rows if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"st', '{"step": 2', "\udcff\udcfe"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((row(1, loss=3) + torn).encode(errors="surrogateescape"))
    assert metrics.read_metrics(path) == [{"step": 1, "loss": 3}]
    history = metrics.MetricsFile(path, resume_at=1)
    history.write({"step": 2, "loss": 2})
    history.close()
    assert [r["step"] for r in metrics.read_metrics(path)] == [1, 2]


def test_a_number_that_json_has_not_is_null(tmp_path):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl", resume_at=0)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'


@pytest.mark.parametrize("line", ["words\n", "[1]\n", '{"loss": 1}\n', '{"step": "one"}\n', "\n"])
def test_a_bad_line_in_the_middle_is_named(tmp_path, line):
    path = write(tmp_path / "metrics.jsonl", row(1), line, row(2))
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a JSON object with a step\. Remove the line\."):
        metrics.read_metrics(path)


def test_the_flops_of_a_small_model_match_a_count_of_its_matrix_products():
    config = ModelConfig(vocab_size=50, context_len=8, n_layers=3, n_heads=2, d_model=16, d_ff=64)
    n_params = gpt2.n_params(jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0))))
    D, F, L, T, V = 16, 64, 3, 8, 50
    products = L * (4 * D * D + 2 * D * F) + D * V  # multiplications of a token with weights, forward
    scores = L * 2 * T * D  # with keys and with values
    vectors = L * (4 * D + 4 * D + F + D) + 2 * D + T * D  # biases and gains, positions: the formula counts them too
    assert metrics.flops_per_token(config, n_params) == 3 * 2 * (products + scores + vectors)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_the_progress_is_plain_lines_and_few(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = metrics.Progress(100, 20, out)
    for step in range(21, 51):
        now[0] += 1.0
        progress.show(step, f"loss {step}")
    lines = out.getvalue().splitlines()
    assert lines[0] == "step  21/100  loss 21  ETA 1m19s"
    assert [line.split()[1] for line in lines] == ["21/100", "31/100", "41/100"]
    progress.note("a note")
    progress.show(51, "loss 51", always=True)
    assert out.getvalue().splitlines()[-2:] == ["a note", "step  51/100  loss 51  ETA 47s"]


def test_on_a_terminal_the_line_is_redrawn_and_a_note_stays():
    out = Terminal()
    progress = metrics.Progress(10, 0, out)
    progress.show(1, "loss 1", always=True)
    progress.note("validated")
    progress.show(2, "loss 2", always=True)
    first, note, second = out.getvalue().split("\r\x1b[K")[1:]
    assert "\n" not in first and note == "validated\n" and second.startswith("step  2/10  loss 2")


@pytest.mark.parametrize(("seconds", "words"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (3599.6, "1h00m"), (18420, "5h07m")])
def test_durations_read_well(seconds, words):
    assert metrics.duration(seconds) == words
