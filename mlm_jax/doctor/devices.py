"""The devices: how many there are and, by what the cloud says of a TPU, should be, whether what is compiled for them is kept, and whether they
compute right.

JAX is imported by the checks that need it, as it may be broken.
"""

import contextlib
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_jax import storage
from mlm_jax.chips import CHIPS
from mlm_jax.doctor.findings import FAILED, OK, REMEDIES, WARNING, Finding
from mlm_jax.doctor.machine import notebook
from mlm_jax.doctor.packages import installed, pip
from mlm_jax.doctor.tpu import tpus

COLLECTIVE_BYTES = 16 << 20  # that each device contributes


class Summary(NamedTuple):
    """The devices of one process, and what it has but JAX does not use."""

    platform: str
    kind: str
    here: int
    everywhere: int
    expected: int | None  # in all, by what the cloud says of the machine
    unused: str


def summary() -> Summary | str:
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
    with contextlib.suppress(Exception):  # nobody answers for the metadata, or in words that JAX does not know: then it is not told
        if cloud.GceTpuCluster.is_env_present():
            workers = cloud.GceTpuCluster._get_worker_list_in_slice()
            kind = kind or cloud.get_tpu_env_value_from_metadata("ACCELERATOR_TYPE")
            slices = slices or cloud.get_tpu_env_value_from_metadata("MEGASCALE_NUM_SLICES")
    with contextlib.suppress(Exception):
        if workers == [""] and cloud.GkeTpuCluster.is_env_present():
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
