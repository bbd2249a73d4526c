"""The machine itself: a notebook's or another, how many files it may have open, and its memory."""

import os
import re
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlm_jax.doctor.findings import OK, WARNING, Finding

OPEN_FILES = 4096  # enough for the shards, checkpoint files and connections that are open at once
MEMORY_BYTES = 4 << 30


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
