"""Who has the TPU is found, and each error of libtpu and XLA has its remedy."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_jax.doctor import tpu
from mlm_jax.doctor.examine import ended_in
from mlm_jax.doctor.findings import FAILED, OK, REMEDIES, Finding
from tests.doctor.shared import HOLDS, holding, plant


def plant_chips(root: Path, n: int) -> None:
    """`n` chips of a TPU v5e, and a network card of the same vendor."""
    for i in range(n + 1):
        plant(root, f"sys/bus/pci/devices/0000:00:0{i}.0/vendor", text="0x1ae0\n")
        plant(root, f"sys/bus/pci/devices/0000:00:0{i}.0/device", text="0x0063\n" if i else "0x0042\n")


def test_only_what_this_process_is_to_have_of_a_tpu_counts_as_in_use(tmp_path):
    plant(tmp_path, *(f"dev/vfio/{i}" for i in (0, 1, 9, 10)))
    plant_chips(tmp_path, 0)
    with holding(tmp_path / "dev/vfio/10"):
        assert tpu.tpu_in_use(tmp_path, {}).saw == "there is none"  # it is another device
    plant(tmp_path, "tmp/libtpu_lockfile")
    plant_chips(tmp_path, 4)
    with holding(tmp_path / "dev/vfio/10", tmp_path / "tmp/libtpu_lockfile") as other:
        assert tpu.tpu_in_use(tmp_path, {}).remedy == f"kill {other.pid}"
        for name in ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"):
            assert tpu.tpu_in_use(tmp_path, {name: "0,1,2"}).state == OK
            assert tpu.tpu_in_use(tmp_path, {name: "3"}).remedy == f"kill {other.pid}"  # 10 comes after 9
            assert tpu.tpu_in_use(tmp_path, {name: "0,1,2,3"}).remedy == f"kill {other.pid}"


def test_where_a_notebook_has_the_tpu_its_runtime_is_to_be_restarted(tmp_path):
    plant(tmp_path, "dev/accel0")
    plant(tmp_path, "colab_kernel_launcher.py", text=HOLDS)
    with holding(tmp_path / "dev/accel0", program=[str(tmp_path / "colab_kernel_launcher.py")]) as notebook:
        found = tpu.tpu_in_use(tmp_path)
        assert found.state == FAILED and found.remedy == "Restart the runtime of the notebook that has it, or the kernel"
        assert tpu.advice("devices", f"in use by process with pid {notebook.pid}.") == found.remedy


@pytest.mark.parametrize("paths", [["dev/accel0"], ["dev/vfio/2"], ["tmp/libtpu_lockfile"], ["dev/accel1", "tmp/libtpu_lockfile"]])
def test_a_process_that_has_the_tpu_is_named_and_gone_after_the_remedy(paths, tmp_path):
    assert tpu.tpu_in_use(tmp_path) == Finding("tpu in use", OK, "there is none")
    plant(tmp_path, *(f"dev/accel{i}" for i in range(2)), "dev/vfio/2", "dev/vfio/vfio", "tmp/libtpu_lockfile")
    plant_chips(tmp_path, 1)
    assert tpu.tpu_in_use(tmp_path) == Finding("tpu in use", OK, "by no process")
    with holding(*(tmp_path / name for name in paths)) as holder:
        found = tpu.tpu_in_use(tmp_path)
        assert found.state == FAILED and f"process {holder.pid} ({sys.executable} -c" in found.saw
        subprocess.run(shlex.split(found.remedy), check=True)
        assert holder.wait(60) == -signal.SIGTERM
    assert tpu.tpu_in_use(tmp_path).state == OK


def test_a_lock_of_a_process_that_may_not_be_seen_and_a_lock_file_that_may_not_be_opened_are_found(tmp_path, monkeypatch):
    lockfile = tmp_path / "tmp" / "libtpu_lockfile"
    plant(tmp_path, "tmp/libtpu_lockfile")
    with holding(lockfile):
        monkeypatch.setattr(tpu, "_users", lambda paths: [])
        found = tpu.tpu_in_use(tmp_path)
        assert found.state == FAILED and f"{lockfile} is locked" in found.saw and f"sudo lsof -w {lockfile}" in found.remedy
    assert tpu.tpu_in_use(tmp_path).state == OK
    opened = Path.open

    def denied(self, *arguments, **named):
        if self == lockfile:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", denied)
    found = tpu.tpu_in_use(tmp_path)
    assert found.state == FAILED and "cannot be opened (Permission denied)" in found.saw
    subprocess.run(shlex.split(found.remedy.partition(", if ")[0].removeprefix("sudo ")), check=True)
    assert tpu.tpu_in_use(tmp_path).state == OK


def test_each_error_of_xla_and_libtpu_has_its_own_remedy(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    backend = "RuntimeError: Unable to initialize backend 'tpu': "
    lsof = "End the process that sudo lsof -w /dev/accel* /dev/vfio/* /tmp/libtpu_lockfile names; where it names none, sudo rm /tmp/libtpu_lockfile"
    busy = 'ABORTED: The TPU is already in use by another process probably owned by another user. Run "$ sudo lsof -w /dev/accel0" to'
    assert tpu.advice("devices", backend + busy) == lsof
    locked = 'INTERNAL: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".'
    assert tpu.advice("devices", backend + locked) == lsof
    assert tpu.advice("devices", backend + "no TPU").startswith("unset JAX_PLATFORMS, which is tpu,cpu")
    monkeypatch.setattr(tpu, "tpus", lambda: 4)
    assert tpu.advice("devices", backend + "it broke") == REMEDIES["devices"]
    for unknown, remedy in {
        "--xla_nonsense=1": "Take --xla_nonsense=1 out of the environment variable XLA_FLAGS",
        "--xla_tpu_a=1 --xla_b": "Take --xla_b out of the environment variable XLA_FLAGS",
        "--xla_tpu_a=1 --xla_tpu_b": "Move --xla_tpu_a=1 --xla_tpu_b from the environment variable XLA_FLAGS to LIBTPU_INIT_ARGS",
    }.items():
        assert ended_in("devices", -6, f"F0 parse_flags_from_env.cc:234] Unknown flags in XLA_FLAGS: {unknown}\nAborted").remedy == remedy
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--nonsense=1")
    flag = "ERROR: Unknown command line flag '{}'\nand more"
    assert ended_in("devices", 1, flag.format("nonsense")).remedy == "Take --nonsense out of the environment variable LIBTPU_INIT_ARGS"
    assert ended_in("devices", 1, flag.format("xla_tpu_of_jax")).remedy == REMEDIES["devices"]
