"""The pod script says the same to every worker, and every argument arrives there as it was given."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tpu_scripts" / "run_on_pod.sh"
AWKWARD = ["--set", "data.source=a 'b\" $HOME", "--set", "sample.prompt=x; touch broken & `id` \\ \n*", ""]


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program on PATH that does what `body` says and keeps its arguments in NAME.args, each ended by a NUL."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'#!/usr/bin/env bash\nprintf \'%s\\0\' "$@" >> "$RECORDS/{name}.args"\n{body}\n')
    (folder / name).chmod(0o755)


def records(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / f"{name}.args"
    return path.read_text().split("\0")[:-1] if path.exists() else []


@pytest.fixture
def shell(tmp_path):
    """Runs a command with a stand-in gcloud that plays one worker: it executes --command there, in a home of its own."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    (home / "mlm_jax").mkdir(parents=True)
    stand_in(programs, "gcloud", 'HOME="$WORKER" exec bash -c "${@: -1}"')
    stand_in(programs, "tmux", '[[ $1 == kill-session ]] || exec bash -c "${@: -1}"')
    stand_in(home / "mlm_jax/.venv/bin", "mlm-jax", "echo out; echo err >&2; exit 3")
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "RECORDS": str(tmp_path), "WORKER": str(home)}

    def call(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", str(SCRIPT), *args], env=env, capture_output=True, text=True, cwd=tmp_path)

    return call


def test_every_worker_gets_the_command_with_its_arguments_as_given(shell, tmp_path):
    done = shell("my-pod", "us-central2-b", "experiments/a b.py", *AWKWARD)
    assert done.returncode == 0, done.stderr
    told = records(tmp_path, "gcloud")
    assert told[:-1] == ["compute", "tpus", "tpu-vm", "ssh", "my-pod", "--zone", "us-central2-b", "--worker=all", "--command"]
    assert records(tmp_path, "mlm-jax") == ["run", "experiments/a b.py", "--distributed", *AWKWARD]
    assert records(tmp_path, "tmux")[:4] == ["new-session", "-d", "-s", "mlm_jax"]
    assert (tmp_path / "home/mlm_jax/pod.log").read_text() == "out\nerr\nexit status 3\n"
    assert not list(tmp_path.rglob("broken"))


def test_doctor_is_given_to_every_worker_and_its_findings_and_status_come_back(shell, tmp_path):
    words = ["--doctor", "my-pod", "us-central2-b", "--out", "gs://bucket/a b", *AWKWARD]
    done = shell("--dry-run", *words)
    assert done.returncode == 0 and records(tmp_path, "gcloud") == []
    done = shell(*words)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert records(tmp_path, "mlm-jax") == ["doctor", "--distributed", "--out", "gs://bucket/a b", *AWKWARD]
    assert "--worker=all" in records(tmp_path, "gcloud") and records(tmp_path, "tmux") == []
    assert not list(tmp_path.rglob("broken"))


def test_dry_run_prints_what_would_be_called_and_calls_nothing(shell, tmp_path):
    done = shell("--dry-run", "my-pod", "us-central2-b", "experiments/tiny.py", *AWKWARD)
    assert done.returncode == 0 and records(tmp_path, "gcloud") == []
    shell("my-pod", "us-central2-b", "experiments/tiny.py", *AWKWARD)
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {done.stdout}"], capture_output=True, text=True, check=True).stdout
    assert printed.split("\0")[:-1] == ["gcloud", *records(tmp_path, "gcloud")]  # what is printed can be pasted


def test_setup_clones_then_updates_and_installs(shell, tmp_path):
    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *who, *args], cwd=tmp_path / "origin with space", check=True, capture_output=True)

    (tmp_path / "origin with space").mkdir()
    git("init")
    worker = tmp_path / "home"
    (worker / "mlm_jax").rename(worker / "elsewhere")  # nothing is cloned yet
    stand_in(worker / ".local/bin", "uv", "")
    for content in ("first", "second"):
        (tmp_path / "origin with space/file").write_text(content)
        git("add", ".")
        git("commit", "-m", content)
        done = shell("--setup", "my-pod", "us-central2-b", str(tmp_path / "origin with space"))
        assert done.returncode == 0, done.stderr
        assert (worker / "mlm_jax/file").read_text() == content and content in done.stdout
    assert records(tmp_path, "uv") == ["venv", "--quiet", "--python", "3.12", "pip", "install", "--quiet", "-e", ".[tpu,gcs]"] * 2


def test_log_and_stop_reach_the_run(shell, tmp_path):
    (tmp_path / "home/mlm_jax/pod.log").write_text("step 10\n")
    assert "step 10" in shell("--log", "my-pod", "us-central2-b").stdout
    assert shell("--stop", "my-pod", "us-central2-b").stdout == "ended\n"
    assert records(tmp_path, "tmux") == ["kill-session", "-t", "mlm_jax"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "TPU, ZONE and EXPERIMENT are needed, 0 given."),
        (["my-pod", "us-central2-b"], "TPU, ZONE and EXPERIMENT are needed, 2 given."),
        (["--setup", "my-pod", "us-central2-b"], "TPU, ZONE and REPOSITORY are needed, and BRANCH if not main; 2 given."),
        (["--log", "my-pod"], "TPU and ZONE are needed, 1 given."),
        (["--doctor", "my-pod"], "TPU and ZONE are needed, 1 given."),
        (["--set", "my-pod", "us-central2-b", "x.py"], "--set: no such option. Options of mlm-jax go after EXPERIMENT."),
        (["My_Pod", "us-central2-b", "x.py"], "TPU = My_Pod: not a name that a TPU can have (a-z, 0-9 and -)."),
        (["my-pod", "central", "x.py"], "ZONE = central: not a zone. Write, for example, us-central2-b."),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_called(shell, tmp_path, args, line):
    done = shell(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"run_on_pod.sh: {line}\nUsage: ")
    assert records(tmp_path, "gcloud") == []


def test_help_is_an_answer_and_the_script_is_executable(shell):
    done = shell("--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: ") and done.stderr == ""
    assert os.access(SCRIPT, os.X_OK)


def test_every_shell_script_can_be_parsed():
    scripts = [*SCRIPT.parent.glob("*.sh"), SCRIPT.parents[1] / ".ci" / "run"]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
