"""A step that takes too long, and processes that are gone."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from mlm_jax import distributed, status, watch
from mlm_jax.stopping import Stopped

ROOT = Path(__file__).parents[1]

# ---- a step that takes too long ----


class Watched:
    """A watchdog without its thread, on a clock of ours."""

    def __init__(self, limit_s: float) -> None:
        self.now, self.said, self.ended = 100.0, [], []
        self.dog = watch.Watchdog(limit_s, say=self.said.append, end=self.ended.append, clock=lambda: self.now)
        self.dog.begin(1)

    def wait(self, seconds: float) -> bool:
        """Whether the process is ended after so many more seconds."""
        self.now += seconds
        before = len(self.ended)
        self.dog.check()
        return len(self.ended) > before


def test_a_step_may_take_as_long_as_the_limit_says():
    watched = Watched(30)
    for step in range(1, 4):
        assert not watched.wait(30)
        watched.dog.begin(step + 1)
        watched.dog.beat(step)
    assert not watched.wait(30) and watched.wait(0.1)
    assert watched.ended == [76]
    assert watched.said == [
        "no step was finished for 30 s after step 3 (the limit is 30 s, train.step_timeout sets another); the same command goes on from the last save"
    ]


def test_between_steps_there_is_no_limit_and_the_next_step_has_its_whole_time():
    watched = Watched(30)
    watched.dog.beat(1)
    assert not watched.wait(10_000)
    watched.dog.begin(2)
    assert not watched.wait(30)
    watched.dog.begin(3)  # while the devices are at step 2
    assert watched.wait(0.1)
    assert watched.said[-1].startswith("no step was finished for 30 s after step 1 ")


def test_the_automatic_limit_is_twenty_recent_steps_and_at_least_ten_minutes():
    assert not Watched(0).wait(100_000)  # the first may take as long as it takes
    watched = Watched(0)
    for step, seconds in enumerate([29, 29, 29, 580], start=1):  # one that is slow moves it not
        assert not watched.wait(seconds)
        watched.dog.beat(step)
        watched.now += 10_000  # which is no step
        watched.dog.begin(step + 1)
    assert watched.dog.limit_s == 600
    for step in range(5, 105):
        assert not watched.wait(40)
        watched.dog.begin(step + 1)
        watched.dog.beat(step)
    assert watched.dog.limit_s == 800
    assert not watched.wait(800) and watched.wait(0.1)


HANG = """
import threading
from mlm_jax import watch

def the_step_that_hangs():
    threading.Event().wait()

with watch.Watchdog(1) as dog:
    dog.begin(8)
    the_step_that_hangs()
"""


def test_a_hanging_process_ends_with_status_76_and_shows_where_each_thread_stands():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 76, done.stderr
    *stacks, last = done.stderr.splitlines()
    assert (
        any("in the_step_that_hangs" in line for line in stacks) and sum(line.startswith(("Thread 0x", "Current thread 0x")) for line in stacks) >= 2
    )
    assert last.startswith("mlm-jax: no step was finished for ") and " after step 7 (the limit is 1 s, " in last


def test_the_process_ends_where_nothing_can_be_said_too():
    watched = Watched(30)

    def say(line: str) -> None:
        raise OSError("no space left")

    watched.dog._say = say
    with pytest.raises(OSError):
        watched.wait(31)
    assert watched.ended == [76]


def test_a_loop_that_ends_leaves_no_thread():
    before = threading.active_count()
    with watch.Watchdog(600):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# ---- what is known of the other processes ----


class Heard:
    """What process `process` knows of four, on a clock of ours."""

    def __init__(self, process: int) -> None:
        self.now = 0.0
        self.others = watch.Others(process, 4, lambda: self.now)

    def hear(self, seconds: float, *positions: tuple[Any, ...]) -> None:
        """So many seconds later each process was at (said, finished, begun, left)."""
        self.now += seconds
        self.others.hear({i: watch.Position(*position) for i, position in enumerate(positions)})


def test_processes_that_are_behind_are_named():
    heard = Heard(2)
    heard.hear(5, (1, 10, 11), (1, 9, 10), (1, 10, 11), (1, 9, 10))
    assert heard.others.words(watch.Position(0, 10, 11), 20) == "processes 1, 3 of 4 began step 10 last, the furthest began step 11"
    heard.hear(5, (2, 10, 10), (2, 10, 11), (2, 8, 8), (2, 10, 11))  # this one knows better of itself
    assert heard.others.words(watch.Position(0, 10, 11), 20) == "process 0 of 4 began step 10 last, the furthest began step 11"
    heard.hear(5, (3, 10, 11), (3, 10, 11), (3, 8, 8), (3, 10, 11))
    assert heard.others.words(watch.Position(0, 10, 11), 20) == "all processes are at the same step"
    assert heard.others.words(watch.Position(0, 9, 11), 20) == "process 2 of 4 began step 11 last, the furthest began step 11"


def test_a_process_that_has_fallen_silent_is_gone_and_one_that_left_or_still_compiles_is_not(monkeypatch):
    monkeypatch.setattr(watch, "SILENCE_S", 45)
    heard = Heard(2)
    heard.hear(5, (1, 1, 1), (0, 0, 0), (1, 1, 1), (1, 1, 1))  # process 1 has not begun to watch
    for n in range(2, 12):
        heard.hear(5, (n, n, n), (0, 0, 0), (n, n, n), (1, 1, 1, True))
    assert heard.others.silent(45) == {1: 55.0} and not heard.others.gone()
    for n in range(12, 22):
        assert not heard.others.gone()
        heard.hear(5, (11, 11, 11), (0, 0, 0), (n, n, n), (1, 1, 1, True))
    assert heard.others.silent(45) == {0: 50.0, 1: 105.0} and heard.others.gone()
    words = "process 0 has not been heard of for 50 s, process 1 has not been heard of for 105 s"
    assert heard.others.words(watch.Position(0, 11, 12), 45) == words


@pytest.mark.parametrize(("process", "words"), [(1, "process 0 has not been heard of for 50 s"), (0, "process 1 has not been heard of for 50 s")])
def test_where_the_news_no_longer_come_it_is_process_0_that_is_gone(process, words):
    heard = Heard(process)
    for n in range(1, 5):
        heard.hear(5, *[(n, n, n)] * 4)
    heard.now += 50  # process 0 itself hears from its own store, so it is the others that are silent
    assert heard.others.gone()
    assert heard.others.words(watch.Position(0, 4, 5), 45).startswith(words)
    assert ("process 2" in heard.others.words(watch.Position(0, 4, 5), 45)) == (process == 0)


def test_a_process_that_stopped_as_it_was_asked_or_is_done_has_left_and_one_that_failed_is_missed(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "publish", lambda name, value: said.append(value))
    monkeypatch.setattr(distributed, "published", lambda name: dict(enumerate(["1 0 0 0", "1 0 0 0"])))
    for error, left in ((None, True), (Stopped(8), True), (OSError(), False)):
        with contextlib.suppress(Stopped, OSError), watch.Watchdog(600):
            if error:
                raise error
        assert watch.Position.unpacked(said[-1]).left == left, error


def test_a_position_arrives_as_it_was_sent():
    for position in (watch.Position(1, 2, 3), watch.Position(10, 0, 0, left=True)):
        assert watch.Position.unpacked(position.packed()) == position


# ---- several processes ----

# A process of a run: its number of devices, after how many seconds one that says nothing is gone, and the command line.
PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from mlm_jax import cli, watch
watch.SILENCE_S = float(sys.argv[2])
sys.exit(cli.main(sys.argv[3:]))
"""


@contextlib.contextmanager
def processes(experiment: Path, folder: Path, n: int, limit_s: float, silence_s: float) -> Iterator[list[subprocess.Popen[str]]]:
    """`n` processes of a run without an end, of two devices each, after its first steps."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    sets = {"train.steps": 1_000_000, "train.save_every": 0, "train.eval_every": 0, "train.step_timeout": limit_s, "mesh.fsdp": 2}
    argv = ["train", str(experiment), "--out", str(folder), *(word for path, value in sets.items() for word in ("--set", f"{path}={value}"))]
    started = []
    with contextlib.ExitStack() as stack:
        for i in range(n):
            command = [sys.executable, "-c", PROCESS, "2", str(silence_s), *argv]
            command += ["--coordinator", address, "--processes", str(n), "--process", str(i)]
            err = stack.enter_context((folder.parent / f"err_{i}").open("w"))
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=err, stderr=err, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        metrics = folder / "metrics.jsonl"
        for _ in range(1200):
            if (metrics.is_file() and metrics.read_text().count("\n") > 5) or any(process.poll() is not None for process in started):
                break
            time.sleep(0.1)
        assert all(process.poll() is None for process in started), [said(folder, i) for i in range(n)]
        yield started


def said(folder: Path, i: int) -> str:
    """What process `i` has written on stderr."""
    return (folder.parent / f"err_{i}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "victim"), [(2, 0), (4, 2)])
def test_where_a_process_is_killed_the_others_end_and_say_so(n, victim, tiny_experiment, tmp_path):
    folder = tmp_path / "run"
    with processes(tiny_experiment, folder, n, limit_s=20, silence_s=6) as started:
        started[victim].kill()
        for process in started:
            process.wait(90)
    for i, process in enumerate(started):
        err = said(folder, i)
        if i != victim:
            # By gloo's error, or, where it leaves them waiting, by the silence. Where process 0 is gone, JAX ends the others if it is quicker; and so
            # does gloo where, of two devices of a process, one turns to its next exchange while the other still waits for that which failed.
            aborted = process.returncode == -signal.SIGABRT and (victim == 0 or "gloo::EnforceNotMet" in err)
            assert process.returncode == status.LOST or aborted, err
            assert "another process of this run is gone" in err or "has not been heard of for " in err or aborted, err


@pytest.mark.slow
@pytest.mark.parametrize(("limit_s", "silence_s", "victim"), [(4, 45, 1), (600, 4, 0)])
def test_where_a_process_stands_still_another_ends_and_names_it(victim, limit_s, silence_s, tiny_experiment, tmp_path):
    folder = tmp_path / "run"
    with processes(tiny_experiment, folder, 2, limit_s, silence_s) as started:
        started[victim].send_signal(signal.SIGSTOP)
        started[1 - victim].wait(90)
    err = said(folder, 1 - victim)
    assert started[1 - victim].returncode == status.LOST, err
    last = err.splitlines()[-1]
    assert last.startswith("mlm-jax: no step was finished for ") and f"; process {victim} has not been heard of for " in last, err
    assert "most recent call first" in err and "in train" in err


GLOO = "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:{}"
LOST = [
    ValueError(GLOO.format("547] Connection closed by peer [127.0.0.1]:3776")),
    ValueError(GLOO.format("538] Read error [127.0.0.1]:27574: Connection reset by peer")),
    jax.errors.JaxRuntimeError(
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed. Check the task logs for an earlier "
        "error, or scheduler events (e.g. preemption, eviction) to debug further.\n\nRPC: /xla.coordination.CoordinationService/PollForError"
    ),
    jax.errors.JaxRuntimeError(
        "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died/restarted unexpectedly or this task is "
        "experiencing network issues."
    ),
    jax.errors.JaxRuntimeError(
        "UNAVAILABLE: Socket closed\nAdditional GRPC error information from remote target coordination_service while calling "
        "/xla.coordination.CoordinationService/GetKeyValue:"
    ),
]


@pytest.mark.parametrize("error", LOST)
def test_an_error_that_another_process_caused_by_its_end_is_told_from_others(error, monkeypatch):
    assert not distributed.lost(error)  # alone nobody can be gone
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert distributed.lost(error)
    for link in ("__cause__", "__context__"):
        outer = RuntimeError("cannot save")
        setattr(outer, link, error)
        assert distributed.lost(outer)


@pytest.mark.parametrize(
    "error",
    [
        OSError("disk full"),
        ValueError("Connection closed by peer"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        KeyError("gloo"),
    ],
)
def test_an_error_of_this_process_is_its_own(error, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    error.__cause__, error.__context__ = ValueError("x"), error
    assert not distributed.lost(error)
