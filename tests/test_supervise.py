"""A run that is started again, with small stand-ins for it."""

import errno
import functools
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_jax import status, supervise

ROOT = Path(__file__).parents[1]

# Each start takes the next line of the plan: the step that it comes to, or "-", and how it ends, a status or a signal.
CHILD = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
first, *rest = (folder / "plan").read_text().splitlines()
(folder / "plan").write_text("\\n".join(rest))
with open(folder / "starts", "a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")
step, end = first.split()
if step != "-":
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": int(step)}) + "\\n")
print("out of the child", flush=True)
print("err of the child", file=sys.stderr, flush=True)
if end.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, end))
    time.sleep(60)
sys.exit(int(end))
"""


class Supervised:
    """One supervised run of a plan, on a clock that only its waits move."""

    def __init__(self, folder: Path, plan: list[str], argv: tuple[str, ...] = (), **settings: int) -> None:
        (folder / "plan").write_text("\n".join(plan))
        self.said: list[str] = []
        at: list[float] = []  # when that was said
        now = [0.0]

        def sleep(seconds: float) -> None:
            assert 0 < seconds <= 0.5, "a signal would wait for so long"
            now[0] += seconds

        def say(line: str) -> None:
            self.said.append(line)
            at.append(now[0])

        command = (sys.executable, "-c", CHILD, str(folder))
        progress = functools.partial(supervise.newest_step, folder)
        self.status = supervise.run(argv, progress, command=command, say=say, clock=lambda: now[0], sleep=sleep, **settings)
        self.starts = [json.loads(line) for line in (folder / "starts").read_text().splitlines()]
        self.waits = [round(b - a, 6) for a, b in itertools.pairwise([*at, now[0]])]


@pytest.mark.parametrize("end", [status.DONE, status.BAD_INPUT])
def test_what_is_done_or_was_asked_wrongly_is_not_started_again(end, tmp_path):
    found = Supervised(tmp_path, [f"- {end}", "- 0"])
    assert (found.status, len(found.starts), found.said) == (end, 1, [])


def test_what_fails_stops_or_is_killed_is_started_again_until_it_is_done(tmp_path, capfd):
    found = Supervised(tmp_path, ["3 1", "5 75", "6 76", "7 SIGKILL", "8 SIGABRT", "9 130", "10 0"])
    assert (found.status, len(found.starts)) == (0, 7)
    ends = [f"ended with status {n}" for n in (1, 75, 76)] + ["was ended by SIGKILL", "was ended by SIGABRT", "ended with status 130"]
    steps = (3, 5, 6, 7, 8, 9)
    assert found.said == [f"the run {end} after 0 s, at step {step}; it starts again in 1 s" for end, step in zip(ends, steps, strict=True)]
    assert found.waits == [1.0] * 6
    out, err = capfd.readouterr()  # passed through as it is
    assert (out, err) == ("out of the child\n" * 7, "err of the child\n" * 7)


def test_without_a_new_step_it_waits_twice_as_long_each_time_and_gives_up_in_the_end(tmp_path):
    plan = ["2 1", "3 1", "- 1", "3 76", "- SIGKILL", "1 1", "4 1", *["- 1"] * 7, "- SIGTERM", "- 0"]
    found = Supervised(tmp_path, plan, tries=9)
    assert found.waits == [1, 1, 2, 4, 8, 16, 1, 2, 4, 8, 16, 32, 60, 60, 0]
    assert found.said[-1] == (
        "the run was ended by SIGTERM after 0 s, at step 4; that was failure 9 in a row without a new step, so it is not started again"
    )
    assert (found.status, len(found.starts)) == (128 + signal.SIGTERM, 15)


def test_it_gives_up_after_five_tries_with_the_last_status(tmp_path):
    found = Supervised(tmp_path, ["- 1"] * 4 + ["- 76", "- 0"])
    assert (found.status, len(found.starts), found.waits) == (76, 5, [1, 2, 4, 8, 0])


def test_steps_that_are_taken_again_are_no_progress():
    reached, said = iter([0, 50, 20, 50, 49, 50, 50]), []
    command = (sys.executable, "-c", "import sys; sys.exit(1)")
    times = itertools.count(0, 100)
    assert supervise.run([], lambda: next(reached), command=command, say=said.append, clock=lambda: next(times), sleep=print) == 1
    assert [line.split("; ")[1] for line in said[:-1]] == [f"it starts again in {wait} s" for wait in (1, 2, 4, 8)]
    assert said[-1].startswith("the run ended with status 1 after 100 s, at step 50; that was failure 5 in a row without a new step")


def test_the_child_gets_the_same_arguments_but_does_not_supervise(tmp_path):
    given = ("run", "x.py", "--supervise", "--set", "a=1", "--superv", "--su", "--set", "--json", "-s", "supervise")
    found = Supervised(tmp_path, ["- 0"], given)
    assert found.starts == [["run", "x.py", "--set", "a=1", "--set", "--json", "-s", "supervise"]]


def test_the_child_is_the_command_line_itself(capfd):
    assert supervise.run(["report", "--supervise", "/nowhere/at/all"], lambda: 0) == 2
    assert capfd.readouterr().err.startswith("mlm-jax: ")


def test_the_line_on_a_restart_says_how_long_the_run_was_there(tmp_path):
    times, said = iter([100.0, 250.4, 250.4, 260.0, 300.0, 300.0]), []
    (tmp_path / "plan").write_text("- 1\n- 0")
    command = (sys.executable, "-c", CHILD, str(tmp_path))
    assert supervise.run([], lambda: 7, command=command, say=said.append, clock=lambda: next(times), sleep=print) == 0
    assert said == ["the run ended with status 1 after 150 s, at step 7; it starts again in 1 s"]


# ---- signals ----

# A supervisor, also where these tests run in the background of a shell, which has all that it starts there ignore SIGINT. Its child notes each
# signal, and ends with 75 after so many.
SUPERVISOR = """
import signal, sys
from mlm_jax import supervise
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(supervise.run(sys.argv[2:], lambda: 0, command=(sys.executable, "-c", sys.argv[1])))
"""
NOTING = """
import signal, sys, time
left = [int(sys.argv[1])]
def note(number, _):
    print(signal.Signals(number).name, flush=True)
    left[0] -= 1
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, note)
print("ready", flush=True)
while left[0] > 0:
    time.sleep(0.01)  # signal.pause() would miss a signal just before it
sys.exit(75)
"""


def supervisor(child: str, *argv: object, under: tuple[str, ...] = (), **settings: object) -> subprocess.Popen[str]:
    command, pipe = [*under, sys.executable, "-c", SUPERVISOR, child, *map(str, argv)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, **settings)  # pyright: ignore


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip("\n")


@pytest.mark.parametrize("names", [["SIGTERM"], ["SIGINT"], ["SIGHUP"], ["SIGTERM", "SIGTERM"], ["SIGINT", "SIGTERM"]])
def test_each_request_to_stop_goes_to_the_child_once_and_ends_the_supervisor_with_its_status(names):
    with supervisor(NOTING, len(names)) as process:
        assert line(process) == "ready"
        for name in names:
            process.send_signal(getattr(signal, name))
            assert line(process) == name
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("", "", 75)


def test_what_is_typed_at_the_terminal_comes_to_the_child_once():
    with supervisor(NOTING, 2, start_new_session=True) as process:
        assert line(process) == "ready"
        os.killpg(process.pid, signal.SIGINT)  # to all in the foreground, as a terminal does
        assert line(process) == "SIGINT"
        os.killpg(process.pid, signal.SIGINT)
        assert line(process) == "SIGINT"
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("", "", 75)


def test_a_request_to_stop_ends_the_wait_for_the_next_start(tmp_path):
    (tmp_path / "plan").write_text("- 3\n- 0")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        signal.raise_signal(signal.SIGTERM)

    command = (sys.executable, "-c", CHILD, str(tmp_path))
    assert supervise.run([], lambda: 0, command=command, clock=lambda: 0.0, sleep=sleep) == 3
    assert len(slept) == 1 and (tmp_path / "plan").read_text() == "- 0"


def test_a_signal_that_is_ignored_stays_ignored():
    with supervisor(NOTING, 1, under=("sh", "-c", 'trap "" HUP; exec "$@"', "sh")) as process:  # what nohup does
        assert line(process) == "ready"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("SIGTERM\n", "", 75)


def test_a_child_that_a_signal_of_ours_ends_is_not_started_again():
    with supervisor("import time; print('ready', flush=True); time.sleep(60)") as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("", "", 128 + signal.SIGTERM)


def test_the_handlers_of_before_come_back(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    Supervised(tmp_path, ["- 0"])
    assert [signal.getsignal(number) for number in numbers] == before


# ---- progress ----


def test_progress_is_the_newest_step_with_figures_or_a_checkpoint(tmp_path):
    assert supervise.newest_step(tmp_path / "nowhere") == 0
    assert supervise.newest_step(tmp_path) == 0
    rows = tmp_path / "metrics.jsonl"
    rows.write_text("")
    assert supervise.newest_step(tmp_path) == 0
    rows.write_text('{"step": 1}\n{"step": 12, "loss": 3.0}\n{"step": 13, "lo')  # the last was cut off
    assert supervise.newest_step(tmp_path) == 12
    for name in ("5", "20", "40.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert supervise.newest_step(tmp_path) == 20
    rows.write_text("".join(f'{{"step": {i}, "loss": 3.0}}\n' for i in range(50_000)))  # of which the end is read alone
    assert supervise.newest_step(tmp_path) == 49_999


def test_a_log_on_a_full_disk_does_not_end_the_supervisor(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(sys, "stderr", Full())
    supervise._say("the run ended with status 1")


def test_supervising_imports_nothing_heavy():
    code = "import sys, mlm_jax.supervise; print([name for name in ('jax', 'numpy', 'flax', 'orbax') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
