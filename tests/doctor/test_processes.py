"""Of several processes the one that is missing, silent or not like the others is named."""

import itertools
import json
import re
import sys

import pytest

from mlm_jax import distributed
from mlm_jax.doctor import processes
from mlm_jax.doctor.findings import FAILED, OK, WARNING, Finding, Stage, Wanted, words
from tests.doctor.shared import BEFORE_A_RUN, DEPRECATED, ROOT, TPU_ENV, only
from tests.test_distributed import run_processes

WORKERS = {0: "a", 1: "b", 2: "c"}


def test_another_jax_or_python_than_that_of_process_0_is_found_with_what_to_install_there():
    def said(*jax: str, python: str = "3.12.1") -> list[Finding]:
        return [Finding("python", OK, python), *(Finding("jax", OK, saw) for saw in jax)]

    ours, other = "jax 0.10.2, jaxlib 0.10.1, libtpu 0.0.42.1", "jax 0.10.2, jaxlib 0.10.1, libtpu 0.0.43"
    theirs = [finding._replace(process=f"process {i} (b)") for i, saw in ((1, ours), (2, other)) for finding in said(saw)]
    (found,) = processes.versions(said(ours), theirs)
    assert found[:3] == ("jax", FAILED, f"not the same in all processes: {ours}, but in process 2 (b) {other}")
    assert found.remedy == f"In these: {sys.executable} -m pip install jax==0.10.2 jaxlib==0.10.1 libtpu==0.0.42.1"
    lines = words([*said(ours), *theirs, found]).splitlines()
    assert lines[0] == "ok       python             3.12.1 (ok in 2 more processes)"
    assert lines[1:4] == [f"ok       jax                {saw}" for saw in (ours, f"process 1 (b): {ours}", f"process 2 (b): {other}")]
    (found,) = processes.versions(said(ours, python="3.11.9"), theirs[:2])
    assert found[:2] == ("python", WARNING) and found.remedy.endswith("Python 3.11.9")
    assert list(processes.versions(said(ours), theirs[:2])) == []


@pytest.mark.filterwarnings(DEPRECATED)
def test_a_worker_of_a_pod_that_is_looked_at_alone_is_told_to_take_the_others_along(tpu_vm, tmp_path):
    tpu_vm |= {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.1,10.0.0.2", "tpu-env": TPU_ENV.format(more="")}
    findings = [said for said in processes.look(Wanted(str(tmp_path)), list) if isinstance(said, Finding)]
    found = only(findings, "processes")
    assert found.state == FAILED and found.saw == "this is one of 2 workers of a pod, and looked at alone"
    assert found.remedy.endswith("with --distributed") and only(findings, "devices").state == WARNING
    tpu_vm["worker-network-endpoints"] = "10.0.0.1"
    said = processes.look(Wanted(str(tmp_path)), list)
    assert next(said) == Stage("devices", processes.SAYS_S + 60)  # goes on to look at them


def test_a_clock_that_is_not_that_of_the_others_is_named():
    assert processes.clocks({0: 100.0, 1: 101.5, 2: 100.2}, WORKERS) == [Finding("clocks", OK, "within 1.5 s of each other")]
    (found,) = processes.clocks({0: 100.0, 1: 90.0, 2: 100.2}, WORKERS)
    assert found.state == WARNING and found.saw.startswith("that of process 1 (b) is 10.0 s behind the others'")
    (found,) = processes.clocks({0: 100.0, 1: 100.1, 2: 200.1}, WORKERS)
    assert found.state == FAILED and found.saw.startswith("that of process 2 (c) is 100.0 s ahead of the others'")
    assert "timedatectl" in found.remedy


def test_a_process_that_came_and_says_nothing_is_named(monkeypatch):
    monkeypatch.setattr(processes, "_join", lambda wanted: [])
    monkeypatch.setattr(distributed, "gathered", lambda name, value, timeout: {0: value, 2: value})
    for n, silent in ((4, [(FAILED, "came, but said nothing within 300 s: 1, 3")]), (1, [])):
        monkeypatch.setattr(distributed, "count", lambda n=n: n)
        said = list(itertools.islice(processes.look(Wanted(processes=4), list), 3))
        assert [found[1:3] for found in said if isinstance(found, Finding) and found.state == FAILED] == silent


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


def findings_of(process) -> list[Finding]:
    return [Finding(**found) for found in json.loads(process.stdout)["findings"]]


@pytest.mark.slow
def test_of_two_machines_the_one_with_another_clock_and_another_folder_is_named(tmp_path):
    (tmp_path / "common").mkdir()
    elsewhere = ELSEWHERE.format(root=str(ROOT), folder=str(tmp_path / "elsewhere"))
    here = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nos.environ['PYTHONPATH'] = {str(ROOT)!r}\nos.chdir({str(tmp_path)!r})\n"
    finished = run_processes(tmp_path / "a", ["doctor", "--json"], 2, 1, code={0: here, 1: elsewhere})
    assert [process.status for process in finished] == [1, 1], [process.stderr for process in finished]
    every, other = map(findings_of, finished)
    (clock,) = (found for found in every if found.check == "clocks")
    assert clock.state == FAILED and "is 100.0 s " in clock.saw
    for out in (found for found in [*every, *other] if found.check == "out"):
        assert out.state == FAILED and "is not the same folder in all processes" in out.saw and "--out, such as" in out.remedy
    assert [found.process.partition(" (")[0] for found in every if found.check == "out"] == ["", "process 1"]
    differ = [found for found in every if found.check == "jax" and found.state == FAILED]
    assert [found.process for found in differ] == [""] and re.search(r"not the same .*, but in process 1 \(.*\) jax 0.99, ", differ[0].saw)
    # its own remedies: a clock that is set, a folder that both see, the same jax
    argv = ["doctor", "--json", "--devices", "2", "--out", str(tmp_path / "common" / "run")]
    finished = run_processes(tmp_path / "b", argv, 2, 1)
    assert [process.status for process in finished] == [0, 0], [process.stdout for process in finished]
    every, other = map(findings_of, finished)
    assert {found.check for found in every if found.process} >= {"python", "disk", "out", "collective"}
    assert only(every, "devices").saw == "2 cpu (cpu), 1 + 1 in 2 processes" and only(other, "clocks").state == OK
    assert list((tmp_path / "common").iterdir()) == []


@pytest.mark.slow
def test_of_four_processes_the_three_that_came_name_the_missing_one_and_with_it_all_is_well(tmp_path):
    argv = ["doctor", "--json", "--out", str(tmp_path / "run")]
    finished = run_processes(tmp_path / "a", [*argv, "--join-timeout", "10"], 4, 1, absent=2)
    assert [process.status for process in finished] == [1, 1, 1]
    for process in finished:
        found = only(findings_of(process), "processes")
        assert found.state == FAILED and "process 2 of 4 did not come to 127.0.0.1:" in found.saw
        assert found.remedy.startswith("Start the same command in all processes")
    finished = run_processes(tmp_path / "b", [*argv, "--join-timeout", "60"], 4, 1)
    assert [process.status for process in finished] == [0] * 4, [process.stdout for process in finished]
    assert only(findings_of(finished[3]), "processes").saw.startswith("4 came, on ")


@pytest.mark.slow
def test_two_processes_write_into_a_bucket_and_without_the_library_for_it_all_else_is_looked_at(tmp_path, bucket, monkeypatch):
    argv, install = ["doctor", "--json", "--out", "gs://bucket/runs"], 'pip install -e ".[gcs]"'
    without = {i: WITHOUT_GCSFS.format(root=str(ROOT), folder=str(tmp_path / f"without_{i}")) for i in (0, 1)}
    finished = run_processes(tmp_path / "a", argv, 2, 1, code=without)
    assert [process.status for process in finished] == [1, 1], [process.stderr for process in finished]
    every, other = map(findings_of, finished)
    for findings in ([found for found in every if not found.process], other):
        assert only(findings, "out")[1:4:2] == (FAILED, install)
        assert {found.check for found in findings if found.state == FAILED} == {"out"}
    assert only(every, "devices").state == OK and any(found.process for found in every if found.check == "collective")
    (command,) = re.findall(r"^    mlm-jax (doctor .*) --distributed$", BEFORE_A_RUN, re.MULTILINE)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    finished = run_processes(tmp_path / "b", [*command.replace("BUCKET", "bucket").split(), "--json"], 2, 1)
    assert [process.status for process in finished] == [0, 0], [process.stdout for process in finished]
    assert [found.saw for found in findings_of(finished[0]) if found.check == "out"] == ["gs://bucket/runs was written, read and removed"] * 2
    assert bucket.names() == set()
