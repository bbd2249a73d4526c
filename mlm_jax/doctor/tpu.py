"""The TPU chips of this machine: how many, who has them, and what to do where libtpu, or XLA on any device, does not start."""

import contextlib
import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlm_jax.doctor.findings import FAILED, OK, REMEDIES, Finding

TPU_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # on the PCI bus. Source: jax/_src/hardware_utils.py


def tpus(root: Path = Path("/")) -> int:
    """How many TPU chips are attached to this machine; other devices of the same vendor are network cards and disks."""
    ours = [path for path in root.glob("sys/bus/pci/devices/*/vendor") if path.read_text().strip() == "0x1ae0"]
    return sum(path.with_name("device").read_text().strip() in TPU_DEVICES for path in ours)


def tpu_in_use(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> Finding:
    """No other process has the TPU. libtpu locks a file of its own by lockf, and opens /dev/accel* or, on newer kinds, /dev/vfio/*.

    Where this process is to have some of the chips alone, only those are looked at: libtpu then takes no lock.
    """
    found = [*root.glob("dev/accel[0-9]*"), *(root.glob("dev/vfio/[0-9]*") if tpus(root) else ())]
    nodes = sorted(found, key=lambda path: int(re.sub(r"\D", "", path.name)))
    visible = environ.get("TPU_VISIBLE_CHIPS") or environ.get("TPU_VISIBLE_DEVICES")
    if visible:
        nodes = [nodes[i] for i in map(int, re.findall(r"\d+", visible)) if i < len(nodes)]
    lockfile = root / "tmp" / "libtpu_lockfile"
    held = False
    if lockfile.exists() and not 0 < len(nodes) < len(found):
        try:
            with lockfile.open("r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go with the file
        except BlockingIOError:
            held = True
        except OSError as e:
            saw, every = f"{lockfile} cannot be opened ({e.strerror}): another user's, or left behind", " ".join(map(str, [lockfile, *nodes]))
            return Finding("tpu in use", FAILED, saw, f"sudo rm {lockfile}, if sudo lsof -w {every} names no process")
    users = _users([*nodes, *([lockfile] if held else [])])
    if users:
        saw = ", ".join(f"process {pid} ({_command(pid)[:80]})" for pid in users)
        return Finding("tpu in use", FAILED, f"by {saw}", _end(users))
    if held:
        remedy = f"Find it by sudo lsof -w {' '.join(map(str, [*nodes, lockfile]))}, and end it"
        return Finding("tpu in use", FAILED, f"by a process that this user may not see: {lockfile} is locked", remedy)
    return Finding("tpu in use", OK, "by no process" if nodes or lockfile.exists() else "there is none")


def _users(paths: Sequence[Path]) -> list[int]:
    """The processes that have one of these files open, as far as this user may see them."""
    names, found = {os.path.realpath(path) for path in paths}, set()
    for opened in Path("/proc").glob("[0-9]*/fd/*") if names else ():
        with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to another user
            if os.readlink(opened) in names:
                found.add(int(opened.parts[2]))
    return sorted(found - {os.getpid()})


def _command(pid: int) -> str:
    """What a process executes; "" where it has ended."""
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _end(pids: Sequence[int]) -> str:
    """How to end these processes."""
    if any("kernel_launcher" in _command(pid) for pid in pids):
        return "Restart the runtime of the notebook that has it, or the kernel"
    return f"kill {' '.join(map(str, pids))}"


def advice(stage: str, error: str) -> str:
    """What to do about an error of XLA or libtpu in that stage: chips that another process has, unknown flags, a platform that is not there."""
    if user := re.search(r"in use by process with pid (\d+)", error):
        return _end([int(user[1])])
    if re.search("owned by another user|multi-process lockfile", error):
        every = "/dev/accel* /dev/vfio/* /tmp/libtpu_lockfile"
        return f"End the process that sudo lsof -w {every} names; where it names none, sudo rm /tmp/libtpu_lockfile"
    if flags := re.search(r"Unknown flags? in (\w+): (.*)", error):
        others = [flag for flag in flags[2].split() if not flag.startswith("--xla_tpu_")]
        if others:
            return f"Take {' '.join(others)} out of the environment variable {flags[1]}"
        return f"Move {flags[2].strip()} from the environment variable {flags[1]} to LIBTPU_INIT_ARGS"
    flag = re.search(r"Unknown command line flag '(\w+)'", error)
    if flag and flag[1] in os.environ.get("LIBTPU_INIT_ARGS", ""):  # JAX itself adds some
        return f"Take --{flag[1]} out of the environment variable LIBTPU_INIT_ARGS"
    if os.environ.get("JAX_PLATFORMS") and "backend" in error and not tpus():
        return f"unset JAX_PLATFORMS, which is {os.environ['JAX_PLATFORMS']}, or install what it needs"
    return REMEDIES[stage]
