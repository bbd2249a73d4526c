"""Devices that are not all there, not used or wrong are found, and a compilation cache that keeps nothing."""

import importlib.metadata
import json
import socket
import sys

import jax
import pytest

from mlm_jax.doctor import devices
from mlm_jax.doctor.findings import FAILED, OK, WARNING, Finding
from tests.doctor.shared import COLAB, DEPRECATED, KAGGLE, TPU_ENV, finding, python


def test_devices_that_are_not_used_not_the_same_or_not_all_there_are_found(monkeypatch):
    one = devices.Summary("tpu", "TPU v5 lite", 4, 16, 16, "")
    assert devices.devices([one] * 4, None) == Finding("devices", OK, "16 TPU v5 lite (tpu), 4 + 4 + 4 + 4 in 4 processes")
    missing = devices.devices([one._replace(everywhere=12)] * 3, None)
    assert missing.state == FAILED and missing.saw.endswith("; 16 were expected") and "--distributed" in missing.remedy
    assert devices.devices([one] * 4, 32).state == FAILED
    uneven = devices.devices([one, one._replace(here=3)], 16)
    assert uneven.state == FAILED and "4 + 3 in 2 processes; not the same in all" in uneven.saw
    cpu = devices.Summary("cpu", "cpu", 1, 1, None, "4 TPU chips")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    hidden = devices.devices([cpu], None)
    assert hidden[1:3] == (WARNING, "1 cpu (cpu); JAX_PLATFORMS=cpu hides 4 TPU chips")
    assert devices.devices([cpu], 4)[1:3] == (FAILED, "1 cpu (cpu); 4 were expected; JAX_PLATFORMS=cpu hides 4 TPU chips")
    monkeypatch.delenv(hidden.remedy.removeprefix("unset "))
    install, version = f"{sys.executable} -m pip install", importlib.metadata.version("jax")
    assert devices.devices([cpu], None)[1:4] == (FAILED, "1 cpu (cpu); 4 TPU chips not used", f"{install} 'jax[tpu]=={version}'")
    assert devices.devices([cpu], 4)[2:4] == ("1 cpu (cpu); 4 were expected; 4 TPU chips not used", f"{install} 'jax[tpu]=={version}'")
    assert devices.devices([cpu._replace(unused="an NVIDIA GPU")], None).remedy == f"{install} 'jax[cuda12]=={version}'"
    cpu = cpu._replace(unused="")
    assert devices.devices([cpu], None).state == OK
    for environ, remedy in ((KAGGLE, "Settings > Accelerator"), (COLAB, "Runtime > Change runtime type")):
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            found = devices.devices([cpu], None)
            assert found[1:3] == (WARNING, "1 cpu (cpu); this notebook has no accelerator") and remedy in found.remedy
            assert devices.devices([one] * 4, None).state == OK


def test_how_many_devices_there_should_be_is_read_from_the_type_of_the_accelerator():
    for kind, n in {"v4-32": 16, "v5p-128": 64, "v5litepod-16": 16, "v6e-4": 4, "tpu7x-128": 128, "": None, "v9-8": None, "v4-x": None}.items():
        assert devices.expected_devices(kind, 1) == n
    assert devices.expected_devices("v5litepod-16", 2) == 32


@pytest.mark.filterwarnings(DEPRECATED)
def test_what_the_metadata_of_a_tpu_vm_say_of_its_pod_is_read(tpu_vm, monkeypatch):
    assert devices.pod() == devices.Pod(1, None)
    endpoints = ",".join(f"unknown:unknown:10.0.0.{i}" for i in range(4))
    tpu_vm |= {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": TPU_ENV.format(more="")}
    assert devices.pod() == devices.Pod(4, 16)
    tpu_vm["tpu-env"] = TPU_ENV.format(more="MEGASCALE_NUM_SLICES: '2'")
    assert devices.pod() == devices.Pod(8, 32)
    tpu_vm["worker-network-endpoints"] = "unknown:10.0.0.1"  # JAX does not know these
    assert devices.pod() == devices.Pod(1, None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there, and nobody else may
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{closed.getsockname()[1]}")
        assert devices.pod() == devices.Pod(1, None)


def test_what_kubernetes_says_of_a_pod_is_read(tpu_vm, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "true")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-16")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert devices.pod() == devices.Pod(4, 16)
    monkeypatch.setenv("TPU_PROCESS_ADDRESSES", "a:8471,a:8472,b:8471,b:8472,c:8471,c:8472,d:8471,d:8472")
    assert devices.pod() == devices.Pod(8, 16)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    tpu_vm |= {"agent-worker-number": "0", "worker-network-endpoints": "unknown:10.0.0.1"}
    assert devices.pod() == devices.Pod(8, 16)


@pytest.mark.parametrize("name", ["psum", "all_gather"])
def test_devices_that_answer_wrong_are_named(name, monkeypatch):
    monkeypatch.setattr(devices, "COLLECTIVE_BYTES", 1 << 12)
    fine = devices.collective()
    assert fine.state == OK and fine.saw.startswith("8 devices have the right answers; all-reduce of 0 MiB: ")
    right = getattr(jax.lax, name)

    def wrong(x, axis, **named):
        return right(x, axis, **named) + (jax.lax.axis_index(axis) == 5)

    shard_map = jax.shard_map
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, name, wrong)
        patch.setattr(jax, "shard_map", lambda f, **named: shard_map(f, **named | {"check_vma": False}))  # it would see that the devices differ
        found = devices.collective()
    assert found.state == FAILED and found.saw.startswith(f"device 5 of process 0 has a wrong {'sum' if name == 'psum' else 'gathering'}: ")
    assert found.remedy.startswith("Do not train on it") and devices.collective().state == OK


LATER = """
import json, os, pathlib, jax
from mlm_jax.doctor import devices
from tests import permissions
permissions.bind()
folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
found = [devices.compilation_cache()]
folder.chmod(0o555)
found.append(devices.compilation_cache())
folder.chmod(0o755)
print(json.dumps([*found, devices.compilation_cache()]))
"""


def test_a_compilation_cache_that_cannot_be_written_is_found_and_set_right_by_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import json; from mlm_jax.doctor import devices; print(json.dumps(devices.compilation_cache()))"
    found = finding(python(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "file")))
    assert found.state == WARNING and f"{tmp_path}/file: each start compiles anew" in found.saw
    assert found.remedy == "Unset JAX_COMPILATION_CACHE_DIR, or name a folder with it that can be written to"
    found = finding(python(code, shell="unset JAX_COMPILATION_CACHE_DIR", JAX_ENABLE_COMPILATION_CACHE="false"))
    assert found.state == WARNING and found.remedy == "unset JAX_ENABLE_COMPILATION_CACHE"
    shell = f"unset JAX_COMPILATION_CACHE_DIR; {found.remedy}"
    assert finding(python(code, shell=shell, JAX_ENABLE_COMPILATION_CACHE="false")).state == OK


@pytest.mark.slow
def test_a_compilation_cache_that_cannot_be_written_any_more_is_found(tmp_path):
    before, closed, after = (Finding(*one) for one in json.loads(python(LATER, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))))
    assert [before.state, closed.state, after.state] == [OK, WARNING, OK] and "Permission denied" in closed.saw
