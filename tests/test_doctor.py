"""A healthy machine has nothing to be found fault with; each fault that is planted is found, and gone once its own remedy is carried out."""

import contextlib
import http.server
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import venv
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from packaging.specifiers import SpecifierSet  # pytest needs it

from mlm_jax import cli, distributed, doctor, status, storage
from tests.test_distributed import free_port, run_processes

ROOT = Path(__file__).parents[1]
BEFORE_A_RUN = (ROOT / "README.md").read_text("utf-8").split("\n## Before a run\n")[1].split("\n## ")[0]
WORKERS = {0: "a", 1: "b", 2: "c"}


def python(code: str, *argv: object, shell: str = "", **env: str) -> str:
    """What a child that executes `code` prints, in a shell that has executed `shell` before."""
    command = f"{shell or ':'}; exec {shlex.join([sys.executable, '-c', code, *map(str, argv)])}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finding(text: str) -> doctor.Finding:
    return doctor.Finding(*json.loads(text))


def only(findings, check: str) -> doctor.Finding:
    """The finding of this check; every one that is not ok has a remedy."""
    assert all(bool(found.remedy) == (found.state != doctor.OK) for found in findings), findings
    (found,) = (found for found in findings if found.check == check)
    return found


def examined(capfd, *argv: object) -> tuple[int, list[doctor.Finding]]:
    """The exit status and the findings of the command."""
    ended = cli.main(["doctor", *map(str, argv), "--json"])
    said = json.loads(capfd.readouterr().out)
    findings = [doctor.Finding(**found) for found in said["findings"]]
    assert said["failed"] == sum(found.state == doctor.FAILED for found in findings) and ended == (1 if said["failed"] else 0)
    return ended, findings


# ---- the whole examination ----


def test_a_healthy_machine_is_found_fit_in_the_words_of_the_readme(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    for name in ("OPEN_FILES", "MEMORY_BYTES", "DISK_BYTES", "CHECKPOINT_BYTES", "FREE_INODES"):
        monkeypatch.setattr(doctor, name, 0)
    tpu_in_use = doctor.tpu_in_use
    monkeypatch.setattr(doctor, "tpu_in_use", lambda root: tpu_in_use(tmp_path))
    assert cli.main(["doctor"]) == status.DONE
    said, readme = capfd.readouterr().out, BEFORE_A_RUN.split("```text\n")[1].split("```")[0]
    plain = [re.sub(r"/\S+", "PATH", re.sub(r"(, libtpu [\d.]+)|[\d.]+", "", text)) for text in (said, readme)]
    assert plain[0].splitlines() == plain[1].splitlines() and said.endswith(" 0 failed\n")
    assert not (tmp_path / "runs").exists()


# Each fault of the README's table: plants it, yields the check that is to find it and the arguments of the command, is sent the finding, carries out
# its remedy, and yields the arguments anew.
Fault = Callable[[Callable[[str], Any]], Generator[Any, doctor.Finding, None]]
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
    root, tpu_in_use = need("tmp_path"), doctor.tpu_in_use
    need("monkeypatch").setattr(doctor, "tpu_in_use", lambda _: tpu_in_use(root))
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
        request.getfixturevalue("monkeypatch").setattr(doctor, "OTHER", AT_ONCE)
    _, *rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+) \|$", BEFORE_A_RUN, re.MULTILINE)
    ((_, says, remedy),) = (row for row in rows if row[0] == what)
    steps = FAULTS[what](request.getfixturevalue)
    check, argv = next(steps)
    ended, findings = examined(capfd, *argv)
    (found,) = (found for found in findings if found.state == doctor.FAILED)
    assert ended == status.FAILED and found.check == check
    for cell, text in ((says, found.saw), (remedy, found.remedy)):
        for words in re.findall("`([^`]+)`", cell):
            assert words in text
    ended, findings = examined(capfd, *steps.send(found))
    assert ended == status.DONE and doctor.FAILED not in {found.state for found in findings}
    assert list(steps) == []  # what was planted is taken away


def test_the_table_of_faults_has_those_that_are_planted():
    _, *rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+) \|$", BEFORE_A_RUN, re.MULTILINE)
    assert [what for what, _, _ in rows] == list(FAULTS)


def test_a_flag_that_xla_does_not_know_is_named_and_does_not_take_the_other_findings_with_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_nonsense=1")
    assert cli.main(["doctor", "--out", str(tmp_path / "run")]) == status.FAILED
    lines = capfd.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAILED   devices "))
    assert "Unknown flag in XLA_FLAGS: --xla_nonsense" in lines[at]
    assert lines[at + 1].strip() == "-> Take --xla_nonsense=1 out of the environment variable XLA_FLAGS"  # without it the test above passes
    assert any(line.startswith("ok       out ") for line in lines) and lines[-1].startswith("10 findings: ") and lines[-1].endswith("1 failed")


def test_processes_that_do_not_come_are_named(tmp_path):
    wanted = doctor.Wanted(str(tmp_path), coordinator=f"127.0.0.1:{free_port()}", processes=4, process=0, join_timeout=1.0)
    findings = doctor.examine(wanted, say=lambda line: None)
    found = only(findings, "processes")
    assert found.state == doctor.FAILED and f"processes 1, 2, 3 of 4 did not come to {wanted.coordinator} within 1 s" in found.saw
    assert only(findings, "devices").state == doctor.WARNING and "all processes" in found.remedy


def test_arguments_that_make_no_sense_are_refused(capfd):
    for argv, line in (
        (["--devices", "0"], "mlm-jax: --devices = 0: below 1."),
        (["--distributed", "--process", "0"], "mlm-jax: --distributed: detects what"),
    ):
        assert cli.main(["doctor", *argv]) == status.BAD_INPUT
        assert capfd.readouterr().err.startswith(line)


def test_a_check_that_fails_itself_is_a_finding_and_the_others_are_made(tmp_path, monkeypatch):
    def broken(root):
        raise RuntimeError("no such file\nand more")

    monkeypatch.setattr(doctor, "memory", broken)
    findings = doctor.local(doctor.Wanted(str(tmp_path / "run")), tmp_path)
    assert only(findings, "memory")[1:3] == (doctor.FAILED, "RuntimeError: no such file") and only(findings, "out").state == doctor.OK


def heard(code: str, limit: float = 30.0) -> list[doctor.Finding]:
    """What is found of a process that executes `code` in place of the one that looks at the devices."""
    say = f"import json, sys, time\ndef say(*what): print(json.dumps(what), flush=True)\nsay('stage', ['devices', {limit}])\n"
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen([sys.executable, "-c", say + code], stdout=pipe, stderr=errors, text=True) as other:
        found = list(doctor._heard(other, errors, lambda line: None))
        other.kill()
    return found


def test_a_process_that_hangs_or_ends_in_a_stage_is_a_finding_with_its_last_words():
    found = heard("say('finding', ['processes', 'ok', '2 came', '', ''])\ntime.sleep(600)", 0.5)
    assert found[0] == doctor.Finding("processes", "ok", "2 came")
    assert only(found, "devices").saw == "no answer within 0.5 s"
    (found,) = heard("import os\nprint('F0 first', file=sys.stderr, flush=True)\nos.abort()")
    assert found.saw == "ended with status -6, its last words: F0 first" and found.remedy == doctor.REMEDIES["devices"]
    said = "raise RuntimeError('ALREADY_EXISTS: The TPU is already in use by process with pid 1234. Not attempting to load libtpu.so')"
    (found,) = heard(said)
    assert "already in use by process with pid 1234" in found.saw and found.remedy == "kill 1234"
    assert heard("say('stage', ['end', 30.0])") == []


def test_each_error_of_xla_and_libtpu_has_its_own_remedy(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    backend = "RuntimeError: Unable to initialize backend 'tpu': "
    lsof = "End the process that sudo lsof -w /dev/accel* /dev/vfio/* /tmp/libtpu_lockfile names; where it names none, sudo rm /tmp/libtpu_lockfile"
    busy = 'ABORTED: The TPU is already in use by another process probably owned by another user. Run "$ sudo lsof -w /dev/accel0" to'
    assert doctor.advice("devices", backend + busy) == lsof
    locked = 'INTERNAL: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".'
    assert doctor.advice("devices", backend + locked) == lsof
    assert doctor.advice("devices", backend + "no TPU").startswith("unset JAX_PLATFORMS, which is tpu,cpu")
    monkeypatch.setattr(doctor, "tpus", lambda: 4)
    assert doctor.advice("devices", backend + "it broke") == doctor.REMEDIES["devices"]
    for unknown, remedy in {
        "--xla_nonsense=1": "Take --xla_nonsense=1 out of the environment variable XLA_FLAGS",
        "--xla_tpu_a=1 --xla_b": "Take --xla_b out of the environment variable XLA_FLAGS",
        "--xla_tpu_a=1 --xla_tpu_b": "Move --xla_tpu_a=1 --xla_tpu_b from the environment variable XLA_FLAGS to LIBTPU_INIT_ARGS",
    }.items():
        assert doctor.ended_in("devices", -6, f"F0 parse_flags_from_env.cc:234] Unknown flags in XLA_FLAGS: {unknown}\nAborted").remedy == remedy
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--nonsense=1")
    flag = "ERROR: Unknown command line flag '{}'\nand more"
    assert doctor.ended_in("devices", 1, flag.format("nonsense")).remedy == "Take --nonsense out of the environment variable LIBTPU_INIT_ARGS"
    assert doctor.ended_in("devices", 1, flag.format("xla_tpu_of_jax")).remedy == doctor.REMEDIES["devices"]


@pytest.mark.parametrize("argv", [[], ["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "0"]])
def test_where_jax_cannot_be_imported_the_command_ends_with_its_findings(argv, tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('broken on purpose')")
    code = "import sys; from mlm_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", "--out", str(tmp_path / "run"), *argv]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == status.FAILED and "Traceback" not in done.stderr
    assert "ImportError: broken on purpose" in done.stdout and done.stdout.endswith(" 1 failed\n")


def test_a_process_that_ends_before_it_is_told_what_was_found_does_not_take_that_with_it(tmp_path, capfd, monkeypatch):
    (tmp_path / "jax.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[subprocess.Popen] = []
    local, popen = doctor.local, subprocess.Popen

    def start(*arguments, **named):
        started.append(popen(*arguments, **named))
        return started[-1]

    def late(wanted, root):
        started[0].wait(60)
        return local(wanted, root)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(doctor, "local", late)
    end, findings = examined(capfd, "--out", tmp_path / "run")
    right, broken = (found for found in findings if found.check == "jax")
    assert end == status.FAILED and right.state == doctor.OK and "ImportError: broken on purpose" in broken.saw
    assert only(findings, "memory").state == doctor.OK


def test_one_line_stands_for_all_processes_that_are_fine_and_each_other_one_is_named():
    found = [doctor.Finding("disk", doctor.OK, "80 GiB")]
    found += [doctor.Finding("disk", doctor.OK, f"{i} GiB", process=f"process {i} (b)") for i in (5, 6)]
    found += [
        doctor.Finding("disk", doctor.FAILED, "full", "Free some space", "process 7 (c)"),
        doctor.Finding("memory", doctor.WARNING, "low", "End some"),
    ]
    assert doctor.words(found).splitlines() == [
        "ok       disk               80 GiB (ok in 2 more processes)",
        "FAILED   disk               process 7 (c): full",
        "                            -> Free some space",
        "warning  memory             low",
        "                            -> End some",
        "5 findings: 3 ok, 1 warning, 1 failed",
    ]


def test_another_jax_or_python_than_that_of_process_0_is_found_with_what_to_install_there():
    def said(*jax: str, python: str = "3.12.1") -> list[doctor.Finding]:
        return [doctor.Finding("python", doctor.OK, python), *(doctor.Finding("jax", doctor.OK, saw) for saw in jax)]

    ours, other = "jax 0.10.2, jaxlib 0.10.1, libtpu 0.0.42.1", "jax 0.10.2, jaxlib 0.10.1, libtpu 0.0.43"
    theirs = [finding._replace(process=f"process {i} (b)") for i, saw in ((1, ours), (2, other)) for finding in said(saw)]
    (found,) = doctor.versions(said(ours), theirs)
    assert found[:3] == ("jax", doctor.FAILED, f"not the same in all processes: {ours}, but in process 2 (b) {other}")
    assert found.remedy == f"In these: {sys.executable} -m pip install jax==0.10.2 jaxlib==0.10.1 libtpu==0.0.42.1"
    lines = doctor.words([*said(ours), *theirs, found]).splitlines()
    assert lines[0] == "ok       python             3.12.1 (ok in 2 more processes)"
    assert lines[1:4] == [f"ok       jax                {saw}" for saw in (ours, f"process 1 (b): {ours}", f"process 2 (b): {other}")]
    (found,) = doctor.versions(said(ours, python="3.11.9"), theirs[:2])
    assert found[:2] == ("python", doctor.WARNING) and found.remedy.endswith("Python 3.11.9")
    assert list(doctor.versions(said(ours), theirs[:2])) == []


# ---- Python and packages ----


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """An empty package that can be installed."""
    info, extras = f"{name}-{version}.dist-info", {line.partition("extra == ")[2].strip('"') for line in requires} - {""}
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    metadata += [f"Provides-Extra: {extra}" for extra in extras]
    files = {
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path, text)
        file.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment that this process takes for its own: `place(name, version)` plants an empty package, `pip(command)` is a user's."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "jax", "0.10.2", "jaxlib<=0.10.2,>=0.10.1", 'libtpu==0.0.42.*; extra == "tpu"', 'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"')
    versions = {"jaxlib": ("0.9.2", "0.10.1", "0.10.2"), "libtpu": ("0.0.40", "0.0.42.1"), "libtpu-nightly": ("0.1",), "optax": ("0.1.9", "0.2.8")}
    versions |= {"pytest": ("8.4",), "ruff": ("0.14",), "wandb": ("0.1", "0.18")}
    for name, version in ((name, version) for name, some in versions.items() for version in some):
        wheel(folder, name.replace("-", "_"), version)
    venv.create(tmp_path / "venv", with_pip=False)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    monkeypatch.syspath_prepend(packages)

    def place(name: str, version: str) -> None:
        name = name.replace("-", "_")
        for old in packages.glob(f"{name}-*.dist-info"):
            shutil.rmtree(old)
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl") as file:
            file.extractall(packages)
        importlib.invalidate_caches()

    def pip(command: str) -> None:
        for words in map(shlex.split, command.split(" && ")):
            assert words[:3] == [sys.executable, "-m", "pip"]
            options = ["--no-index", "--find-links", str(folder)] if words[3] == "install" else ["--yes"]
            where = ["--python", str(tmp_path / "venv"), words[3], *options, "--quiet", "--disable-pip-version-check"]
            subprocess.run([*words[:3], *where, *words[4:]], check=True, timeout=120)
            importlib.invalidate_caches()

    return SimpleNamespace(place=place, pip=pip)


def test_a_libtpu_that_is_not_the_one_of_this_jax_is_found_and_set_right_by_the_remedy(environment):
    for name, version in {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.40"}.items():
        environment.place(name, version)
    saw, remedy = "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.40; jax wants libtpu==0.0.42.*", f"{sys.executable} -m pip install 'jax[tpu]==0.10.2'"
    assert doctor.jax_family() == doctor.Finding("jax", doctor.FAILED, saw, remedy)
    environment.pip(remedy)
    assert doctor.jax_family() == doctor.Finding("jax", doctor.OK, "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1")


def test_without_a_plugin_the_oldest_jaxlib_that_jax_takes_is_right(environment, monkeypatch):
    version = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: version(name) if name in ("jax", "jaxlib", "pip") else "")
    environment.place("jax", "0.10.2")
    environment.place("jaxlib", "0.10.1")
    assert doctor.jax_family() == doctor.Finding("jax", doctor.OK, "jax 0.10.2, jaxlib 0.10.1")
    environment.place("jaxlib", "0.9.2")
    assert doctor.jax_family().remedy == f"{sys.executable} -m pip install jax==0.10.2"
    monkeypatch.setattr(doctor, "installed", lambda name: version(name) if name in ("jax", "jaxlib") else "")  # as uv makes environments
    assert doctor.jax_family().remedy == f"uv pip install --python {sys.executable} jax==0.10.2"


def test_a_missing_package_is_named_unless_an_extra_alone_requires_it(monkeypatch):
    installed = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "" if name in ("grain", "wandb") else installed(name))
    (found,) = doctor.packages()
    assert found.saw == "grain is missing, not >=0.2.18" and found.remedy == f"{sys.executable} -m pip install 'grain>=0.2.18'"


def test_an_old_package_of_an_extra_is_worth_a_warning_that_names_it_and_those_of_the_tests_are_not(environment):
    for name, version in (("pytest", "8.4"), ("ruff", "0.14"), ("wandb", "0.1")):
        environment.place(name, version)
    (found,) = doctor.packages()
    assert found[1:3] == (doctor.WARNING, "wandb 0.1, not >=0.18, which the extra wandb asks for")
    environment.pip(found.remedy)
    assert [found.state for found in doctor.packages()] == [doctor.OK]


def test_another_libtpu_than_the_packages_is_found_and_gone_after_the_remedy(environment, tmp_path, monkeypatch):
    (tmp_path / "own" / "libtpu").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.delitem(sys.modules, "libtpu", raising=False)  # JAX has imported it
    for name in ("own/libtpu/__init__.py", "own/libtpu/libtpu.so", "other.so"):
        (tmp_path / name).touch()
    importlib.invalidate_caches()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "own" / "libtpu" / "libtpu.so"))  # as importing it does
    assert list(doctor.libtpu()) == []
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "other.so"))
    (found,) = doctor.libtpu()
    assert found[1:3] == (doctor.WARNING, f"TPU_LIBRARY_PATH={tmp_path}/other.so goes before the package's")
    monkeypatch.delenv(found.remedy.removeprefix("unset "))
    assert list(doctor.libtpu()) == []
    for name, version in {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1", "libtpu-nightly": "0.1"}.items():
        environment.place(name, version)
    (found,) = doctor.libtpu()
    assert found[1:3] == (doctor.WARNING, "libtpu-nightly 0.1 is installed, in the same folder as libtpu")
    environment.pip(found.remedy)
    assert list(doctor.libtpu()) == [] and doctor.jax_family().saw == "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1"


def test_versions_are_compared_as_pip_compares_them():
    versions = ["0.0.42", "0.0.42.1", "0.0.43", "0.10.1", "0.10.2", "0.12.0.1", "2", "2.0.0", "2.1", "10.0"]
    specifiers = [
        "",
        ">=2",
        "<2.1",
        "==0.0.42.*",
        "==2",
        "!=2.1",
        "<=0.10.2,>=0.10.1",
        "<=0.12.0.1,>=0.12.0.1",
        "~=0.10.1",
        "~=2.0",
        ">0.12",
        "== 2.*",
    ]
    for version, specifier in itertools.product(versions, specifiers):
        assert doctor.satisfies(version, specifier) == (version in SpecifierSet(specifier)), (version, specifier)
    assert not doctor.satisfies("", ">=2")


def test_what_a_package_requires_is_read_with_its_extras(environment):
    environment.place("jax", "0.10.2")
    assert doctor.requirements("jax") == [
        ("jaxlib", "<=0.10.2,>=0.10.1", ""),
        ("libtpu", "==0.0.42.*", "tpu"),
        ("jaxlib", "<=0.10.2,>=0.10.2", "tpu"),
    ]
    assert ("etils", ">=1.14", "") in doctor.requirements("mlm_jax") and ("gcsfs", ">=2026.1", "gcs") in doctor.requirements("mlm_jax")


def test_a_python_that_is_too_old_fails_and_one_newer_than_tested_is_worth_a_warning():
    assert doctor.python((3, 10, 12))[1:3] == (doctor.FAILED, "3.10.12, and not >=3.11")
    newer = doctor.python((3, 14, 0))
    assert newer.state == doctor.WARNING
    version = tuple(map(int, newer.remedy.rpartition("--python ")[2].split(".")))
    assert doctor.python((*version, 1)) == doctor.Finding("python", doctor.OK, "3.13.1")


# ---- where it runs ----


COLAB = {"COLAB_RELEASE_TAG": "release-1"}
KAGGLE = COLAB | {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}  # its images are made of Colab's


def test_colab_is_recognised_with_what_it_lacks_and_where_to_write_instead(monkeypatch):
    (found,) = doctor.runtime("runs", COLAB)
    assert found.state == doctor.WARNING and "Colab (release-1)" in found.saw and "12 hours, and runs with it" in found.saw
    assert "--out gs://BUCKET" in found.remedy and "below /content/drive after" in found.remedy
    for out in ("gs://BUCKET/run", "gs:/BUCKET/run"):
        assert [found.state for found in doctor.runtime(out, COLAB)] == [doctor.OK]
    (found,) = doctor.runtime("/content/drive/MyDrive/run", COLAB)
    assert found.state == doctor.WARNING and "as no Drive is mounted" in found.saw and "drive.mount('/content/drive')" in found.remedy
    monkeypatch.setattr(os.path, "ismount", lambda path: path == "/content/drive")  # by its remedy
    assert [found.state for found in doctor.runtime("/content/drive/MyDrive/run", COLAB)] == [doctor.OK]
    assert [found.state for found in doctor.runtime("/content/driven", COLAB)] == [doctor.WARNING]
    with monkeypatch.context() as patch:
        patch.setattr(os, "getcwd", lambda: "/content/drive/MyDrive/x")
        assert [found.state for found in doctor.runtime("runs", COLAB)] == [doctor.OK]
    assert [found.state for found in doctor.runtime("runs", {})] == [doctor.OK]


def test_kaggle_is_recognised_with_what_it_lacks_and_where_to_write_instead(monkeypatch):
    def unreachable(address, timeout):
        assert address == ("storage.googleapis.com", 443)
        raise OSError("Temporary failure in name resolution")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", unreachable)
        _, network = doctor.runtime("gs://b/run", KAGGLE)
    assert network[:2] == ("network", doctor.WARNING) and "Temporary failure" in network.saw and "Switch on Internet" in network.remedy
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: SimpleNamespace(close=lambda: None))
    for out in ("runs", "/kaggle/working2", "/kaggle/working/../run"):
        (found,) = doctor.runtime(out, KAGGLE)
        assert found.state == doctor.WARNING and "Kaggle: a session of at most 12 hours, 9 on a TPU" in found.saw
        assert "--out /kaggle/working/" in found.remedy
    (found,) = doctor.runtime("/kaggle/working/run", KAGGLE)
    assert found.state == doctor.OK and "up to 20 GB" in found.saw
    assert [found.state for found in doctor.runtime("gs://b/run", KAGGLE)] == [doctor.OK]
    monkeypatch.setattr(os, "getcwd", lambda: "/kaggle/working")
    assert [found.state for found in doctor.runtime("runs", KAGGLE)] == [doctor.OK]


HOLDS = """
import fcntl, sys
held = [open(path, "r+b") for path in sys.argv[1:]]
for file in held:
    if "lockfile" in file.name:
        fcntl.lockf(file, fcntl.LOCK_EX)
print("holds", flush=True)
sys.stdin.read()
"""


def plant(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def plant_chips(root: Path, n: int) -> None:
    """`n` chips of a TPU v5e, and a network card of the same vendor."""
    for i in range(n + 1):
        plant(root, f"sys/bus/pci/devices/0000:00:0{i}.0/vendor", text="0x1ae0\n")
        plant(root, f"sys/bus/pci/devices/0000:00:0{i}.0/device", text="0x0063\n" if i else "0x0042\n")


@contextlib.contextmanager
def holding(*paths: Path, program: Sequence[str] = ("-c", HOLDS)) -> Iterator[subprocess.Popen]:
    """A process that has these files open, and locks the one named lockfile."""
    pipe, argv = subprocess.PIPE, [sys.executable, *program, *map(str, paths)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "holds\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_only_what_this_process_is_to_have_of_a_tpu_counts_as_in_use(tmp_path):
    plant(tmp_path, *(f"dev/vfio/{i}" for i in (0, 1, 9, 10)))
    plant_chips(tmp_path, 0)
    with holding(tmp_path / "dev/vfio/10"):
        assert doctor.tpu_in_use(tmp_path, {}).saw == "there is none"  # it is another device
    plant(tmp_path, "tmp/libtpu_lockfile")
    plant_chips(tmp_path, 4)
    with holding(tmp_path / "dev/vfio/10", tmp_path / "tmp/libtpu_lockfile") as other:
        assert doctor.tpu_in_use(tmp_path, {}).remedy == f"kill {other.pid}"
        for name in ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"):
            assert doctor.tpu_in_use(tmp_path, {name: "0,1,2"}).state == doctor.OK
            assert doctor.tpu_in_use(tmp_path, {name: "3"}).remedy == f"kill {other.pid}"  # 10 comes after 9
            assert doctor.tpu_in_use(tmp_path, {name: "0,1,2,3"}).remedy == f"kill {other.pid}"


def test_where_a_notebook_has_the_tpu_its_runtime_is_to_be_restarted(tmp_path):
    plant(tmp_path, "dev/accel0")
    plant(tmp_path, "colab_kernel_launcher.py", text=HOLDS)
    with holding(tmp_path / "dev/accel0", program=[str(tmp_path / "colab_kernel_launcher.py")]) as notebook:
        found = doctor.tpu_in_use(tmp_path)
        assert found.state == doctor.FAILED and found.remedy == "Restart the runtime of the notebook that has it, or the kernel"
        assert doctor.advice("devices", f"in use by process with pid {notebook.pid}.") == found.remedy


@pytest.mark.parametrize("paths", [["dev/accel0"], ["dev/vfio/2"], ["tmp/libtpu_lockfile"], ["dev/accel1", "tmp/libtpu_lockfile"]])
def test_a_process_that_has_the_tpu_is_named_and_gone_after_the_remedy(paths, tmp_path):
    assert doctor.tpu_in_use(tmp_path) == doctor.Finding("tpu in use", doctor.OK, "there is none")
    plant(tmp_path, *(f"dev/accel{i}" for i in range(2)), "dev/vfio/2", "dev/vfio/vfio", "tmp/libtpu_lockfile")
    plant_chips(tmp_path, 1)
    assert doctor.tpu_in_use(tmp_path) == doctor.Finding("tpu in use", doctor.OK, "by no process")
    with holding(*(tmp_path / name for name in paths)) as holder:
        found = doctor.tpu_in_use(tmp_path)
        assert found.state == doctor.FAILED and f"process {holder.pid} ({sys.executable} -c" in found.saw
        subprocess.run(shlex.split(found.remedy), check=True)
        assert holder.wait(60) == -signal.SIGTERM
    assert doctor.tpu_in_use(tmp_path).state == doctor.OK


def test_a_lock_of_a_process_that_may_not_be_seen_and_a_lock_file_that_may_not_be_opened_are_found(tmp_path, monkeypatch):
    lockfile = tmp_path / "tmp" / "libtpu_lockfile"
    plant(tmp_path, "tmp/libtpu_lockfile")
    with holding(lockfile):
        monkeypatch.setattr(doctor, "_users", lambda paths: [])
        found = doctor.tpu_in_use(tmp_path)
        assert found.state == doctor.FAILED and f"{lockfile} is locked" in found.saw and f"sudo lsof -w {lockfile}" in found.remedy
    assert doctor.tpu_in_use(tmp_path).state == doctor.OK
    opened = Path.open

    def denied(self, *arguments, **named):
        if self == lockfile:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", denied)
    found = doctor.tpu_in_use(tmp_path)
    assert found.state == doctor.FAILED and "cannot be opened (Permission denied)" in found.saw
    subprocess.run(shlex.split(found.remedy.partition(", if ")[0].removeprefix("sudo ")), check=True)
    assert doctor.tpu_in_use(tmp_path).state == doctor.OK


def test_a_low_limit_of_open_files_is_raised_by_the_remedy():
    code = "import json; from mlm_jax import doctor; print(json.dumps(doctor.open_files()))"
    found = finding(python(code, shell="ulimit -Sn 256"))
    assert found[1:3] == (doctor.WARNING, "256 at a time, fewer than 4096") and found.remedy.startswith("ulimit -n ")
    assert finding(python(code, shell=f"ulimit -Sn 256; {found.remedy}")).state == doctor.OK
    assert "limits.conf" in finding(python(code, shell="ulimit -n 256")).remedy


def test_little_memory_is_found_also_in_a_container(tmp_path):
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    plant(tmp_path, "proc/self/cgroup", text="0::/\n")

    def machine(available: int, most: str, used: int, files: int) -> doctor.Finding:
        (tmp_path / "proc" / "meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable: {available >> 10} kB\nHugePages_Total:       0\n")
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {files}\nactive_file 3\n")
        return doctor.memory(tmp_path)

    gib = 1 << 30
    assert machine(3 * gib, "max", 9 * gib, 0)[1:3] == (doctor.WARNING, "3.0 GiB available, less than 4")
    assert machine(64 * gib, str(8 * gib), 7 * gib, gib)[1:3] == (doctor.WARNING, "2.0 GiB available, less than 4")
    assert machine(64 * gib, str(8 * gib), 7 * gib, 4 * gib)[1:3] == (doctor.OK, "5.0 GiB available")
    assert machine(64 * gib, "max", 9 * gib, 0)[1:3] == (doctor.OK, "64.0 GiB available")
    job = group / "slurm" / "job"
    plant(tmp_path, "proc/self/cgroup", text="0::/slurm/job\n")
    job.mkdir(parents=True)
    for name, text in {"memory.max": f"{3 * gib}\n", "memory.current": f"{gib}\n", "memory.stat": "inactive_file 0\n"}.items():
        (job.parent / name).write_text(text)
        (job / name).write_text("max\n")
    assert doctor.memory(tmp_path)[1:3] == (doctor.WARNING, "2.0 GiB available, less than 4")
    shutil.rmtree(group)
    assert doctor.memory(tmp_path).state == doctor.OK and doctor.memory(tmp_path / "nowhere").state == doctor.OK


# ---- disks and buckets ----


@pytest.mark.parametrize(
    ("free", "files", "state", "saw"),
    [
        (1 << 30, 10**6, doctor.FAILED, "1.0 GiB free in "),
        (5 << 30, 10**6, doctor.WARNING, "5.0 GiB free in "),
        (99 << 30, 7, doctor.FAILED, "room for 7 files in "),
    ],
)
def test_a_full_disk_is_found_and_another_one_is_not(free, files, state, saw, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()

    def statvfs(path):
        full = "/full" in str(path)
        return SimpleNamespace(f_bavail=(free if full else 99 << 30) // 4096, f_frsize=4096, f_files=10**7, f_favail=files if full else 10**6)

    monkeypatch.setattr(os, "statvfs", statvfs)
    found = doctor.disk(tmp_path / "full" / "run" / "deep")
    assert found.state == state and found.saw.startswith(saw) and f" in {tmp_path}/full" in found.saw
    assert found.remedy.endswith("name another disk with --out")
    assert doctor.disk(tmp_path / "other").state == doctor.OK


BOUND_BY_PERMISSIONS = """
import json, sys
from mlm_jax import doctor
from tests import permissions
permissions.bind()
print(json.dumps(doctor.local(doctor.Wanted(sys.argv[1]))))
"""


def test_a_directory_that_cannot_be_written_to_is_found_and_one_that_can_is_fine(tmp_path):
    found = {}
    for name, mode in {"closed": 0o555, "open": 0o755, "hidden": 0o000}.items():
        (tmp_path / name).mkdir(mode=mode)
        every = [doctor.Finding(*one) for one in json.loads(python(BOUND_BY_PERMISSIONS, tmp_path / name / "run"))]
        (tmp_path / name).chmod(0o755)  # for pytest, which cleans up
        found[name] = only(every, "out")
        assert only(every, "disk").saw.endswith(f"GiB free in {tmp_path / name}")
    assert found["closed"].state == doctor.FAILED and "closed/run: cannot be written to (Permission denied)" in found["closed"].saw
    assert found["closed"].remedy == "Name a directory that can be written to with --out"
    assert found["hidden"].state == doctor.FAILED and "cannot be written to (Permission denied)" in found["hidden"].saw
    assert found["open"].state == doctor.OK and list((tmp_path / "open").iterdir()) == []


def test_a_file_in_the_place_of_the_folder_a_run_in_it_and_a_disk_that_fills_are_found(tmp_path, monkeypatch):
    from mlm_jax import lock

    def found(folder: Path) -> doctor.Finding:
        return only(doctor.local(doctor.Wanted(str(folder)), tmp_path), "out")

    run = tmp_path / "run"
    run.write_text("")
    assert found(run)[1:3] == (doctor.FAILED, f"--out = {run}: is a file")
    run.unlink()
    with lock.hold(run):
        pid = os.getpid()
        busy = found(run)
        assert busy.state == doctor.FAILED and f"in use by process {pid} on " in busy.saw and busy.remedy.startswith("Wait for it")
    assert found(run) == doctor.Finding("out", doctor.OK, f"{run} was written to and read") and not run.exists()
    fsync = os.fsync

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert found(run)[1:4] == (doctor.FAILED, f"{run} cannot be written to (No space left on device)", f"Free some space in {run}")
    monkeypatch.setattr(os, "fsync", fsync)
    assert found(run).state == doctor.OK
    monkeypatch.setattr(storage, "read_text", lambda path: "other bytes")
    assert "gives back other bytes" in found(run).saw


@pytest.fixture
def bucket(monkeypatch):
    from tests.gcs_emulator import serve

    monkeypatch.setattr(storage, "WAIT_S", 2.0)
    with serve() as server:
        yield server


@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")  # a request that was given up ends later
def test_a_bucket_that_is_not_there_closed_silent_or_at_another_time_is_found(bucket, tmp_path, monkeypatch):
    def found(name: str) -> list[doctor.Finding]:
        return doctor._safely("out", lambda: doctor.out(doctor.Wanted(name)))

    fine = found("gs://bucket/run")
    assert [one.state for one in fine] == [doctor.OK] * 2 and only(fine, "bucket clock").saw.startswith("the bucket's is ")
    assert bucket.names() == set()  # nothing is left there
    missing = only(found("gs://nowhere/run"), "out")
    assert missing[1:3] == (doctor.FAILED, "--out = gs://nowhere/run: there is no such bucket") and "See to the name of the bucket" in missing.remedy
    bucket.answer = lambda method, name: 403
    closed = only(found("gs://bucket/run"), "out")
    assert closed.state == doctor.FAILED and "cannot be written to (Forbidden" in closed.saw and "permissions" in closed.remedy
    bucket.answer = lambda method, name: 403 if method == "GET" else None
    assert only(found("gs://bucket/run"), "out").state == doctor.FAILED  # written, but not read
    bucket.answer = lambda method, name: 0
    silent = only(found("gs://bucket/run"), "out")
    assert silent[1:3] == (doctor.FAILED, "gs://bucket/run cannot be reached: no answer within 2 s") and silent.remedy.startswith(
        "See to the network"
    )
    bucket.answer = lambda method, name: None  # all that was wrong is set right
    with monkeypatch.context() as patch:
        now = storage.time.time
        patch.setattr(storage, "time", SimpleNamespace(time=lambda: now() - 600))
        late = only(found("gs://bucket/run"), "bucket clock")
        assert late.state == doctor.FAILED and re.match(r"the bucket's is (599|600)\.\d s ahead", late.saw)
        assert "ahead of this machine's" in late.saw and "timedatectl set-ntp" in late.remedy
    assert [one.state for one in found("gs://bucket/run")] == [doctor.OK] * 2


# ---- devices ----


def test_devices_that_are_not_used_not_the_same_or_not_all_there_are_found(monkeypatch):
    one = doctor.Summary("tpu", "TPU v5 lite", 4, 16, 16, "")
    assert doctor.devices([one] * 4, None) == doctor.Finding("devices", doctor.OK, "16 TPU v5 lite (tpu), 4 + 4 + 4 + 4 in 4 processes")
    missing = doctor.devices([one._replace(everywhere=12)] * 3, None)
    assert missing.state == doctor.FAILED and missing.saw.endswith("; 16 were expected") and "--distributed" in missing.remedy
    assert doctor.devices([one] * 4, 32).state == doctor.FAILED
    uneven = doctor.devices([one, one._replace(here=3)], 16)
    assert uneven.state == doctor.FAILED and "4 + 3 in 2 processes; not the same in all" in uneven.saw
    cpu = doctor.Summary("cpu", "cpu", 1, 1, None, "4 TPU chips")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    hidden = doctor.devices([cpu], None)
    assert hidden[1:3] == (doctor.WARNING, "1 cpu (cpu); JAX_PLATFORMS=cpu hides 4 TPU chips")
    assert doctor.devices([cpu], 4)[1:3] == (doctor.FAILED, "1 cpu (cpu); 4 were expected; JAX_PLATFORMS=cpu hides 4 TPU chips")
    monkeypatch.delenv(hidden.remedy.removeprefix("unset "))
    install, version = f"{sys.executable} -m pip install", importlib.metadata.version("jax")
    assert doctor.devices([cpu], None)[1:4] == (doctor.FAILED, "1 cpu (cpu); 4 TPU chips not used", f"{install} 'jax[tpu]=={version}'")
    assert doctor.devices([cpu], 4)[2:4] == ("1 cpu (cpu); 4 were expected; 4 TPU chips not used", f"{install} 'jax[tpu]=={version}'")
    assert doctor.devices([cpu._replace(unused="an NVIDIA GPU")], None).remedy == f"{install} 'jax[cuda12]=={version}'"
    cpu = cpu._replace(unused="")
    assert doctor.devices([cpu], None).state == doctor.OK
    for environ, remedy in ((KAGGLE, "Settings > Accelerator"), (COLAB, "Runtime > Change runtime type")):
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            found = doctor.devices([cpu], None)
            assert found[1:3] == (doctor.WARNING, "1 cpu (cpu); this notebook has no accelerator") and remedy in found.remedy
            assert doctor.devices([one] * 4, None).state == doctor.OK


def test_how_many_devices_there_should_be_is_read_from_the_type_of_the_accelerator():
    for kind, n in {"v4-32": 16, "v5p-128": 64, "v5litepod-16": 16, "v6e-4": 4, "tpu7x-128": 128, "": None, "v9-8": None, "v4-x": None}.items():
        assert doctor.expected_devices(kind, 1) == n
    assert doctor.expected_devices("v5litepod-16", 2) == 32


@pytest.fixture
def tpu_vm(monkeypatch):
    """A machine with TPU chips as JAX sees it, and a stand-in for Google's metadata: {name of an attribute: its text}, at first none."""
    from jax._src.clusters import cloud_tpu_cluster

    attributes: dict[str, str] = {}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            known = text is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((text if known else "<!DOCTYPE html><title>404: not found</title>").encode())

        def log_message(self, *arguments):
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda seconds: None)
        yield attributes
        server.shutdown()


TPU_ENV = """ACCELERATOR_TYPE: 'v5litepod-16'
CHIPS_PER_HOST_BOUNDS: '2,2,1'
{more}
"""


# JAX's own, in Python 3.13
DEPRECATED = "ignore:'maxsplit' is passed as positional argument:DeprecationWarning"


@pytest.mark.filterwarnings(DEPRECATED)
def test_what_the_metadata_of_a_tpu_vm_say_of_its_pod_is_read(tpu_vm, monkeypatch):
    assert doctor.pod() == doctor.Pod(1, None)
    endpoints = ",".join(f"unknown:unknown:10.0.0.{i}" for i in range(4))
    tpu_vm |= {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": TPU_ENV.format(more="")}
    assert doctor.pod() == doctor.Pod(4, 16)
    tpu_vm["tpu-env"] = TPU_ENV.format(more="MEGASCALE_NUM_SLICES: '2'")
    assert doctor.pod() == doctor.Pod(8, 32)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{port}")  # nobody listens there
    assert doctor.pod() == doctor.Pod(1, None)


def test_what_kubernetes_says_of_a_pod_is_read(tpu_vm, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "true")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-16")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert doctor.pod() == doctor.Pod(4, 16)
    monkeypatch.setenv("TPU_PROCESS_ADDRESSES", "a:8471,a:8472,b:8471,b:8472,c:8471,c:8472,d:8471,d:8472")
    assert doctor.pod() == doctor.Pod(8, 16)


@pytest.mark.filterwarnings(DEPRECATED)
def test_a_worker_of_a_pod_that_is_looked_at_alone_is_told_to_take_the_others_along(tpu_vm, tmp_path):
    tpu_vm |= {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.1,10.0.0.2", "tpu-env": TPU_ENV.format(more="")}
    findings = [said for said in doctor._look(doctor.Wanted(str(tmp_path)), list) if isinstance(said, doctor.Finding)]
    found = only(findings, "processes")
    assert found.state == doctor.FAILED and found.saw == "this is one of 2 workers of a pod, and looked at alone"
    assert found.remedy.endswith("with --distributed") and only(findings, "devices").state == doctor.WARNING
    tpu_vm["worker-network-endpoints"] = "10.0.0.1"
    said = doctor._look(doctor.Wanted(str(tmp_path)), list)
    assert next(said) == doctor.Stage("devices", doctor.SAYS_S + 60)  # goes on to look at them


@pytest.mark.parametrize("name", ["psum", "all_gather"])
def test_devices_that_answer_wrong_are_named(name, monkeypatch):
    monkeypatch.setattr(doctor, "COLLECTIVE_BYTES", 1 << 12)
    fine = doctor.collective()
    assert fine.state == doctor.OK and fine.saw.startswith("8 devices have the right answers; all-reduce of 0 MiB: ")
    right = getattr(jax.lax, name)

    def wrong(x, axis, **named):
        return right(x, axis, **named) + (jax.lax.axis_index(axis) == 5)

    shard_map = jax.shard_map
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, name, wrong)
        patch.setattr(jax, "shard_map", lambda f, **named: shard_map(f, **named | {"check_vma": False}))  # it would see that the devices differ
        found = doctor.collective()
    assert found.state == doctor.FAILED and found.saw.startswith(f"device 5 of process 0 has a wrong {'sum' if name == 'psum' else 'gathering'}: ")
    assert found.remedy.startswith("Do not train on it") and doctor.collective().state == doctor.OK


LATER = """
import json, os, pathlib
from mlm_jax import doctor
from tests import permissions
permissions.bind()
folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
found = [doctor.compilation_cache()]
folder.chmod(0o555)
found.append(doctor.compilation_cache())
folder.chmod(0o755)
print(json.dumps([*found, doctor.compilation_cache()]))
"""


def test_a_compilation_cache_that_cannot_be_written_is_found_and_set_right_by_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import json; from mlm_jax import doctor; print(json.dumps(doctor.compilation_cache()))"
    found = finding(python(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "file")))
    assert found.state == doctor.WARNING and f"{tmp_path}/file: each start compiles anew" in found.saw
    assert found.remedy == "Unset JAX_COMPILATION_CACHE_DIR, or name a folder with it that can be written to"
    found = finding(python(code, shell="unset JAX_COMPILATION_CACHE_DIR", JAX_ENABLE_COMPILATION_CACHE="false"))
    assert found.state == doctor.WARNING and found.remedy == "unset JAX_ENABLE_COMPILATION_CACHE"
    shell = f"unset JAX_COMPILATION_CACHE_DIR; {found.remedy}"
    assert finding(python(code, shell=shell, JAX_ENABLE_COMPILATION_CACHE="false")).state == doctor.OK


@pytest.mark.slow
def test_a_compilation_cache_that_cannot_be_written_any_more_is_found(tmp_path):
    before, closed, after = (doctor.Finding(*one) for one in json.loads(python(LATER, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))))
    assert [before.state, closed.state, after.state] == [doctor.OK, doctor.WARNING, doctor.OK] and "Permission denied" in closed.saw


# ---- several processes ----


def test_a_clock_that_is_not_that_of_the_others_is_named():
    assert doctor.clocks({0: 100.0, 1: 101.5, 2: 100.2}, WORKERS) == [doctor.Finding("clocks", doctor.OK, "within 1.5 s of each other")]
    (found,) = doctor.clocks({0: 100.0, 1: 90.0, 2: 100.2}, WORKERS)
    assert found.state == doctor.WARNING and found.saw.startswith("that of process 1 (b) is 10.0 s behind the others'")
    (found,) = doctor.clocks({0: 100.0, 1: 100.1, 2: 200.1}, WORKERS)
    assert found.state == doctor.FAILED and found.saw.startswith("that of process 2 (c) is 100.0 s ahead of the others'")
    assert "timedatectl" in found.remedy


# In one process: another clock, in its child too, another working directory, and another jax.
ELSEWHERE = """
import importlib.metadata, os, pathlib, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.99" if name == "jax" else version(name)
sys.path.insert(0, {root!r})
place = pathlib.Path({folder!r})
place.mkdir()
(place / "sitecustomize.py").write_text("import time; right = time.time; time.time = lambda: right() + 100")
os.environ["PYTHONPATH"] = f"{{place}}:{root}"
os.chdir(place)
"""


def test_a_process_that_came_and_says_nothing_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "_join", lambda wanted: [])
    monkeypatch.setattr(distributed, "gathered", lambda name, value, timeout: {0: value, 2: value})
    for n, silent in ((4, [(doctor.FAILED, "came, but said nothing within 300 s: 1, 3")]), (1, [])):
        monkeypatch.setattr(distributed, "count", lambda n=n: n)
        said = list(itertools.islice(doctor._look(doctor.Wanted(processes=4), list), 3))
        assert [found[1:3] for found in said if isinstance(found, doctor.Finding) and found.state == doctor.FAILED] == silent


def findings_of(process) -> list[doctor.Finding]:
    return [doctor.Finding(**found) for found in json.loads(process.stdout)["findings"]]


@pytest.mark.slow
def test_of_two_machines_the_one_with_another_clock_and_another_folder_is_named(tmp_path):
    (tmp_path / "common").mkdir()
    elsewhere = ELSEWHERE.format(root=str(ROOT), folder=str(tmp_path / "elsewhere"))
    here = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nos.environ['PYTHONPATH'] = {str(ROOT)!r}\nos.chdir({str(tmp_path)!r})\n"
    finished = run_processes(tmp_path / "a", ["doctor", "--json"], 2, 1, code={0: here, 1: elsewhere})
    assert [process.status for process in finished] == [1, 1], [process.stderr for process in finished]
    every, other = map(findings_of, finished)
    (clock,) = (found for found in every if found.check == "clocks")
    assert clock.state == doctor.FAILED and "is 100.0 s " in clock.saw
    for out in (found for found in [*every, *other] if found.check == "out"):
        assert out.state == doctor.FAILED and "is not the same folder in all processes" in out.saw and "--out, such as" in out.remedy
    assert [found.process.partition(" (")[0] for found in every if found.check == "out"] == ["", "process 1"]
    differ = [found for found in every if found.check == "jax" and found.state == doctor.FAILED]
    assert [found.process for found in differ] == [""] and re.search(r"not the same .*, but in process 1 \(.*\) jax 0.99, ", differ[0].saw)
    # its own remedies: a clock that is set, a folder that both see, the same jax
    argv = ["doctor", "--json", "--devices", "2", "--out", str(tmp_path / "common" / "run")]
    finished = run_processes(tmp_path / "b", argv, 2, 1)
    assert [process.status for process in finished] == [0, 0], [process.stdout for process in finished]
    every, other = map(findings_of, finished)
    assert {found.check for found in every if found.process} >= {"python", "disk", "out", "collective"}
    assert only(every, "devices").saw == "2 cpu (cpu), 1 + 1 in 2 processes" and only(other, "clocks").state == doctor.OK
    assert list((tmp_path / "common").iterdir()) == []


@pytest.mark.slow
def test_of_four_processes_the_three_that_came_name_the_missing_one_and_with_it_all_is_well(tmp_path):
    argv = ["doctor", "--json", "--out", str(tmp_path / "run")]
    finished = run_processes(tmp_path / "a", [*argv, "--join-timeout", "10"], 4, 1, absent=2)
    assert [process.status for process in finished] == [1, 1, 1]
    for process in finished:
        found = only(findings_of(process), "processes")
        assert found.state == doctor.FAILED and "process 2 of 4 did not come to 127.0.0.1:" in found.saw
        assert found.remedy.startswith("Start the same command in all processes")
    finished = run_processes(tmp_path / "b", [*argv, "--join-timeout", "60"], 4, 1)
    assert [process.status for process in finished] == [0] * 4, [process.stdout for process in finished]
    assert only(findings_of(finished[3]), "processes").saw.startswith("4 came, on ")


# In one process and its child: gcsfs is not installed.
WITHOUT_GCSFS = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
place = pathlib.Path({folder!r})
place.mkdir()
(place / "sitecustomize.py").write_text("import sys; sys.modules['gcsfs'] = None")
sys.modules["gcsfs"] = None
os.environ["PYTHONPATH"] = f"{{place}}:{root}"
"""


@pytest.mark.slow
def test_two_processes_write_into_a_bucket_and_without_the_library_for_it_all_else_is_looked_at(tmp_path, bucket, monkeypatch):
    argv, install = ["doctor", "--json", "--out", "gs://bucket/runs"], 'pip install -e ".[gcs]"'
    without = {i: WITHOUT_GCSFS.format(root=str(ROOT), folder=str(tmp_path / f"without_{i}")) for i in (0, 1)}
    finished = run_processes(tmp_path / "a", argv, 2, 1, code=without)
    assert [process.status for process in finished] == [1, 1], [process.stderr for process in finished]
    every, other = map(findings_of, finished)
    for findings in ([found for found in every if not found.process], other):
        assert only(findings, "out")[1:4:2] == (doctor.FAILED, install)
        assert {found.check for found in findings if found.state == doctor.FAILED} == {"out"}
    assert only(every, "devices").state == doctor.OK and any(found.process for found in every if found.check == "collective")
    (command,) = re.findall(r"^    mlm-jax (doctor .*) --distributed$", BEFORE_A_RUN, re.MULTILINE)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    finished = run_processes(tmp_path / "b", [*command.replace("BUCKET", "bucket").split(), "--json"], 2, 1)
    assert [process.status for process in finished] == [0, 0], [process.stdout for process in finished]
    assert [found.saw for found in findings_of(finished[0]) if found.check == "out"] == ["gs://bucket/runs was written, read and removed"] * 2
    assert bucket.names() == set()
