"""A notebook service is recognised, and what a machine has too little of is found."""

import os
import shutil
import socket
from types import SimpleNamespace

from mlm_jax.doctor.findings import OK, WARNING, Finding
from mlm_jax.doctor.machine import memory, runtime
from tests.doctor.shared import COLAB, KAGGLE, finding, plant, python


def test_colab_is_recognised_with_what_it_lacks_and_where_to_write_instead(monkeypatch):
    (found,) = runtime("runs", COLAB)
    assert found.state == WARNING and "Colab (release-1)" in found.saw and "12 hours, and runs with it" in found.saw
    assert "--out gs://BUCKET" in found.remedy and "below /content/drive after" in found.remedy
    for out in ("gs://BUCKET/run", "gs:/BUCKET/run"):
        assert [found.state for found in runtime(out, COLAB)] == [OK]
    (found,) = runtime("/content/drive/MyDrive/run", COLAB)
    assert found.state == WARNING and "as no Drive is mounted" in found.saw and "drive.mount('/content/drive')" in found.remedy
    monkeypatch.setattr(os.path, "ismount", lambda path: path == "/content/drive")  # by its remedy
    assert [found.state for found in runtime("/content/drive/MyDrive/run", COLAB)] == [OK]
    assert [found.state for found in runtime("/content/driven", COLAB)] == [WARNING]
    with monkeypatch.context() as patch:
        patch.setattr(os, "getcwd", lambda: "/content/drive/MyDrive/x")
        assert [found.state for found in runtime("runs", COLAB)] == [OK]
    assert [found.state for found in runtime("runs", {})] == [OK]


def test_kaggle_is_recognised_with_what_it_lacks_and_where_to_write_instead(monkeypatch):
    def unreachable(address, timeout):
        assert address == ("storage.googleapis.com", 443)
        raise OSError("Temporary failure in name resolution")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", unreachable)
        _, network = runtime("gs://b/run", KAGGLE)
    assert network[:2] == ("network", WARNING) and "Temporary failure" in network.saw and "Switch on Internet" in network.remedy
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: SimpleNamespace(close=lambda: None))
    for out in ("runs", "/kaggle/working2", "/kaggle/working/../run"):
        (found,) = runtime(out, KAGGLE)
        assert found.state == WARNING and "Kaggle: a session of at most 12 hours, 9 on a TPU" in found.saw
        assert "--out /kaggle/working/" in found.remedy
    (found,) = runtime("/kaggle/working/run", KAGGLE)
    assert found.state == OK and "up to 20 GB" in found.saw
    assert [found.state for found in runtime("gs://b/run", KAGGLE)] == [OK]
    monkeypatch.setattr(os, "getcwd", lambda: "/kaggle/working")
    assert [found.state for found in runtime("runs", KAGGLE)] == [OK]


def test_a_low_limit_of_open_files_is_raised_by_the_remedy():
    code = "import json; from mlm_jax.doctor.machine import open_files; print(json.dumps(open_files()))"
    found = finding(python(code, shell="ulimit -Sn 256"))
    assert found[1:3] == (WARNING, "256 at a time, fewer than 4096") and found.remedy.startswith("ulimit -n ")
    assert finding(python(code, shell=f"ulimit -Sn 256; {found.remedy}")).state == OK
    assert "limits.conf" in finding(python(code, shell="ulimit -n 256")).remedy


def test_little_memory_is_found_also_in_a_container(tmp_path):
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    plant(tmp_path, "proc/self/cgroup", text="0::/\n")

    def machine(available: int, most: str, used: int, files: int) -> Finding:
        (tmp_path / "proc" / "meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable: {available >> 10} kB\nHugePages_Total:       0\n")
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {files}\nactive_file 3\n")
        return memory(tmp_path)

    gib = 1 << 30
    assert machine(3 * gib, "max", 9 * gib, 0)[1:3] == (WARNING, "3.0 GiB available, less than 4")
    assert machine(64 * gib, str(8 * gib), 7 * gib, gib)[1:3] == (WARNING, "2.0 GiB available, less than 4")
    assert machine(64 * gib, str(8 * gib), 7 * gib, 4 * gib)[1:3] == (OK, "5.0 GiB available")
    assert machine(64 * gib, "max", 9 * gib, 0)[1:3] == (OK, "64.0 GiB available")
    job = group / "slurm" / "job"
    plant(tmp_path, "proc/self/cgroup", text="0::/slurm/job\n")
    job.mkdir(parents=True)
    for name, text in {"memory.max": f"{3 * gib}\n", "memory.current": f"{gib}\n", "memory.stat": "inactive_file 0\n"}.items():
        (job.parent / name).write_text(text)
        (job / name).write_text("max\n")
    assert memory(tmp_path)[1:3] == (WARNING, "2.0 GiB available, less than 4")
    shutil.rmtree(group)
    assert memory(tmp_path).state == OK and memory(tmp_path / "nowhere").state == OK
