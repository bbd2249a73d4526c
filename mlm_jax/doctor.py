"""Is this machine, its bucket, or a whole pod fit to train? Each check says what it saw and, where that will not do, the remedy.

What can be told without JAX is looked at here. The rest is left to a process of its own: it joins the others of a pod, looks at the devices and lets
them compute together. It may hang, or end at once, as XLA does over a flag that it does not know, and the findings so far are there all the same.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import importlib.util
import json
import math
import os
import queue
import re
import resource
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from mlm_jax import lock, storage
from mlm_jax.chips import CHIPS
from mlm_jax.config import InputError

OK, WARNING, FAILED = "ok", "warning", "failed"

NEWEST_PYTHON = (3, 13)  # that the tests run on
OPEN_FILES = 4096  # enough for the shards, checkpoint files and connections that are open at once
MEMORY_BYTES = 4 << 30
DISK_BYTES, CHECKPOINT_BYTES = 10 << 30, 3 << 29  # the second: a checkpoint of GPT-2 124M
FREE_INODES = 10_000
SKEW_S, SKEW_FAILS_S = 5.0, 60.0  # what clocks may differ by
SAYS_S = 300.0  # at most, until all processes have said what they saw: three requests of a bucket that does not answer, and some
COLLECTIVE_BYTES = 16 << 20  # that each device contributes
TPU_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # on the PCI bus. Source: jax/_src/hardware_utils.py
OTHER = ("-m", "mlm_jax.doctor")  # the process that looks at what needs JAX
ALIKE = ("python", "jax")  # checks that have to see the same in all processes
REPORT = "The check itself failed; please report this line"


class Finding(NamedTuple):
    """What one check saw."""

    check: str
    state: str  # OK, WARNING or FAILED
    saw: str
    remedy: str = ""
    process: str = ""  # which one of several saw it; "": this one


class Wanted(NamedTuple):
    """What the machine has to be fit for."""

    out: str = "runs"  # a folder, or gs://BUCKET/FOLDER
    devices: int | None = None  # in all
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    distributed: bool = False
    join_timeout: float = 300.0  # as distributed.TIMEOUT_S, for which JAX would have to be imported

    @property
    def several(self) -> bool:
        return self.distributed or (self.coordinator, self.processes, self.process) != (None, None, None)

    @property
    def in_bucket(self) -> bool:
        return self.out.startswith("gs:/")


class Stage(NamedTuple):
    """What the other process does now, and how long that may take before it counts as hung."""

    name: str
    limit: float


# What to do where it hung, or ended, in a stage, and its last words do not say why.
REMEDIES = {
    "jax": "python -c 'import jax' has to work: make the virtual environment anew as the README says",
    "processes": "Start the same command in all processes at about the same time, with one --coordinator that each can reach",
    "devices": "Look at the last lines of: python -c 'import jax; print(jax.devices())'. On a pod the command has to run on every worker at the same "
    "time, with --distributed; a TPU that another process has just left takes a minute; else restart the machine",
    "compilation cache": "Unset JAX_COMPILATION_CACHE_DIR, or name a folder with it that can be written to",
    "collective": "Restart the machine, or make the TPU VM anew; between machines see to the firewall",
}

APART = Finding("devices", WARNING, "not looked at, as the processes are not together", "First see to the processes")


def examine(wanted: Wanted, *, root: Path = Path("/"), say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> list[Finding]:
    """Every finding; of several processes, process 0 has those of the others too.

    `root` is where the files of the machine are looked for, such as /dev and /proc.

    Raises:
      InputError: `wanted` makes no sense.
    """
    if wanted.devices is not None and wanted.devices < 1:
        raise InputError("--devices", wanted.devices, "below 1", "Give the number that all processes together should have")
    command, pipe = [sys.executable, *OTHER], subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as other,
    ):
        try:
            _tell(other, wanted)  # it begins meanwhile
            here = local(wanted, root)
            _tell(other, here)
            return here + list(_heard(other, errors, say))
        finally:
            other.kill()


def words(findings: Sequence[Finding]) -> str:
    """A line for each check; where several processes made it, one for all that had nothing to find fault with. The last line counts."""
    lines = []
    for check in dict.fromkeys(finding.check for finding in findings):
        made = [finding for finding in findings if finding.check == check]
        good = [finding for finding in made if finding.state == OK]
        several = len(good) > 1 and good[0].process != good[-1].process and (check not in ALIKE or len({finding.saw for finding in good}) == 1)
        also = f" (ok in {len(good) - 1} more processes)" if several else ""
        for finding in [*(good[:1] if also else good), *(finding for finding in made if finding.state != OK)]:
            who = f"{finding.process}: " if finding.process else ""
            lines.append(f"{finding.state.upper() if finding.state == FAILED else finding.state:8} {check:18} {who}{finding.saw}{also}")
            also = ""
            if finding.remedy:
                lines.append(f"{'':8} {'':18} -> {finding.remedy}")
    counts = [sum(finding.state == state for finding in findings) for state in (OK, WARNING, FAILED)]
    return "\n".join([*lines, f"{len(findings)} findings: {counts[0]} ok, {counts[1]} warning{'s' * (counts[1] != 1)}, {counts[2]} failed"])


# ---- what can be told without JAX ----


def local(wanted: Wanted, root: Path = Path("/")) -> list[Finding]:
    """The findings of this machine that need neither its devices nor another process."""
    folder = Path("runs" if wanted.in_bucket else wanted.out)
    checks: dict[str, Callable[[], Finding | Iterable[Finding]]] = {
        "python": python,
        "packages": packages,
        "jax": jax_family,
        "libtpu": libtpu,
        "runtime": lambda: runtime(wanted.out),
        "tpu in use": lambda: tpu_in_use(root),
        "open files": open_files,
        "memory": lambda: memory(root),
        "disk": lambda: disk(folder),
        "out": lambda: out(wanted),
    }
    return [finding for name, check in checks.items() for finding in _safely(name, check)]


def _safely(name: str, check: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """What `check` finds; where it fails itself, that is a finding."""
    try:
        found = check()
        return [found] if isinstance(found, Finding) else list(found)
    except InputError as e:
        value = f" = {e.value}" if str(e.value) else ""
        return [Finding(name, FAILED, f"{e.field}{value}: {e.reason}", e.remedy)]
    except Exception as e:  # a check that fails must not take the others with it
        return [Finding(name, FAILED, f"{type(e).__name__}: {storage.first_line(e)}", REMEDIES.get(name, REPORT))]


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Python is one that the package was made for."""
    saw, wanted = ".".join(map(str, version)), importlib.metadata.metadata("mlm_jax")["Requires-Python"]
    newest = ".".join(map(str, NEWEST_PYTHON))
    remedy = f"Make a virtual environment with Python {newest}: uv venv --python {newest}"
    if not satisfies(saw, wanted):
        return Finding("python", FAILED, f"{saw}, and not {wanted}", remedy)
    if version[:2] > NEWEST_PYTHON:
        return Finding("python", WARNING, f"{saw}, newer than {newest}, the newest that is tested", remedy)
    return Finding("python", OK, saw)


class Requirement(NamedTuple):
    """A line of what a package requires."""

    name: str
    specifiers: str
    extra: str  # the extra that asks for it


def requirements(package: str) -> list[Requirement]:
    """What the installed `package` requires, also by its extras."""
    found = []
    for line in importlib.metadata.requires(package) or []:
        matched = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?(?:;.*?\bextra == ['\"]([^'\"]+))?", line)
        if matched:
            found.append(Requirement(matched[1], matched[2].strip(), matched[3] or ""))
    return found


def installed(package: str) -> str:
    """The version of `package`; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def satisfies(version: str, specifiers: str) -> bool:
    """Whether `version` is one of "<=0.10.2,>=0.10.1" or "==0.0.42.*"; by the numbers of its release alone. Source: PEP 440."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.split(r"[^\d.]", text)[0].split(".") if n]

    for specifier in filter(None, map(str.strip, specifiers.split(","))):
        _, operator, other = re.split(r"([~=!<>]+)", specifier)
        ours, theirs = numbers(version), numbers(other.strip())
        width = len(theirs) if other.endswith("*") else max(len(ours), len(theirs))
        ours, prefix = (ours + [0] * width)[:width], theirs[:-1]
        theirs += [0] * (width - len(theirs))
        holds = {
            "==": ours == theirs,
            "!=": ours != theirs,
            "<=": ours <= theirs,
            ">=": ours >= theirs,
            "<": ours < theirs,
            ">": ours > theirs,
            "~=": ours >= theirs and ours[: len(prefix)] == prefix,
        }
        if not holds[operator]:
            return False
    return True


def pip(verb: str, *packages: str) -> str:
    """The command that does so in the environment of this Python."""
    command = [sys.executable, "-m", "pip", verb] if installed("pip") else ["uv", "pip", verb, "--python", sys.executable]
    return shlex.join([*command, *packages])  # environments that uv makes have no pip


def packages() -> Iterator[Finding]:
    """What the package requires is installed; what only an extra requires may be missing, and is worth a warning where it is too old."""
    needs = [need for need in requirements("mlm_jax") if need.name != "mlm_jax" and need.extra not in ("test", "dev")]
    needs = [need for need in needs if installed(need.name) or not need.extra]
    wrong = [need for need in needs if not satisfies(installed(need.name), need.specifiers)]
    for state, some in ((FAILED, [need for need in wrong if not need.extra]), (WARNING, [need for need in wrong if need.extra])):
        if some:
            whose = [f", which the extra {need.extra} asks for" if need.extra else "" for need in some]
            each = [f"{need.name} {installed(need.name) or 'is missing'}, not {need.specifiers}" for need in some]
            remedy = pip("install", *(need.name + need.specifiers for need in some))
            yield Finding("packages", state, "; ".join(map("".join, zip(each, whose, strict=True))), remedy)
    if not wrong:
        yield Finding("packages", OK, f"{len({need.name for need in needs})} that are required are there, in the right versions")


def jax_family() -> Finding:
    """jaxlib, libtpu and the CUDA plugin are those that the installed jax asks for."""
    plugins = (("libtpu", "tpu"), ("jax-cuda12-plugin", "cuda12"), ("jax-cuda13-plugin", "cuda13"))
    extras = {extra: name for name, extra in plugins if installed(name)}
    asked = [need for need in requirements("jax") if need.name in ("jaxlib", *extras.values()) and need.extra in ("", *extras)]
    wrong = {need.name: need.specifiers for need in asked if not satisfies(installed(need.name), need.specifiers)}
    saw = ", ".join(f"{name} {installed(name) or 'is missing'}" for name in ("jax", "jaxlib", *extras.values()))
    if wrong:
        saw += f"; jax wants {', '.join(f'{name}{specifiers}' for name, specifiers in wrong.items())}"
        chosen = f"[{','.join(extras)}]" if extras else ""
        return Finding("jax", FAILED, saw, pip("install", f"jax{chosen}=={installed('jax')}"))
    return Finding("jax", OK, saw)


def libtpu() -> Iterator[Finding]:
    """Another libtpu than the package would be used; nothing where it is not. Source: jax/_src/cloud_tpu_init.py, get_tpu_library_path."""
    named, package = os.environ.get("TPU_LIBRARY_PATH"), importlib.util.find_spec("libtpu")
    own = os.path.join(os.path.dirname(package.origin or ""), "libtpu.so") if package else ""
    if named and os.path.realpath(named) != os.path.realpath(own):
        yield Finding("libtpu", WARNING, f"TPU_LIBRARY_PATH={named} goes before the package's", "unset TPU_LIBRARY_PATH")
    if nightly := installed("libtpu-nightly"):
        remedy = " && ".join([pip("uninstall", "libtpu-nightly", "libtpu"), pip("install", f"jax[tpu]=={installed('jax')}")])
        yield Finding("libtpu", WARNING, f"libtpu-nightly {nightly} is installed, in the same folder as libtpu", remedy)


def notebook(environ: Mapping[str, str] = os.environ) -> str:
    """Which notebook service this is; "" where it is none."""
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return "Kaggle"
    return "Google Colab" if "COLAB_RELEASE_TAG" in environ else ""  # also in Kaggle's images, which are made of Colab's


def runtime(out: str, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Which notebook service this is, if any, and what it lacks.

    Source: research.google.com/colaboratory/faq.html; kaggle.com/docs/notebooks, Technical Specifications.
    """
    in_bucket, folder = out.startswith("gs:/"), Path(os.path.abspath(out))
    if notebook(environ) == "Google Colab":
        saw = f"Google Colab ({environ['COLAB_RELEASE_TAG']}): a machine that goes when it is idle, or, free of charge, after at most 12 hours"
        mount = "after `from google.colab import drive; drive.mount('/content/drive')`"
        in_drive, mounted = folder.is_relative_to("/content/drive"), os.path.ismount("/content/drive")
        if in_bucket or (in_drive and mounted):
            yield Finding("runtime", OK, f"{saw}; {out} stays")
        elif in_drive:
            yield Finding("runtime", WARNING, f"{saw}, and {out} with it, as no Drive is mounted", f"Look again {mount}")
        else:
            remedy = "Give --out gs://BUCKET/FOLDER after `from google.colab import auth; auth.authenticate_user()`"
            yield Finding("runtime", WARNING, f"{saw}, and {out} with it", f"{remedy}, or a folder below /content/drive {mount}")
    elif notebook(environ) == "Kaggle":
        saw = "Kaggle: a session of at most 12 hours, 9 on a TPU"
        if in_bucket or folder.is_relative_to("/kaggle/working"):
            kept = "" if in_bucket else ", up to 20 GB, when a version is saved"
            yield Finding("runtime", OK, f"{saw}; {out} stays{kept}")
        else:
            remedy = "Give --out /kaggle/working/FOLDER, of which 20 GB are kept when a version is saved, or --out gs://BUCKET/FOLDER"
            yield Finding("runtime", WARNING, f"{saw}; {out} goes with the session", remedy)
        try:
            socket.create_connection(("storage.googleapis.com", 443), timeout=10).close()
        except OSError as e:
            yield Finding("network", WARNING, f"no way out of this notebook ({e})", "Switch on Internet in the notebook's settings")
    else:
        yield Finding("runtime", OK, "a machine of its own, neither Colab nor Kaggle")


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


def open_files() -> Finding:
    """A process may have enough files open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Finding("open files", OK, "no limit" if soft == resource.RLIM_INFINITY else f"{soft} at a time")
    raised = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    remedy = f"ulimit -n {raised}" if raised >= OPEN_FILES else "Raise nofile in /etc/security/limits.conf, or by docker run --ulimit"
    return Finding("open files", WARNING, f"{soft} at a time, fewer than {OPEN_FILES}", remedy)


def memory(root: Path = Path("/")) -> Finding:
    """There is memory left, also within the limits of a container or of a job. Source: proc(5); cgroup v2 in the kernel's documentation."""

    def fields(path: Path) -> dict[str, int]:
        return {name.rstrip(":"): int(n) for name, n in re.findall(r"^(\S+)\s+(\d+)", path.read_text(), re.MULTILINE)}

    if not (root / "proc" / "meminfo").exists():
        return Finding("memory", OK, "not told by this system")
    available, top = fields(root / "proc" / "meminfo")["MemAvailable"] << 10, root / "sys" / "fs" / "cgroup"
    listed = root / "proc" / "self" / "cgroup"
    own = re.search(r"^0::/(.*)", listed.read_text() if listed.exists() else "", re.MULTILINE)
    group = top / own[1] if own else top
    for limited in (folder for folder in (group, *group.parents) if folder.is_relative_to(top) and (folder / "memory.max").exists()):
        if (most := (limited / "memory.max").read_text().strip()) != "max":
            used = int((limited / "memory.current").read_text()) - fields(limited / "memory.stat").get("inactive_file", 0)
            available = min(available, int(most) - used)
    saw = f"{available / 2**30:.1f} GiB available"
    if available < MEMORY_BYTES:
        return Finding("memory", WARNING, f"{saw}, less than {MEMORY_BYTES >> 30}", "End other programs, or take a machine or container with more")
    return Finding("memory", OK, saw)


def disk(folder: Path) -> Finding:
    """There is room where `folder` is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))  # False also where one may not look
    stat = os.statvfs(there)
    free = stat.f_bavail * stat.f_frsize
    saw, remedy = f"{free / 2**30:.1f} GiB free in {there}", "Free some space there, or name another disk with --out"
    if free < CHECKPOINT_BYTES:
        return Finding("disk", FAILED, f"{saw}, less than a checkpoint of GPT-2 124M takes, {CHECKPOINT_BYTES / 2**30:g}", remedy)
    if stat.f_files and stat.f_favail < FREE_INODES:  # some file systems do not count them
        return Finding("disk", FAILED, f"room for {stat.f_favail} files in {there}, fewer than {FREE_INODES}", f"Remove many small files. {remedy}")
    if free < DISK_BYTES:
        return Finding("disk", WARNING, f"{saw}, less than {DISK_BYTES >> 30}", remedy)
    return Finding("disk", OK, saw)


def out(wanted: Wanted) -> Iterator[Finding]:
    """What a run would be written into can be written and read; a folder that several processes share is looked at when they are together."""
    place = storage.place(wanted.out)
    if not isinstance(place, Path):
        try:
            ahead = storage.check_writable(place)
        except storage.NotReached as e:
            yield Finding("out", FAILED, str(e), "See to the network, and to the credentials of this machine; then look again")
            return
        yield Finding("out", OK, f"{place} was written, read and removed")
        yield skew("bucket clock", ahead, "the bucket's")
    elif not wanted.several:
        try:
            with lock.hold(place):
                yield written(place, f".doctor_{secrets.token_hex(4)}")
        except OSError as e:
            yield _unwritten(place, e)


def written(folder: Path, name: str) -> Finding:
    """Writes a small file into `folder`, reads it back and takes it away."""
    try:
        storage.write_text(folder / name, name)
        same = storage.read_text(folder / name) == name
        (folder / name).unlink()
    except OSError as e:
        return _unwritten(folder, e)
    if not same:
        return Finding("out", FAILED, f"{folder} gives back other bytes than were written", "Name a directory on another disk with --out")
    return Finding("out", OK, f"{folder} was written to and read")


def _unwritten(folder: Path, error: OSError) -> Finding:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = f"Free some space in {folder}" if full else "Name a directory that can be written to with --out"
    return Finding("out", FAILED, f"{folder} cannot be written to ({error.strerror})", remedy)


def skew(check: str, ahead: float, whose: str, than: str = "this machine's") -> Finding:
    """What to say of a clock, `whose`, that is `ahead` seconds of another."""
    saw = f"{whose} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {than}"
    if abs(ahead) <= SKEW_S:
        return Finding(check, OK, saw)
    state = FAILED if abs(ahead) > SKEW_FAILS_S else WARNING
    return Finding(check, state, f"{saw}; sign-in to a bucket fails where they differ by minutes", "sudo timedatectl set-ntp true, where it is wrong")


# ---- the other process ----


def _tell(other: subprocess.Popen[str], what: Any) -> None:
    assert other.stdin
    with contextlib.suppress(BrokenPipeError):  # it has ended, as will be found
        os.write(other.stdin.fileno(), json.dumps(what).encode() + b"\n")  # its buffer would be written once more when it is closed


def _heard(other: subprocess.Popen[str], errors: IO[str], say: Callable[[str], None]) -> Iterator[Finding]:
    """The findings of the other process, and one more where it hung or ended."""
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert other.stdout
        for line in other.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    stage = Stage("jax", 180.0)
    while True:
        try:
            line = lines.get(timeout=stage.limit)
        except queue.Empty:
            yield Finding(stage.name, FAILED, f"no answer within {stage.limit:g} s", REMEDIES[stage.name])
            return
        if not line:
            ended = other.wait()
            errors.seek(0)
            yield ended_in(stage.name, ended, errors.read())
            return
        kind, said = json.loads(line)
        if kind == "finding":
            yield Finding(*said)
            continue
        stage = Stage(*said)
        if stage.name == "end":
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(stage.limit)
            return
        say(f"doctor: {stage.name} (may take up to {stage.limit:g} s)")


def ended_in(stage: str, ended: int, errors: str) -> Finding:
    """What to say where the process that looked at the devices ended by itself, with these last words."""
    told = [line.strip() for line in errors.splitlines() if line.strip()]
    reasons = [line for line in told if re.search(r"Unknown (command line )?flag|\w(Error|Exception): |already in use|multi-process lockfile", line)]
    last = (reasons or told or ["none"])[-1]
    return Finding(stage, FAILED, f"ended with status {ended}, its last words: {last[-300:]}", advice(stage, last))


def advice(stage: str, error: str) -> str:
    """What to do about an error of XLA or libtpu in that stage."""
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


def _look(wanted: Wanted, read_local: Callable[[], list[Finding]]) -> Iterator[Finding | Stage]:
    """What the other process does: every stage before it begins, and every finding."""
    from mlm_jax import distributed

    host = socket.gethostname()
    if wanted.several:
        yield Stage("processes", wanted.join_timeout + 120 if math.isfinite(wanted.join_timeout) else 600.0)
        joined = _safely("processes", lambda: _join(wanted))
        if joined:
            yield from joined
            yield APART
            return
        hosts = dict(sorted(distributed.gathered("doctor_hosts", host, SAYS_S).items()))
        yield Finding("processes", OK, f"{len(hosts)} came, on {', '.join(dict.fromkeys(hosts.values()))}")
        if silent := [str(i) for i in range(distributed.count()) if i not in hosts]:
            yield Finding("processes", FAILED, f"came, but said nothing within {SAYS_S:g} s: {', '.join(silent)}", "Look at what they have printed")
    else:
        hosts = {0: host}
        if (workers := pod().workers) > 1:
            saw = f"this is one of {workers} workers of a pod, and looked at alone"
            yield Finding("processes", FAILED, saw, "Give the command on every worker at about the same time, with --distributed")
            yield APART
            return

    def others(name: str, findings: list[Finding]) -> Iterator[Finding]:
        """Tells the others the findings of this process, and yields theirs to the first one."""
        said = distributed.gathered(f"doctor_{name}", json.dumps(findings), SAYS_S)
        for i, who in list(hosts.items())[1:] if distributed.number() == 0 else ():
            silent = [Finding(name, FAILED, "has said nothing more", "Look at what it has printed itself")]
            for finding in json.loads(said[i]) if i in said else silent:
                yield Finding(*finding)._replace(process=f"process {i} ({who})")

    if wanted.several:
        yield Stage("processes", SAYS_S + 60)
    here = read_local()
    theirs = list(others("processes", here))
    yield from theirs
    yield from versions(here, theirs)
    if wanted.several:
        distributed.gathered("doctor_ready", "", SAYS_S)  # from here on all are within the time of a message
        times = distributed.gathered("doctor_clock", repr(time.time()), SAYS_S)
        yield from clocks({i: float(said) for i, said in times.items()}, hosts)
        if not wanted.in_bucket:  # into which each has written by itself
            found = _safely("out", lambda: shared_folder(Path(wanted.out), hosts))
            yield from found
            yield from others("out", found)
    yield Stage("devices", SAYS_S + 60)
    summary = distributed.gathered("doctor_summary", json.dumps(_summary()), SAYS_S)
    each = {i: json.loads(summary[i]) if i in summary else "did not tell of any" for i in hosts}
    if wrong := {i: error for i, error in each.items() if isinstance(error, str)}:
        for i, error in wrong.items():
            yield Finding("devices", FAILED, error, advice("devices", error), f"process {i} ({hosts[i]})" if wanted.several else "")
        return
    yield devices(list(each.values()), wanted.devices)
    found = []
    for name, limit, check in (("compilation cache", 120.0, compilation_cache), ("collective", 180.0, collective)):
        if check is compilation_cache and distributed.number() > 0:
            continue  # JAX lets process 0 alone write there
        yield Stage(name, limit)
        found += (made := _safely(name, check))
        yield from made
    yield from others("collective", found)


def versions(here: Sequence[Finding], theirs: Sequence[Finding]) -> Iterator[Finding]:
    """What to say where Python or JAX is not the same in all processes: what process 0 has is right, if it is fine there."""
    for mine in (finding for finding in here if finding.check in ALIKE and finding.state == OK):
        if differ := [finding for finding in theirs if finding.check == mine.check and finding.saw != mine.saw]:
            saw = f"not the same in all processes: {mine.saw}, but in {', '.join(f'{finding.process} {finding.saw}' for finding in differ)}"
            packages = [f"{name}=={version}" for name, version in re.findall(r"(\S+) (\d[^,]*)", mine.saw)]
            remedy = pip("install", *packages) if mine.check == "jax" else f"Make virtual environments with Python {mine.saw}"
            yield Finding(mine.check, FAILED if mine.check == "jax" else WARNING, saw, f"In these: {remedy}")


def _join(wanted: Wanted) -> list[Finding]:
    """Joins the other processes; what is to be said where that fails."""
    from mlm_jax import distributed

    given = (None, None, None) if wanted.distributed else (wanted.coordinator, wanted.processes, wanted.process)
    try:
        distributed.start(*given, timeout=wanted.join_timeout)
    except TimeoutError as e:
        return [Finding("processes", FAILED, str(e), REMEDIES["processes"])]
    return []


def clocks(times: Mapping[int, float], hosts: Mapping[int, str]) -> list[Finding]:
    """What to say of the clocks of the processes, in seconds, all read at the same moment: each against the middle one."""
    middle = sorted(times.values())[len(times) // 2]
    every = [skew("clocks", time - middle, f"that of process {i} ({hosts[i]})", "the others'") for i, time in sorted(times.items())]
    wrong = [finding for finding in every if finding.state != OK]
    return wrong or [Finding("clocks", OK, f"within {max(times.values()) - min(times.values()):.1f} s of each other")]


def shared_folder(folder: Path, hosts: Mapping[int, str]) -> Finding:
    """Every process can write into `folder`, and sees there what the others wrote."""
    from mlm_jax import distributed

    names = distributed.gathered("doctor_names", f".doctor_{secrets.token_hex(4)}", SAYS_S)
    mine = folder / names[distributed.number()]
    found = written(folder, f"{mine.name}_alone")
    if found.state == OK:
        storage.write_text(mine, "")
    wrote = distributed.gathered("doctor_wrote", found.state, SAYS_S)
    unseen = [i for i in hosts if wrote.get(i) == OK and not (folder / names[i]).exists()]
    distributed.gathered("doctor_seen", "", SAYS_S)
    mine.unlink(missing_ok=True)
    distributed.gathered("doctor_removed", "", SAYS_S)
    with contextlib.suppress(OSError):  # there is something in it
        folder.rmdir()
    if found.state == OK and unseen:
        who = ", ".join(f"process {i} ({hosts[i]})" for i in unseen)
        remedy = "Name a folder that all of them see with --out, such as a network file system, or gs://BUCKET/FOLDER"
        found = Finding("out", FAILED, f"{folder.absolute()} is not the same folder in all processes: files of {who} are not seen here", remedy)
    return found


class Summary(NamedTuple):
    """The devices of one process, and what it has but JAX does not use."""

    platform: str
    kind: str
    here: int
    everywhere: int
    expected: int | None  # in all, by what the cloud says of the machine
    unused: str


def _summary() -> Summary | str:
    """The devices of this process, or why JAX finds none."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as e:
        return storage.first_line(e)
    unused, chips = "", tpus()
    if found[0].platform == "cpu":
        unused = f"{chips} TPU chips" if chips else "an NVIDIA GPU" if any(map(os.path.exists, ("/dev/nvidia0", "/dev/nvidiactl"))) else ""
    expected = pod().devices if found[0].platform == "tpu" else None
    return Summary(found[0].platform, found[0].device_kind, jax.local_device_count(), len(found), expected, unused)


class Pod(NamedTuple):
    """What the cloud says of the TPU that this machine is a worker of."""

    workers: int  # in all slices
    devices: int | None  # of all workers; None: not told


def pod() -> Pod:
    """Asks the metadata of a TPU VM or, under Kubernetes, the environment, as jax.distributed.initialize does.

    Source: jax/_src/clusters/cloud_tpu_cluster.py; for ACCELERATOR_TYPE in tpu-env github.com/pytorch/xla, torch_xla/_internal/tpu.py.
    """
    from jax._src.clusters import cloud_tpu_cluster as cloud  # no public name

    kind, slices, workers = os.environ.get("TPU_ACCELERATOR_TYPE"), os.environ.get("MEGASCALE_NUM_SLICES"), [""]
    with contextlib.suppress(OSError):  # nobody answers for the metadata
        if cloud.GceTpuCluster.is_env_present():
            workers = cloud.GceTpuCluster._get_worker_list_in_slice()
            kind = kind or cloud.get_tpu_env_value_from_metadata("ACCELERATOR_TYPE")
            slices = slices or cloud.get_tpu_env_value_from_metadata("MEGASCALE_NUM_SLICES")
        elif cloud.GkeTpuCluster.is_env_present():
            workers = cloud.GkeTpuCluster._get_worker_list_in_slice()
    n = int(slices or 1)
    return Pod(n * len(workers), expected_devices(kind or "", n))


def expected_devices(accelerator: str, slices: int) -> int | None:
    """How many devices so many slices of this accelerator type have; None where it is not known."""
    kind, _, n = accelerator.partition("-")
    chip = next((chip for chip in CHIPS.values() if chip.accelerator == kind), None)
    if chip is None or not n.isdecimal():
        return None
    return int(n) // chip.cores * chip.devices * slices


def devices(said: Sequence[Sequence[Any]], wanted: int | None) -> Finding:
    """What to say of the devices of all processes; `wanted`, or what the cloud says, is how many there should be."""
    each = [Summary(*one) for one in said]
    first, counts = each[0], [one.here for one in each]
    saw = f"{first.everywhere} {first.kind} ({first.platform})"
    saw += f", {' + '.join(map(str, counts))} in {len(each)} processes" if len(each) > 1 else ""
    expected = first.expected if wanted is None else wanted
    other = expected not in (None, first.everywhere)
    saw += f"; {expected} were expected" if other else ""
    if unused := next((one.unused for one in each if one.unused), ""):
        if platforms := os.environ.get("JAX_PLATFORMS"):
            return Finding("devices", FAILED if other else WARNING, f"{saw}; JAX_PLATFORMS={platforms} hides {unused}", "unset JAX_PLATFORMS")
        plugin = f"jax[{'tpu' if 'TPU' in unused else 'cuda12'}]=={installed('jax')}"
        return Finding("devices", FAILED, f"{saw}; {unused} not used", pip("install", plugin))
    if other:
        remedy = f"Give the command on every worker with --distributed, see to XLA_FLAGS and *_VISIBLE_*, or say --devices {first.everywhere}"
        return Finding("devices", FAILED, saw, remedy)
    if len({(one.here, one.kind) for one in each}) > 1:
        return Finding("devices", FAILED, f"{saw}; not the same in all processes", "See to the machine that differs; restart it, or make it anew")
    if first.platform == "cpu" and notebook():
        remedy = "Choose one: Settings > Accelerator" if notebook() == "Kaggle" else "Choose one: Runtime > Change runtime type"
        return Finding("devices", WARNING, f"{saw}; this notebook has no accelerator", remedy)
    return Finding("devices", OK, saw)


def compilation_cache() -> Finding:
    """What is compiled is kept and found again."""
    import jax

    from mlm_jax import observe

    named = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        observe.keep_compiled(Path(temporary))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        before = observe.compilation()
        new = secrets.randbits(31)  # else an earlier look has left it there
        for _ in range(2):
            jax.jit(lambda x: x + new).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
            jax.clear_caches()
        hits = observe.compilation().since(before).programs_from_cache
    place = named or "compiled/ of each run"
    if hits:
        return Finding("compilation cache", OK, f"{place}: what was compiled was found again")
    reason = f": {storage.first_line(heard[0].message)}" if heard else ""
    switched_off = not jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    remedy = "unset JAX_ENABLE_COMPILATION_CACHE" if switched_off else REMEDIES["compilation cache"]
    return Finding("compilation cache", WARNING, f"{place}: each start compiles anew{reason}", remedy)


def collective() -> Finding:
    """All devices add up and exchange what each contributes, and have the right answer; GB/s as nccl-tests count them.

    Source: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md: an all-reduce of S bytes among n moves 2 (n - 1) / n S for each of them.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    every = jax.devices()
    n, width = len(every), COLLECTIVE_BYTES // 4
    mesh = Mesh(np.array(every), ("device",))

    def row(index: Any) -> np.ndarray:
        return np.full((1, width), index[0].start or 0, np.int32)

    rows = jax.make_array_from_callback((n, width), NamedSharding(mesh, P("device")), row)
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "device"), mesh=mesh, in_specs=P("device"), out_specs=P()))
    gather = jax.jit(
        jax.shard_map(lambda x: jax.lax.all_gather(x[:, :8], "device", tiled=True), mesh=mesh, in_specs=P("device"), out_specs=P(), check_vma=False)
    )
    answers = {"sum": (total(rows), np.int32(n * (n - 1) // 2)), "gathering": (gather(rows), np.arange(n, dtype=np.int32)[:, None])}
    for what, (answer, right) in answers.items():
        for shard in answer.addressable_shards:
            found = np.asarray(shard.data)
            if wrong := int((found != right).sum()):
                saw = f"device {shard.device.id} of process {shard.device.process_index} has a wrong {what}: {wrong} of {found.size} numbers"
                return Finding("collective", FAILED, saw, "Do not train on it: restart the machine, or make the TPU VM anew, and look again")
    if n == 1:
        return Finding("collective", OK, "one device, which has nobody to exchange with, adds up right")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(total(rows))
        seconds.append(time.perf_counter() - start)
    rate = 2 * (n - 1) / n * COLLECTIVE_BYTES / min(seconds) / 1e9
    return Finding("collective", OK, f"{n} devices have the right answers; all-reduce of {COLLECTIVE_BYTES >> 20} MiB: {rate:.2f} GB/s a device")


def main() -> None:
    """What the other process is started for: reads what is wanted, and what was found without it, and says its stages and findings, a line each."""
    wanted = Wanted(*json.loads(sys.stdin.readline()))
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo greets its peers on stdout

    def read_local() -> list[Finding]:
        return [Finding(*finding) for finding in json.loads(sys.stdin.readline())]

    from mlm_jax import distributed, status

    ended = status.FAILED
    try:
        for said in _look(wanted, read_local):
            print(json.dumps(["stage" if isinstance(said, Stage) else "finding", said]), file=stdout, flush=True)
        print(json.dumps(["stage", Stage("end", 30.0)]), file=stdout, flush=True)
        ended = status.DONE
    except Exception:
        traceback.print_exc()  # its last line is found by the process that started this one
    distributed.leave(ended)  # of several, without waiting long for the others
    sys.exit(ended)


if __name__ == "__main__":
    main()
