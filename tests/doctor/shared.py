"""What several tests of doctor share: how a fault is planted, and how what was found is read."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlm_jax import cli
from mlm_jax.doctor.findings import FAILED, OK, Finding

ROOT = Path(__file__).parents[2]
BEFORE_A_RUN = (ROOT / "README.md").read_text("utf-8").split("\n## Before a run\n")[1].split("\n## ")[0]

COLAB = {"COLAB_RELEASE_TAG": "release-1"}
KAGGLE = COLAB | {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}  # its images are made of Colab's

# What the metadata of a TPU VM say.
TPU_ENV = """ACCELERATOR_TYPE: 'v5litepod-16'
CHIPS_PER_HOST_BOUNDS: '2,2,1'
{more}
"""

DEPRECATED = "ignore:'maxsplit' is passed as positional argument:DeprecationWarning"  # JAX's own, in Python 3.13

HOLDS = """
import fcntl, sys
held = [open(path, "r+b") for path in sys.argv[1:]]
for file in held:
    if "lockfile" in file.name:
        fcntl.lockf(file, fcntl.LOCK_EX)
print("holds", flush=True)
sys.stdin.read()
"""


def python(code: str, *argv: object, shell: str = "", **env: str) -> str:
    """What a child that executes `code` prints, in a shell that has executed `shell` before."""
    command = f"{shell or ':'}; exec {shlex.join([sys.executable, '-c', code, *map(str, argv)])}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finding(text: str) -> Finding:
    return Finding(*json.loads(text))


def only(findings, check: str) -> Finding:
    """The finding of this check; every one that is not ok has a remedy."""
    assert all(bool(found.remedy) == (found.state != OK) for found in findings), findings
    (found,) = (found for found in findings if found.check == check)
    return found


def examined(capfd, *argv: object) -> tuple[int, list[Finding]]:
    """The exit status and the findings of the command."""
    ended = cli.main(["doctor", *map(str, argv), "--json"])
    said = json.loads(capfd.readouterr().out)
    findings = [Finding(**found) for found in said["findings"]]
    assert said["failed"] == sum(found.state == FAILED for found in findings) and ended == (1 if said["failed"] else 0)
    return ended, findings


def plant(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


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
