"""Each fault of the README's table is planted, found by the command, and gone once its own remedy is carried out."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import pytest

from mlm_jax import status
from mlm_jax.doctor import examine
from mlm_jax.doctor.findings import FAILED, Finding
from tests.doctor.shared import BEFORE_A_RUN, ROOT, examined, holding, plant
from tests.test_distributed import free_port

# Each fault of the README's table: plants it, yields the check that is to find it and the arguments of the command, is sent the finding, carries out
# its remedy, and yields the arguments anew.
Fault = Callable[[Callable[[str], Any]], Generator[Any, Finding, None]]
FAULTS: dict[str, Fault] = {}
NEED_DEVICES: set[str] = set()  # those that the process that looks at the devices finds


def fault(what: str, *, devices: bool = False) -> Callable[[Fault], Fault]:
    def listed(plants: Fault) -> Fault:
        FAULTS[what] = plants
        NEED_DEVICES.update([what] if devices else [])
        return plants

    return listed


@fault("jaxlib, libtpu or a CUDA plugin is not the one of this jax")
def wrong_jaxlib(need):
    environment = need("environment")
    for name, version in {"jax": "0.10.2", "jaxlib": "0.9.2", "libtpu": "0.0.42.1"}.items():
        environment.place(name, version)
    found = yield "jax", ["--out", need("tmp_path") / "run"]
    environment.pip(found.remedy)
    yield ["--out", need("tmp_path") / "run"]


@fault("A package is too old")
def old_package(need):
    need("environment").place("optax", "0.1.9")
    found = yield "packages", ["--out", need("tmp_path") / "run"]
    need("environment").pip(found.remedy)
    yield ["--out", need("tmp_path") / "run"]


@fault("Another process has the TPU")
def busy_tpu(need):
    root, tpu_in_use = need("tmp_path"), examine.tpu_in_use
    need("monkeypatch").setattr(examine, "tpu_in_use", lambda _: tpu_in_use(root))
    plant(root, "dev/accel0", "tmp/libtpu_lockfile")
    with holding(root / "dev/accel0", root / "tmp/libtpu_lockfile") as holder:
        found = yield "tpu in use", ["--out", root / "run"]
        subprocess.run(shlex.split(found.remedy), check=True)
        assert holder.wait(60) == -signal.SIGTERM
    yield ["--out", root / "run"]


@fault("The disk is full")
def full_disk(need):
    free = {"free": 1 << 30}
    need("monkeypatch").setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free["free"], f_frsize=1, f_files=0))
    yield "disk", ["--out", need("tmp_path") / "run"]
    free["free"] = 99 << 30
    yield ["--out", need("tmp_path") / "run"]


@fault("A file is where the run is to be")
def file_in_the_place(need):
    plant(need("tmp_path"), "run")
    yield "out", ["--out", need("tmp_path") / "run"]
    yield ["--out", need("tmp_path") / "another"]


@fault("Another process uses the run's directory")
def busy_directory(need):
    run = need("tmp_path") / "run"
    code = "import pathlib, sys; from mlm_jax import lock\nwith lock.hold(pathlib.Path(sys.argv[1])): print('holds', flush=True); sys.stdin.read()"
    with holding(run, program=["-c", code]) as holder:
        found = yield "out", ["--out", run]
        os.kill(int(found.saw.partition("in use by process ")[2].split()[0]), signal.SIGTERM)
        assert holder.wait(60) == -signal.SIGTERM
    yield ["--out", run]


@fault("The bucket does not exist")
def no_such_bucket(need):
    need("bucket")
    yield "out", ["--out", "gs://nowhere/runs"]
    yield ["--out", "gs://bucket/runs"]


@fault("The bucket cannot be reached")
def bucket_out_of_reach(need):
    right = f"http://127.0.0.1:{need('bucket').server_address[1]}"
    need("monkeypatch").setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    yield "out", ["--out", "gs://bucket/runs"]
    need("monkeypatch").setenv("STORAGE_EMULATOR_HOST", right)
    yield ["--out", "gs://bucket/runs"]


@fault("The library that reaches buckets is missing")
def no_gcsfs(need):
    need("bucket")
    with need("monkeypatch").context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        yield "out", ["--out", "gs://bucket/runs"]
    yield ["--out", "gs://bucket/runs"]


@fault("JAX cannot be imported", devices=True)
def broken_jax(need):
    plant(need("tmp_path"), "broken/jax.py", text="raise ImportError('of another Python')")
    need("monkeypatch").setenv("PYTHONPATH", str(need("tmp_path") / "broken"))
    yield "jax", ["--out", need("tmp_path") / "run"]
    need("monkeypatch").delenv("PYTHONPATH")
    yield ["--out", need("tmp_path") / "run"]


@fault("A flag does not exist", devices=True)
def unknown_flag(need):
    need("monkeypatch").setenv("XLA_FLAGS", "--xla_nonsense=1 --xla_force_host_platform_device_count=2")
    found = yield "devices", ["--out", need("tmp_path") / "run"]
    matched = re.fullmatch(r"Take (\S+) out of the environment variable (\w+)", found.remedy)
    assert matched
    need("monkeypatch").setenv(matched[2], os.environ[matched[2]].replace(matched[1], ""))
    yield ["--out", need("tmp_path") / "run", "--devices", 2]


@fault("JAX is told to use a device that is not there", devices=True)
def other_platform(need):
    need("monkeypatch").setenv("TPU_SKIP_MDS_QUERY", "1")
    need("monkeypatch").setenv("JAX_PLATFORMS", "tpu")
    found = yield "devices", ["--out", need("tmp_path") / "run"]
    need("monkeypatch").delenv(found.remedy.partition(",")[0].removeprefix("unset "))
    yield ["--out", need("tmp_path") / "run"]


@fault("There are more or fewer devices than expected", devices=True)
def number_of_devices(need):
    need("monkeypatch").setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    found = yield "devices", ["--out", need("tmp_path") / "run", "--devices", 8]
    yield ["--out", need("tmp_path") / "run", *found.remedy.rpartition("say ")[2].split()]


@fault("A process does not come", devices=True)
def missing_process(need):
    argv = ["--out", need("tmp_path") / "run", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2]
    yield "processes", [*argv, "--process", 0, "--join-timeout", 1]
    code = "import sys; from mlm_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", *map(str, argv), "--process", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        yield [*argv, "--process", 0, "--join-timeout", 60]
        assert other.wait(60) == 0


AT_ONCE = ("-c", 'print(\'["stage", ["end", 30]]\')')  # in place of the process that looks at the devices: it has nothing to say


@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")  # a request that was given up ends later
@pytest.mark.parametrize(
    ("what", "whole"),
    [pytest.param(what, True, marks=[pytest.mark.slow] if what not in NEED_DEVICES or what == "A process does not come" else []) for what in FAULTS]
    + [(what, False) for what in FAULTS if what not in NEED_DEVICES],
)
def test_each_fault_of_the_table_is_found_by_the_command_and_gone_after_its_own_remedy(what, whole, request, capfd):
    if not whole:
        request.getfixturevalue("monkeypatch").setattr(examine, "OTHER", AT_ONCE)
    _, *rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+) \|$", BEFORE_A_RUN, re.MULTILINE)
    ((_, says, remedy),) = (row for row in rows if row[0] == what)
    steps = FAULTS[what](request.getfixturevalue)
    check, argv = next(steps)
    ended, findings = examined(capfd, *argv)
    (found,) = (found for found in findings if found.state == FAILED)
    assert ended == status.FAILED and found.check == check
    for cell, text in ((says, found.saw), (remedy, found.remedy)):
        for words in re.findall("`([^`]+)`", cell):
            assert words in text
    ended, findings = examined(capfd, *steps.send(found))
    assert ended == status.DONE and FAILED not in {found.state for found in findings}
    assert list(steps) == []  # what was planted is taken away


def test_the_table_of_faults_has_those_that_are_planted():
    _, *rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+) \|$", BEFORE_A_RUN, re.MULTILINE)
    assert [what for what, _, _ in rows] == list(FAULTS)
