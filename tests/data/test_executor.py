"""Tasks run in any number of processes, on Ray and through Slurm's sbatch; what is done is done once."""

import dataclasses
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from mlm_jax.config import DataConfig, InputError
from mlm_jax.data.executor import Executor, TaskFailed


@dataclasses.dataclass(frozen=True)
class Write:
    """A step that writes its number and its process."""

    folder: Path

    def __call__(self, data, task, n_tasks):
        with (self.folder / f"{task}.txt").open("a") as file:
            file.write(f"{task} of {n_tasks} by {os.getpid()}\n")


@dataclasses.dataclass(frozen=True)
class Fail:
    """A step that fails in task 2 so many times."""

    folder: Path
    times: int = 1
    how: str = "raise"

    def __call__(self, data, task, n_tasks):
        failed = len(list(self.folder.glob("failure*")))
        if task == 2 and failed < self.times:
            (self.folder / f"failure{failed}").touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("by zero")


@dataclasses.dataclass(frozen=True)
class Refuse:
    def __call__(self, data, task, n_tasks):
        raise InputError("data.source", "a.txt", "is bad", "Name another")


def written(folder: Path) -> dict[int, list[str]]:
    return {int(path.stem): path.read_text().splitlines() for path in folder.glob("*.txt")}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_runs_once_and_what_is_done_is_told(tmp_path, workers):
    told: list[int] = []
    with Executor(DataConfig(workers=workers), tmp_path) as executor:
        executor.run("write", [Write(tmp_path)], 5, told.append)
        executor.run("write", [Write(tmp_path)], 5)
    lines = written(tmp_path)
    assert [len(lines[task]) for task in range(5)] == [1] * 5
    assert told == [0, 1, 2, 3, 4, 5, 5]
    processes = {line[0].rpartition(" ")[2] for line in lines.values()}
    assert (processes == {str(os.getpid())}) == (workers == 1)


def test_a_task_that_failed_is_tried_once_more(tmp_path):
    with Executor(DataConfig(workers=2), tmp_path) as executor:
        executor.run("write", [Fail(tmp_path), Write(tmp_path)], 5)
    assert [len(lines) for _, lines in sorted(written(tmp_path).items())] == [1] * 5


def test_a_process_that_is_killed_takes_no_other_task_along(tmp_path):
    with Executor(DataConfig(workers=2), tmp_path) as executor:
        executor.run("write", [Fail(tmp_path, how="kill"), Write(tmp_path)], 8)
    assert sorted(written(tmp_path)) == list(range(8))


def test_a_task_that_kills_its_process_each_time_is_the_only_one_that_is_not_done(tmp_path):
    with Executor(DataConfig(workers=2), tmp_path) as executor, pytest.raises(TaskFailed, match=r"task 2 of 8 failed twice.*ended without a word"):
        executor.run("write", [Fail(tmp_path, times=9, how="kill"), Write(tmp_path)], 8)
    assert sorted(written(tmp_path)) == [0, 1, 3, 4, 5, 6, 7]
    assert len(list(tmp_path.glob("failure*"))) == 2


def test_a_task_that_fails_twice_ends_the_work_and_the_next_start_does_it_alone(tmp_path):
    with Executor(DataConfig(workers=1), tmp_path) as executor, pytest.raises(TaskFailed, match=r"write: task 2 of 4 failed twice.*ZeroDivision"):
        executor.run("write", [Fail(tmp_path, times=2), Write(tmp_path)], 4)
    assert sorted(written(tmp_path)) == [0, 1, 3]
    with Executor(DataConfig(workers=1), tmp_path) as executor:
        executor.run("write", [Write(tmp_path)], 4)
    assert [len(lines) for _, lines in sorted(written(tmp_path).items())] == [1, 1, 1, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_ends_the_work_with_its_own_line(tmp_path, workers):
    with (
        Executor(DataConfig(workers=workers), tmp_path) as executor,
        pytest.raises(InputError, match=r"data\.source = a\.txt: is bad\. Name another"),
    ):
        executor.run("refuse", [Refuse()], 3)


SBATCH = """#!{python}
# A stand-in for Slurm's sbatch: runs the script once for each number of its array, one after the other.
import os, re, subprocess, sys
text = open(sys.argv[-1]).read() if os.path.isfile(sys.argv[-1]) else sys.stdin.read()
array = re.search(r"--array=(\\d+)-(\\d+)", text)
failed = 0
for task in range(int(array[1]), int(array[2]) + 1) if "launch_pickled_pipeline" in text else ():
    env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="localhost")
    failed |= subprocess.run(["bash", "-s"], input=text, text=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print("Submitted batch job 7")
open(os.environ["SBATCH_LOG"], "a").write(text)
sys.exit(bool(failed))
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts commands sbatch, srun and scontrol on PATH."""
    (folder / "bin").mkdir()
    for name, text in (
        ("sbatch", SBATCH.format(python=sys.executable)),
        ("srun", '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'),
        ("scontrol", "#!/bin/bash\necho localhost\n"),
    ):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]))
    monkeypatch.setenv("SBATCH_LOG", str(folder / "log"))
    return folder / "log"


def test_slurm_gets_one_array_of_the_tasks_that_are_to_be_done(tmp_path, monkeypatch):
    log = stand_in(tmp_path, monkeypatch)
    config = DataConfig(executor="slurm", slurm_partition="cpu", slurm_time="01:00:00", workers=3)
    (tmp_path / "done" / "count").mkdir(parents=True)
    (tmp_path / "done" / "count" / "0").touch()
    with Executor(config, tmp_path) as executor:
        executor.run("count", [print], 3)
    assert sorted(path.name for path in (tmp_path / "done" / "count").iterdir()) == ["0", "1", "2"]
    script = log.read_text()
    assert re.search(r"#SBATCH --partition=cpu\n", script)
    assert re.search(r"#SBATCH --array=0-1%3\n", script)
    assert re.search(r"#SBATCH --wait\n", script)


def test_slurm_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with Executor(DataConfig(executor="slurm", slurm_partition="cpu"), tmp_path) as executor, pytest.raises(InputError, match="sbatch is not there"):
        executor.run("count", [print], 3)
