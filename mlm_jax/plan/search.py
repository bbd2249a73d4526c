"""Which settings of a run do best on a slice: each is compiled, what does not fit is dropped, and the rest is ranked by the estimate of its step.

What may change is what changes no number that a run writes beyond rounding: the mesh, what is computed again, into how many parts the batch and
the loss are cut, and how attention is computed. The search goes along one of these at a time from the best so far, until none gets better.
"""

import concurrent.futures.process
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlm_jax
from mlm_jax import storage
from mlm_jax.config import Config, InputError, override, to_json
from mlm_jax.data import executor
from mlm_jax.plan import topology as topologies
from mlm_jax.plan.topology import Topology

Changes = Mapping[str, Any]
Attempt = Callable[[Sequence[Changes]], list["Found"]]
REMATS = ("none", "attention", "dots", "full")  # not offload: how long arrays take to the host and back is not priced
ATTENTIONS = ("splash", "flash", "blocked")
CHUNKS = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8, 16)
GIB_EACH = 4  # of memory, that compiling a step of GPT-2 takes


class Ended(Exception):
    """A process that compiled was ended from outside."""


class Found(NamedTuple):
    """What became of a setting."""

    changes: dict[str, Any]
    step_s: float | None  # None: it does not fit, or cannot be compiled
    reason: str  # why
    gib: float  # on one device; 0 where it cannot be compiled

    @property
    def cost(self) -> str:
        """The step and the memory, or why there are none."""
        return f"{self.step_s * 1e3:.1f} ms a step, {self.gib:.2f} GiB" if self.step_s is not None else self.reason

    def __str__(self) -> str:
        return f"{self.cost}: {' '.join(settings(self.changes)) or 'as it is'}"


def settings(changes: Changes) -> list[str]:
    """The changes as `--set` flags."""
    return [f"--set {path}={value}" for path, value in changes.items()]


def sizes(config: Config, topology: Topology) -> dict[str, int]:
    """The mesh of `config` in one slice, with what -1 stands for there."""
    asked = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor", "context")}
    rest = topology.n_devices // topology.slices // math.prod(size for size in asked.values() if size != -1)
    return {axis: max(rest, 1) if size == -1 else size for axis, size in asked.items()}


def meshes(config: Config, topology: Topology) -> list[dict[str, int]]:
    """The meshes of data and FSDP, and of tensors in two or as in `config`, that the axes and the batch can be split over, beside what positions
    are split over: those that split parameters least first."""
    n, m, now = topology.n_devices // topology.slices, config.model, sizes(config, topology)
    n //= now["context"]
    found = []
    for tensor, fsdp in itertools.product(sorted({1, 2, now["tensor"]}), (f for f in range(1, n + 1) if n % f == 0)):
        legal = m.d_model % fsdp == 0 and m.n_heads % tensor == 0 and m.n_keys % tensor == 0 and m.d_ff % tensor == 0
        if n % (fsdp * tensor) == 0 and legal and config.train.batch_size % (n // tensor * topology.slices) == 0:
            found.append({"mesh.data": n // fsdp // tensor, "mesh.fsdp": fsdp, "mesh.tensor": tensor})
    return found


def parts(config: Config, topology: Topology) -> list[int]:
    """Into how many micro-batches a batch can be cut."""
    now = sizes(config, topology)
    rows = config.train.batch_size // (now["data"] * now["fsdp"] * topology.slices)
    return [k for k in MICRO_BATCHES if rows % k == 0 and config.train.batch_size % k == 0]


# What the search chooses from, one after the other, given the best configuration so far.


def splits(config: Config, topology: Topology) -> list[dict[str, Any]]:
    """Meshes: every way to share out data and parameters; tensors are split beside the one that is the best so far."""
    fsdp = sizes(config, topology)["fsdp"]
    return [mesh for mesh in meshes(config, topology) if mesh["mesh.tensor"] == 1 or mesh["mesh.fsdp"] == fsdp]


def recomputed(config: Config, topology: Topology) -> list[dict[str, Any]]:
    """What is computed again, and into how many parts a batch is cut: two ways to pay for memory."""
    return [{"model.remat": name, "train.micro_batches": k} for name in REMATS for k in parts(config, topology)]


def attentions(config: Config, topology: Topology) -> list[dict[str, Any]]:
    """Kernels."""
    return [{"model.attention": name} for name in ATTENTIONS]


def chunks(config: Config, topology: Topology) -> list[dict[str, Any]]:
    """Parts of the loss."""
    return [{"train.loss_chunks": k} for k in CHUNKS if config.model.context_len % k == 0]


def frugal(config: Config, topology: Topology) -> dict[str, Any]:
    """All that saves memory."""
    mesh = (meshes(config, topology) or [{}])[-1]
    chunked = chunks(config, topology)[-1]
    cut = {"train.micro_batches": (parts(override(config, mesh), topology) or [1])[-1]}
    return {"model.remat": "full", "model.attention": "splash", **chunked, **cut, **mesh}


CHOICES = (splits, recomputed, attentions, chunks)


def search(config: Config, topology: Topology, attempt: Attempt, *, say: Callable[[str], None] = lambda line: None) -> list[Found]:
    """All settings that were tried, the best first, those that do not fit last.

    From one that fits: the given one, or the frugal one, all that saves memory.

    Raises:
      InputError: neither fits, or neither can be compiled.
    """
    tried: dict[str, Found] = {}

    def look(several: Iterable[Changes]) -> list[Found]:
        new = {_key(changed, topology): needed(config, changes) for changes in several if (changed := _changed(config, changes)) is not None}
        asked = {key: changes for key, changes in new.items() if key not in tried}
        for key, found in zip(asked, attempt(list(asked.values())), strict=True):
            tried[key] = found
            say(str(found))
        return [tried[key] for key in new]

    saving = frugal(config, topology)
    first = look([{}, saving])
    start = [found for found in first if found.step_s is not None]
    if not start and not any(found.gib for found in first):
        raise InputError("--search", "", f"nothing can be compiled: {first[0].reason.rstrip('.')}", "Mend that first")
    if not start:
        reason = f"neither as it is nor with {' '.join(settings(saving))} does it fit {topology.name}"
        raise InputError("--search", "", reason, "Take a larger slice or a smaller batch")
    best, before = min(start, key=_seconds), None
    while before != best:
        before = best
        for choice in CHOICES:
            options = choice(override(config, best.changes), topology)
            best = min([best, *look(best.changes | option for option in options)], key=_seconds)
    return sorted(tried.values(), key=_seconds)


def remedies(config: Config, topology: Topology, attempt: Attempt, *, n: int = 3) -> list[Found]:
    """The cheapest changes with which `config` fits, at most `n`, by the estimate of the step; several at once where one is not enough."""
    now = sizes(config, topology)
    finer = [mesh for mesh in meshes(config, topology) if mesh["mesh.fsdp"] > now["fsdp"] and mesh["mesh.tensor"] == now["tensor"]]
    split = [finer[0], finer[-1]] if finer else []
    more = [{"train.micro_batches": k} for k in parts(config, topology) if k > config.train.micro_batches]
    saving = {"model.remat": "full", **chunks(config, topology)[-1]}
    rounds: list[list[dict[str, Any]]] = [
        [{path: value} for path, value in saving.items()] + [{"model.remat": "attention"}, {"model.attention": "splash"}, *more[:1], *split],
        [saving, *(saving | one for one in more[:1])],
        [saving | one for one in split],
        [saving | one for one in more[1:]],
        [saving | one | mesh for one in more for mesh in split],
    ]
    seen, fitting = [config], list[Found]()
    for several in rounds:
        new = []
        for changes in several if len(fitting) < n else []:
            if (changed := _changed(config, changes)) is not None and changed not in seen:
                seen.append(changed)
                new.append(needed(config, changes))
        fitting += [found for found in attempt(new) if found.step_s is not None]
    return sorted(fitting, key=_seconds)[:n]


def _seconds(found: Found) -> float:
    return float("inf") if found.step_s is None else found.step_s


def _changed(config: Config, changes: Changes) -> Config | None:
    """`config` with `changes`; None where it allows of no such change."""
    try:
        return override(config, changes)
    except InputError:
        return None


def needed(config: Config, changes: Changes) -> dict[str, Any]:
    """Those of `changes` that change `config`."""
    return {path: value for path, value in changes.items() if _changed(config, {path: value}) != config}


def _key(config: Config, topology: Topology) -> str:
    """The same for configurations that are the same there."""
    return to_json(override(config, {f"mesh.{axis}": size for axis, size in sizes(config, topology).items()}))


# ---- compiling, in parallel, and once ----


def attempts(reference: str, given: Changes, topology: str, slices: int, cache: Path) -> Attempt:
    """What plans the experiment `reference` with `given` and other changes, as many at a time as the machine has cores and memory for, and keeps
    what it finds in the folder `cache`. It raises Ended where one of its processes is."""

    def run(several: Sequence[Changes]) -> list[Found]:
        if not several:
            return []
        n = max(1, min(executor.cores(), len(several), _free_gib() // GIB_EACH))
        jobs = [(reference, {**given, **changes}, topology, slices, cache) for changes in several]
        with concurrent.futures.ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            try:
                return [Found(dict(changes), *found) for changes, found in zip(several, pool.map(_planned, jobs), strict=True)]
            except concurrent.futures.process.BrokenProcessPool as e:
                reason = "a process that compiled was ended from outside, perhaps for want of memory"
                raise Ended(f"{reason}; what was done is kept in {cache}, and the same command goes on") from e

    return run


def _planned(job: tuple[str, dict[str, Any], str, int, Path]) -> tuple[float | None, str, float]:
    """(seconds of a step, why there are none, GiB a device) of one job, in a process of its own."""
    from mlm_jax import experiment
    from mlm_jax.plan import tpu

    reference, changes, name, slices, cache = job
    topology = topologies.parse(name, slices)
    try:
        loaded = experiment.load(reference).with_changes(changes)
        kept = cache / f"{fingerprint(loaded.config, loaded.files, topology)}.json"
        if kept.is_file():
            return tuple(json.loads(kept.read_text("utf-8")))
        made = tpu.plan(loaded.config, loaded.build, topology)
        found = made.step_s, "", made.memory.total / 2**30
    except InputError as e:
        return None, str(e), 0.0
    except tpu.DoesNotFit as e:
        found = None, str(e), e.need / 2**30
    except Exception as e:  # one that the compiler fails on, a kernel for too small a head, say: the others may do
        return None, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}", 0.0
    cache.mkdir(parents=True, exist_ok=True)
    storage.write_text(kept, json.dumps(found))
    return found


def fingerprint(config: Config, files: Mapping[str, Any], topology: Topology) -> str:
    """What a plan depends on: the settings, the experiment's code and ours, the slice, and the versions and flags of what compiles it."""
    compilers = {"jax", "jaxlib", "libtpu", "flax", "optax"}
    versions = sorted((one.name, one.version) for one in importlib.metadata.distributions() if one.name in compilers)
    code = [file.sha256 for file in files.values()]
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    text = to_json(override(config, {"name": "plan"})), code, _own_code(), topology.name, topology.slices, versions, flags, sys.version_info[:2]
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:32]


@functools.cache
def _own_code() -> str:
    """A hash of the package's own code."""
    root = Path(mlm_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _free_gib() -> int:
    """Memory of this machine that nothing uses, in GiB; much, where it does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) >> 20
    except (OSError, KeyError, ValueError):
        return 1 << 20
