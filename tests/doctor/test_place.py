"""A disk, a folder or a bucket that a run cannot be written into is found, and the same set right is not."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlm_jax import distributed, lock, storage
from mlm_jax.doctor.examine import local
from mlm_jax.doctor.findings import FAILED, OK, WARNING, Finding, Wanted, safely
from mlm_jax.doctor.place import disk, out, shared_folder
from tests.doctor.shared import only, python


@pytest.mark.parametrize(
    ("free", "files", "state", "saw"),
    [
        (1 << 30, 10**6, FAILED, "1.0 GiB free in "),
        (5 << 30, 10**6, WARNING, "5.0 GiB free in "),
        (99 << 30, 7, FAILED, "room for 7 files in "),
    ],
)
def test_a_full_disk_is_found_and_another_one_is_not(free, files, state, saw, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()

    def statvfs(path):
        full = "/full" in str(path)
        return SimpleNamespace(f_bavail=(free if full else 99 << 30) // 4096, f_frsize=4096, f_files=10**7, f_favail=files if full else 10**6)

    monkeypatch.setattr(os, "statvfs", statvfs)
    found = disk(tmp_path / "full" / "run" / "deep")
    assert found.state == state and found.saw.startswith(saw) and f" in {tmp_path}/full" in found.saw
    assert found.remedy.endswith("name another disk with --out")
    assert disk(tmp_path / "other").state == OK


BOUND_BY_PERMISSIONS = """
import json, sys
from mlm_jax.doctor.examine import local
from mlm_jax.doctor.findings import Wanted
from tests import permissions
permissions.bind()
print(json.dumps(local(Wanted(sys.argv[1]))))
"""


def test_a_directory_that_cannot_be_written_to_is_found_and_one_that_can_is_fine(tmp_path):
    found = {}
    for name, mode in {"closed": 0o555, "open": 0o755, "hidden": 0o000}.items():
        (tmp_path / name).mkdir(mode=mode)
        every = [Finding(*one) for one in json.loads(python(BOUND_BY_PERMISSIONS, tmp_path / name / "run"))]
        (tmp_path / name).chmod(0o755)  # for pytest, which cleans up
        found[name] = only(every, "out")
        assert only(every, "disk").saw.endswith(f"GiB free in {tmp_path / name}")
    assert found["closed"].state == FAILED and "closed/run: cannot be written to (Permission denied)" in found["closed"].saw
    assert found["closed"].remedy == "Name a directory that can be written to with --out"
    assert found["hidden"].state == FAILED and "cannot be written to (Permission denied)" in found["hidden"].saw
    assert found["open"].state == OK and list((tmp_path / "open").iterdir()) == []


def test_a_file_in_the_place_of_the_folder_a_run_in_it_and_a_disk_that_fills_are_found(tmp_path, monkeypatch):
    def found(folder: Path) -> Finding:
        return only(local(Wanted(str(folder)), tmp_path), "out")

    run = tmp_path / "run"
    run.write_text("")
    assert found(run)[1:3] == (FAILED, f"--out = {run}: is a file")
    run.unlink()
    with lock.hold(run):
        pid = os.getpid()
        busy = found(run)
        assert busy.state == FAILED and f"in use by process {pid} on " in busy.saw and busy.remedy.startswith("Wait for it")
    assert found(run) == Finding("out", OK, f"{run} was written to and read") and not run.exists()
    fsync = os.fsync

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert found(run)[1:4] == (FAILED, f"{run} cannot be written to (No space left on device)", f"Free some space in {run}")
    monkeypatch.setattr(os, "fsync", fsync)
    assert found(run).state == OK
    monkeypatch.setattr(storage, "read_text", lambda path: "other bytes")
    assert "gives back other bytes" in found(run).saw


def test_a_shared_folder_that_fills_between_two_files_is_found_and_the_others_are_told(tmp_path, monkeypatch):
    told, right = {}, storage.write_text

    def gathered(name, value, timeout):
        told[name] = value
        return {0: value} | ({} if name == "doctor_names" else {1: OK})  # process 1 came too late for the names

    def write_text(path, text):
        if not path.name.endswith("_alone"):
            raise OSError(28, "No space left on device")
        right(path, text)

    monkeypatch.setattr(distributed, "gathered", gathered)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_text", write_text)
        found = shared_folder(tmp_path / "run", {0: "a", 1: "b"}, 1.0)
    assert found[1:4] == (FAILED, f"{tmp_path}/run cannot be written to (No space left on device)", f"Free some space in {tmp_path}/run")
    assert told["doctor_wrote"] == FAILED and "doctor_removed" in told
    assert shared_folder(tmp_path / "run", {0: "a", 1: "b"}, 1.0).state == OK and not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")  # a request that was given up ends later
def test_a_bucket_that_is_not_there_closed_silent_or_at_another_time_is_found(bucket, tmp_path, monkeypatch):
    def found(name: str) -> list[Finding]:
        return safely("out", lambda: out(Wanted(name)))

    fine = found("gs://bucket/run")
    assert [one.state for one in fine] == [OK] * 2 and only(fine, "bucket clock").saw.startswith("the bucket's is ")
    assert bucket.names() == set()  # nothing is left there
    missing = only(found("gs://nowhere/run"), "out")
    assert missing[1:3] == (FAILED, "--out = gs://nowhere/run: there is no such bucket") and "See to the name of the bucket" in missing.remedy
    bucket.answer = lambda method, name: 403
    closed = only(found("gs://bucket/run"), "out")
    assert closed.state == FAILED and "cannot be written to (Forbidden" in closed.saw and "permissions" in closed.remedy
    bucket.answer = lambda method, name: 403 if method == "GET" else None
    assert only(found("gs://bucket/run"), "out").state == FAILED  # written, but not read
    bucket.answer = lambda method, name: 0
    silent = only(found("gs://bucket/run"), "out")
    assert silent[1:3] == (FAILED, "gs://bucket/run cannot be reached: no answer within 2 s") and silent.remedy.startswith("See to the network")
    bucket.answer = lambda method, name: None  # all that was wrong is set right
    with monkeypatch.context() as patch:
        now = storage.time.time
        patch.setattr(storage, "time", SimpleNamespace(time=lambda: now() - 600))
        late = only(found("gs://bucket/run"), "bucket clock")
        assert late.state == FAILED and re.match(r"the bucket's is (599|600)\.\d s ahead", late.saw)
        assert "ahead of this machine's" in late.saw and "timedatectl set-ntp" in late.remedy
    assert [one.state for one in found("gs://bucket/run")] == [OK] * 2
