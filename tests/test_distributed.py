"""Several processes of one run on this machine: the same run as one process makes, and an end with a word where one is missing or fails."""

import dataclasses
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlm_jax import distributed
from mlm_jax.config import InputError
from mlm_jax.data.batches import Batches
from mlm_jax.data.tokens import open_tokens
from mlm_jax.metrics import read_metrics

ROOT = Path(__file__).parents[1]

# One process of a run: its number of devices, a file for the rows of batches that it reads (step, start, stop, tokens) and for the steps
# whose metrics it writes, and the command line.
PROCESS = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from mlm_jax import cli
from mlm_jax.data.batches import Batches
rows = Batches.rows
def recorded(self, step, start, stop):
    found = rows(self, step, start, stop)
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps([step, start, stop, found.tolist()]) + "\\n")
    return found
Batches.rows = recorded
from mlm_jax.metrics import MetricsFile
write = MetricsFile.write
def counted(self, row):
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps(row["step"]) + "\\n")
    write(self, row)
MetricsFile.write = counted
sys.exit(cli.main(sys.argv[3:]))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a process left."""

    status: int
    stdout: str
    stderr: str
    rows: list  # [step, start, stop, tokens], in the order they were read
    written: set  # steps whose metrics it wrote


def run_processes(folder: Path, argv: list[str], n: int, devices: int, *, absent: int = -1, **single: dict[int, Any]) -> list[Finished]:
    """Runs the command in `n` processes of `devices` devices each, without process `absent`.

    `more` has more arguments, and `code` what is executed before, for single processes.
    """
    folder.mkdir(exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    started = []
    for i in (i for i in range(n) if i != absent):
        flags = [] if n == 1 else ["--coordinator", address, "--processes", str(n), "--process", str(i)]
        code, more = single.get("code", {}).get(i, "") + PROCESS, single.get("more", {}).get(i, [])
        command = [sys.executable, "-c", code, str(devices), str(folder / f"rows_{i}"), *argv, *flags, *more]
        pipe = subprocess.PIPE
        started.append((i, subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True)))
    try:
        said = [(i, process, *process.communicate(timeout=600)) for i, process in started]
    finally:
        for _, process in started:
            process.kill()
            process.wait()
    finished = []
    for i, process, out, err in said:
        path = folder / f"rows_{i}"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows, written = [x for x in lines if isinstance(x, list)], {x for x in lines if isinstance(x, int)}
        finished.append(Finished(process.returncode, out, err, rows, written))
    return finished


def refusals(finished: list[Finished]) -> set[str]:
    """What mlm-jax said of a failure in each process, once."""
    return {line for process in finished for line in process.stderr.splitlines() if line.startswith("mlm-jax: ")}


# ---- the same run ----


def check_same_run(folder: Path, reference: Path, finished: list[Finished], devices: int, done: int = 0) -> None:
    """Asserts that the processes made the run that is in `reference`, and read just their rows of the batches after step `done` for it."""
    assert [process.status for process in finished] == [0] * len(finished), [process.stderr for process in finished]
    # the curve, written once
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, reference))
    assert [row["step"] for row in ours if "loss" in row] == list(range(1, 21))
    for name in ("loss", "grad_norm", "val_loss"):
        curves = [[row[name] for row in rows if name in row] for rows in (ours, theirs)]
        np.testing.assert_allclose(*curves, rtol=1e-5, err_msg=name)
    assert [process.written for process in finished] == [set(range(done + 1, 21))] + [set()] * (len(finished) - 1)
    # the tokens: in each step every row once, each process its own share, of the batch that one process would read
    batches = Batches(open_tokens(folder / "tokens", "train"), context_len=16, batch_size=8, seed=0)
    share = 8 // len(finished)
    for step in range(done, 20):
        for i, process in enumerate(finished):
            asked = sorted((start, stop, tokens) for s, start, stop, tokens in process.rows if s == step)
            bounds = range(i * share, (i + 1) * share + 1, share // devices)
            assert [(start, stop) for start, stop, _ in asked] == list(itertools.pairwise(bounds))
            assert min(s for s, *_ in process.rows) == done
            np.testing.assert_array_equal(np.concatenate([tokens for _, _, tokens in asked]), batches(step)[i * share : (i + 1) * share])


def check_same_export(folder: Path, reference: Path) -> None:
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (folder, reference))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name.endswith("c_attn.bias"):  # that of the keys has no gradient but rounding, which Adam amplifies
            ours[name][32:64] = theirs[name][32:64] = 0
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5 * max(1, abs(theirs[name]).max()), rtol=0, err_msg=name)


def test_two_processes_train_as_one_does_and_each_reads_its_rows(tiny_run, tmp_path):
    argv = ["train", str(tiny_run.experiment), "--out", str(tmp_path / "run"), "--json"]
    finished = run_processes(tmp_path, argv, 2, 2)
    check_same_run(tmp_path / "run", tiny_run.folder, finished, 2)
    assert json.loads(finished[0].stdout) == {"run": str(tmp_path / "run"), "step": 20} and finished[1].stdout == ""


@pytest.mark.slow  # the starts take half a minute
@pytest.mark.parametrize(("n", "devices", "slices"), [(2, 2, True), (4, 1, False)], ids=["2-2", "4-1"])
def test_a_whole_run_of_several_processes_is_that_of_one(n, devices, slices, tiny_run, tmp_path):
    """With `slices` each device writes its part of what all hold, as of large arrays, else the first process writes it."""
    argv = ["run", str(tiny_run.experiment), "--json", "--out"]
    alone = run_processes(tmp_path / "one", [*argv, str(tmp_path / "alone")], 1, 4)
    assert alone[0].status == 0, alone[0].stderr
    code = dict.fromkeys(range(n), "from mlm_jax import checkpoint\ncheckpoint.SLICE_BYTES = 0\n" if slices else "")
    finished = run_processes(tmp_path / "several", [*argv, str(tmp_path / "run")], n, devices, code=code)
    check_same_run(tmp_path / "run", tmp_path / "alone", finished, devices)
    written = (tmp_path / "run/checkpoints/20/params/w_token_VD/c").rglob("*")
    assert len([path for path in written if path.is_file()]) == (n * devices if slices else 1)
    check_same_export(tmp_path / "run", tmp_path / "alone")
    assert (tmp_path / "run/samples.txt").read_text() == (tmp_path / "alone/samples.txt").read_text()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
    assert [len(process.stdout.splitlines()) for process in finished] == [1] + [0] * (n - 1)


@pytest.mark.slow
def test_two_processes_go_on_from_the_newest_whole_checkpoint_of_one(tiny_run, tmp_path):
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    (tmp_path / "run/checkpoints/20").rename(tmp_path / "run/checkpoints/18")
    (tmp_path / "run/checkpoints/18/params/_METADATA").unlink()
    finished = run_processes(tmp_path, ["train", str(tiny_run.experiment), "--out", str(tmp_path / "run")], 2, 2)
    check_same_run(tmp_path / "run", tiny_run.folder, finished, 2, done=15)
    assert ["checkpoint 18 is damaged: params/_METADATA is missing" in process.stderr for process in finished] == [True, False]
    assert (tmp_path / "run/checkpoints/18.damaged").is_dir()


# ---- a process that is missing, or fails ----


def test_bad_input_that_the_leader_finds_ends_every_process_with_the_same_line(tiny_experiment, tmp_path):
    (tiny_experiment.parent / "text.txt").write_text("")
    finished = run_processes(tmp_path, ["run", str(tiny_experiment), "--out", str(tmp_path / "run")], 2, 1)
    assert [process.status for process in finished] == [2, 2], [process.stderr for process in finished]
    (line,) = refusals(finished)
    assert line.startswith(f"mlm-jax: data.source = {tiny_experiment.parent}/text.txt: no text")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_input_of_one_process_ends_every_process_with_the_same_line(tiny_run, tmp_path):
    argv = ["run", str(tiny_run.experiment), "--out", str(tmp_path / "run")]
    finished = run_processes(tmp_path, argv, 2, 1, more={1: ["--set", "model.n_heads=3"]})
    assert [process.status for process in finished] == [2, 2], [process.stderr for process in finished]
    (line,) = refusals(finished)
    assert line.startswith("mlm-jax: model.d_model = 32: model.n_heads = 3 does not divide it")


def test_a_process_that_never_comes_is_named(tiny_run, tmp_path):
    argv = ["run", str(tiny_run.experiment), "--out", str(tmp_path / "run"), "--join-timeout", "2"]
    (leader,) = run_processes(tmp_path, argv, 2, 1, absent=1)
    assert leader.status == 1 and leader.stderr.startswith("mlm-jax: TimeoutError: process 1 of 2 did not come to 127.0.0.1:"), leader.stderr
    assert "within 2 s; see whether" in leader.stderr and leader.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_others(tiny_run, tmp_path):
    argv = ["train", str(tiny_run.experiment), "--out", str(tmp_path / "run")]
    fail = "def fail(*_, **__):\n    raise OSError('disk full')\nfrom mlm_jax import train\n"
    finished = run_processes(tmp_path, argv, 2, 1, code={1: fail + "train.train = fail\n"})
    assert finished[1].status == 1 and refusals(finished[1:]) == {"mlm-jax: OSError: disk full (--traceback shows where)"}
    assert finished[0].status != 0


# ---- the meeting alone, one thread for each process ----


def meet(groups: list[distributed.Group], timeout: float = 20.0) -> list[str]:
    """What each process hears: "" where all came, else the error."""
    heard = [""] * len(groups)

    def take_part(i: int, group: distributed.Group) -> None:
        try:
            (distributed._meet if group.process == 0 else distributed._report)(group, timeout)
        except (InputError, TimeoutError) as e:
            heard[i] = f"{type(e).__name__}: {e}"

    threads = [threading.Thread(target=take_part, args=item) for item in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return heard


def groups(n: int, processes: int | None = None) -> list[distributed.Group]:
    port = free_port()
    return [distributed.Group("127.0.0.1", port, processes or n, i) for i in range(n)]


def test_all_come():
    before = threading.active_count()
    assert meet(groups(5)) == [""] * 5
    assert threading.active_count() == before


def test_those_missing_are_named_with_their_hosts():
    hosts = ("a-0", "a-1", "a-2", "a-3")
    heard = meet([group._replace(hosts=hosts) for group in groups(2, 4)], 0.7)
    port = heard[0].split("127.0.0.1:")[1].split()[0]
    line = f"TimeoutError: processes 2 (a-2), 3 (a-3) of 4 did not come to 127.0.0.1:{port} within 0.7 s; see whether each was started"
    assert heard[0] == heard[1] == f"{line} and can reach that address"
    many = meet(groups(2, 30), 0.3)[1]
    assert "processes 2, 3, 4, 5, 6, 7, 8, 9 and 20 more of 30 did" in many


def test_a_missing_leader_is_named_with_the_reason():
    (heard,) = meet(groups(2)[1:], 0.3)
    assert "process 0 of 2 did not come to" in heard and heard.endswith("(Connection refused)")


def test_contradictions_are_refused_everywhere_with_the_same_line():
    two, other = groups(3)[:2], groups(3)[2]
    heard = meet([*two, other._replace(port=two[0].port, processes=4)])
    assert heard[0].startswith("InputError: --processes: process 0 has 3, process 2 on ") and len({heard[0], heard[2]}) == 1
    leader, one, _ = groups(3)
    assert distributed._hello(json.dumps({"run": "mlm_jax", "process": 1, "processes": 3, "who": " "}).encode() + b"\n") is None
    with pytest.MonkeyPatch.context() as patch:
        names = iter(("a 1", "b 1", "c 1", "d 1"))
        patch.setattr(distributed, "_who", lambda: next(names))
        heard = meet([leader, one, one])
    assert heard[0].startswith("InputError: --process = 1: two processes have this number, on a and b.") and len(set(heard)) == 1


def test_what_else_speaks_on_the_port_is_no_process_and_one_that_dies_may_come_again():
    leader, one, two = groups(3)
    heard: list[list[str]] = []
    waiting = threading.Thread(target=lambda: heard.append(meet([leader])))
    waiting.start()
    hello = json.dumps({"run": "mlm_jax", "process": 1, "processes": 3, "who": "dead 1"}).encode() + b"\n"
    for line in (b"GET / HTTP/1.1\r\n\r\n", b"\n", b"[]\n", b'{"run": 1}\n', b"x" * 5000, hello):
        for _ in range(100):
            try:
                connection = socket.create_connection(("127.0.0.1", leader.port), timeout=5)
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.05)
        with connection:
            connection.sendall(line)
    assert meet([one, two]) == ["", ""]
    waiting.join(60)
    assert heard == [[""]]


def test_a_port_in_use_is_refused():
    leader, _ = groups(2)
    with socket.create_server(("127.0.0.1", leader.port)):
        assert meet([leader]) == [
            f"InputError: --coordinator = 127.0.0.1:{leader.port}: cannot listen there (Address already in use). Choose another port."
        ]


# ---- arguments, and what clusters say ----


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("127.0.0.1:1234", 2, None), "--process: missing. Give --coordinator, --processes and --process, or --distributed alone."),
        ((None, 2, 0), "--coordinator: missing."),
        (("127.0.0.1", 2, 0), "--coordinator = 127.0.0.1: not HOST:PORT."),
        (("127.0.0.1:99999", 2, 0), "--coordinator = 127.0.0.1:99999: not HOST:PORT."),
        (("::1:1234", 2, 0), "--coordinator = ::1:1234: not HOST:PORT."),
        ((":1234", 2, 0), "--coordinator = :1234: not HOST:PORT."),
        (("a:1", 0, 0), "--processes = 0: a run has at least one."),
        (("a:1", 2, 2), "--process = 2: 2 processes are numbered from 0 to 1."),
        (("a:1", 2, -1), "--process = -1: 2 processes are numbered from 0 to 1."),
        ((None, None, None), "--distributed: neither a TPU pod nor Slurm nor another cluster that JAX knows is detected."),
    ],
)
def test_wrong_arguments_are_refused(arguments, line):
    with pytest.raises(InputError) as e:
        distributed.start(*arguments)
    assert str(e.value).startswith(line)


def test_the_command_line_refuses_both_ways_at_once_and_a_senseless_timeout(tiny_experiment, capfd):
    from mlm_jax import cli

    for flags, line in (
        (["--distributed", "--process", "0"], "--distributed: detects what --coordinator, --processes and --process say."),
        (["--coordinator", "a:1", "--processes", "1", "--process", "0", "--join-timeout", "nan"], "--join-timeout = nan: not a time to wait."),
        (["--process", "0"], "--coordinator: missing."),
    ):
        assert cli.main(["run", str(tiny_experiment), *flags]) == 2
        assert capfd.readouterr().err.startswith(f"mlm-jax: {line}")


def test_an_address_may_be_of_version_6():
    assert distributed._group("[::1]:1234", 2, 1) == ("::1", 1234, 2, 1, ())


SLURM = {"SLURM_JOB_ID": "4096", "SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[08-09]"}


def test_slurm_is_detected_with_the_host_of_each_process(monkeypatch):
    for name, value in (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}).items():
        monkeypatch.setenv(name, value)
    group = distributed._detect(1)
    assert group == ("n08", 61440, 3, 2, ["n08", "n08", "n09"])
    assert distributed._missing(group, [0], 300).startswith("process 0 (n08) of 3 did not come to n08:61440 within 300 s")
    monkeypatch.setenv("SLURM_DISTRIBUTION", "cyclic")  # then it is not known who is where
    assert distributed._detect(1).hosts == ()


@pytest.mark.parametrize(
    ("nodes", "tasks", "hosts"),
    [
        ("node1", "1", "node1"),
        ("a,b", "", "a b"),
        ("n[08-10,12],gpu", "2(x2),1(x3)", "n08 n08 n09 n09 n10 n12 gpu"),
        ("r1n[1-2]-ib,x[7]", "1(x3)", "r1n1-ib r1n2-ib x7"),
    ],
)
def test_the_hosts_of_slurm_are_spelled_out(nodes, tasks, hosts):
    assert distributed._slurm_hosts(nodes, tasks) == hosts.split()


def test_a_tpu_pod_is_detected_with_its_hosts(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name, value in {"TPU_WORKER_HOSTNAMES": "localhost,t-1", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):  # else the metadata server is asked
        monkeypatch.setenv(name, "")
    group = distributed._detect(1)
    assert (group.host, group.processes, group.process, group.hosts) == ("localhost", 2, 1, ["localhost", "t-1"])


# ---- errors on their way ----


@pytest.mark.parametrize("error", [None, InputError("a.b", 3, "bad", "Mend it"), InputError("a", "é" * 9000, "x" * 9000, "y"), OSError("disk\nfull")])
def test_an_error_arrives_as_it_was_sent(error):
    line = distributed._packed(error)
    assert len(line) < distributed._LINE_BYTES and b"\n" not in line
    found = distributed._unpacked(line)
    if len(str(error)) < 1000:
        assert str(found) == ("OSError: disk\nfull" if isinstance(error, OSError) else str(error))
    assert isinstance(found, InputError) == isinstance(error, InputError)
