"""Independent tasks, many at a time: in processes of this machine, on Ray, or through datatrove on Slurm."""

import concurrent.futures
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import secrets
import subprocess
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from mlm_jax import storage
from mlm_jax.config import DataConfig, InputError

Step = Callable[[Any, int, int], Any]  # as datatrove has them: (what the step before gave, number of the task, number of tasks)


class TaskFailed(RuntimeError):
    """A task failed, and failed again when it was tried once more; what the others did is kept."""


class Executor:
    """Runs tasks as `config` says (executor, workers), and keeps in `folder` which are done. A context: its processes end with it."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._stack = contextlib.ExitStack()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._run_all = {"local": self._on_this_machine, "ray": self._on_ray, "slurm": self._on_slurm}[config.executor]

    def __enter__(self) -> "Executor":
        library = {"local": "", "ray": "ray", "slurm": "datatrove"}[self._config.executor]
        if library and importlib.util.find_spec(library) is None:
            remedy = f'pip install "mlm_jax[data{",ray" if library == "ray" else ""}]"'
            raise InputError("data.executor", self._config.executor, f"needs {library}, which is not installed", remedy)
        return self

    def __exit__(self, *what: object) -> None:
        self._close()
        self._stack.close()

    def run(self, name: str, steps: Sequence[Step], n_tasks: int, done: Callable[[int], None] = lambda n: None) -> None:
        """Puts each of `n_tasks` tasks through the steps, but for those that were done before; `done` is told how many are.

        A task that fails, or whose process is gone, is tried once more when all others are done: on this machine nothing runs beside it then.

        Raises:
          InputError: a task raised it.
          TaskFailed: a task failed twice.
        """
        marks = self._folder / "done" / name
        marks.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            todo = tuple(task for task in range(n_tasks) if not (marks / str(task)).exists())
            done(n_tasks - len(todo))
            if not todo:
                return
            for path in [*marks.glob("*.failed"), *marks.glob("*.begun")]:
                path.unlink()
            self._run_all(name, Task(tuple(steps), n_tasks, todo, marks, alone=attempt == 2), done)
            failed = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(marks.glob("*.failed"))]
            for fields in (failure["input"] for failure in failed if "input" in failure):
                raise InputError(*fields)
            missing = [task for task in todo if not (marks / str(task)).exists()]
            if missing and attempt == 2:
                reason = failed[0]["failed"] if failed else "Its process ended without a word, perhaps for want of memory"
                others = f" and {len(missing) - 1} more" if missing[1:] else ""
                raise TaskFailed(
                    f"{name}: task {missing[0]} of {n_tasks}{others} failed twice; the rest is done and kept for the next start. {reason}"
                )

    def _on_this_machine(self, name: str, work: "Task", done: Callable[[int], None]) -> None:
        n, before = len(work.todo), work.n_tasks - len(work.todo)
        workers = 1 if work.alone else min(self._config.workers or cores(), n)
        if self._config.workers == 1 or (workers == 1 and not work.alone):
            for rank in range(n):
                work(None, rank, n)
                done(before + rank + 1)
            return
        left = list(range(n))
        while left:  # a process that is killed takes those beside it along
            pool = self._processes(workers)
            futures = {pool.submit(work, None, rank, n): rank for rank in (left[:1] if work.alone else left)}
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    left.remove(futures[future])
                    done(before + n - len(left))
            except BrokenProcessPool:
                self._close()
                left = [rank for rank in left if not work.has_begun(rank)]
        if work.alone:
            self._close()

    def _processes(self, workers: int) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            # Spawned: a process with JAX's threads does not survive a fork.
            self._pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _on_ray(self, name: str, work: "Task", done: Callable[[int], None]) -> None:
        import ray
        import ray.exceptions

        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            ray.init(address=address, num_cpus=None if address else self._config.workers or None, log_to_driver=False, include_dashboard=False)
            self._stack.callback(ray.shutdown)
        n, before = len(work.todo), work.n_tasks - len(work.todo)
        call, shared = ray.remote(num_cpus=1, max_retries=0)(_call), ray.put(work)
        left = [call.remote(shared, rank, n, os.getcwd()) for rank in range(n)]
        while left:
            ended, left = ray.wait(left)
            with contextlib.suppress(ray.exceptions.RayError):  # its process is gone: its task is not marked
                ray.get(ended)
            done(before + n - len(left))

    def _on_slurm(self, name: str, work: "Task", done: Callable[[int], None]) -> None:
        c, environment = self._config, os.environ.get("VIRTUAL_ENV")
        executor = _datatrove().SlurmPipelineExecutor(
            [work],
            tasks=len(work.todo),
            workers=c.workers or -1,
            time=c.slurm_time,
            partition=c.slurm_partition,
            job_name=f"mlm_jax_{name.replace(' ', '_')}",
            logging_dir=str(self._folder / "logs" / f"{name}-{secrets.token_hex(4)}"),  # it keeps marks of its own there
            venv_path=f"{environment}/bin/activate" if environment else None,
            sbatch_args={"wait": ""},  # sbatch returns when the jobs have ended
        )
        try:
            executor.run()
        except FileNotFoundError as e:
            raise InputError("data.executor", "slurm", f"{e.filename} is not there", "Start this on a machine that submits jobs to Slurm") from e
        except subprocess.CalledProcessError:  # a job failed: which task it was, their marks tell
            return


class Task:
    """A task by its place among those that are to be done; a mark in a folder says that it is done, or why it failed."""

    def __init__(self, steps: tuple[Step, ...], n_tasks: int, todo: tuple[int, ...], marks: Path, *, alone: bool) -> None:
        """`alone`: no other task may run at the same time on this machine."""
        self.steps, self.n_tasks, self.todo, self.marks, self.alone = steps, n_tasks, todo, marks.absolute(), alone

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        task = self.todo[rank]
        (self.marks / f"{task}.begun").touch()
        try:
            with _quiet() if any(type(step).__module__.startswith("datatrove.") for step in self.steps) else contextlib.nullcontext():
                for step in self.steps:
                    data = step(data, task, self.n_tasks)
                if isinstance(data, Iterable):
                    deque(data, maxlen=0)
            (self.marks / str(task)).touch()
            (self.marks / f"{task}.begun").unlink()
        except InputError as e:
            self._fail(task, input=[e.field, str(e.value), e.reason, e.remedy])
        except Exception as e:  # whatever it is: the other tasks go on
            where = traceback.extract_tb(e.__traceback__)[-1]
            reason = f"{type(e).__name__}: {storage.first_line(e)} ({Path(where.filename).name}:{where.lineno})"
            self._fail(task, failed=reason, traceback=traceback.format_exc())

    def has_begun(self, rank: int) -> bool:
        return (self.marks / f"{self.todo[rank]}.begun").exists()

    def _fail(self, task: int, **what: Any) -> None:
        (self.marks / f"{task}.failed").write_text(json.dumps(what), encoding="utf-8")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _call(work: Task, rank: int, n: int, folder: str) -> None:
    os.chdir(folder)  # sources may be named from there
    work(None, rank, n)


def _datatrove() -> Any:
    import datatrove.executor

    _be_quiet()
    return datatrove.executor


def _be_quiet() -> None:
    """datatrove prints every step of every task."""
    from loguru import logger

    logger.disable("datatrove")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """As `_be_quiet`, and without its progress bars."""
    _be_quiet()
    with contextlib.redirect_stderr(io.StringIO()):
        yield
