"""The plan of a train step on TPUs that are not there: the very step that `mlm-jax train` runs, compiled for them by libtpu and read.

Memory is what the compiler asks for. Cycles are its estimates at the clock of the chip; exchanges have none and are priced by bytes over links,
and Pallas kernels have none and are priced by their FLOPs.
"""

import dataclasses
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlm_jax import metrics, objectives, sharding
from mlm_jax.config import Config, InputError, ModelConfig, override
from mlm_jax.model import gpt2
from mlm_jax.plan import communication, hlo
from mlm_jax.plan.price import Budget, budget
from mlm_jax.plan.topology import Topology
from mlm_jax.train import abstract_state, check_batches, lower_step

Build = Callable[[ModelConfig], gpt2.Model]
N_KEPT, N_NAMED = 64, 8  # of the largest arrays: those that a plan has, and those of which is spoken

# The side of a chip's matrix unit, where it is not 128: a product over a head of 64 fills half of one of 128 x 128.
UNIT = {"v6e": 256, "tpu7x": 256}
# How much longer a kernel for attention is estimated to take than its products alone: the softmax between them takes about as long as they do.
SOFTMAX = 2


class Memory(NamedTuple):
    """Bytes on one device. The first four hold between steps, the others within one."""

    parameters: int
    optimizer: int  # moments
    average: int  # of the parameters
    batch: int  # and all else that goes in, with what arrays of the state take more than their numbers, as they are padded to whole tiles
    gradients: int  # those written layer by layer, and those of what is in no block
    activations: int  # kept for the backward pass, layer by layer
    temporaries: int  # all that the compiler needs beside these
    host: int  # temporaries in the host's memory
    usable: int  # what the compiler has

    @property
    def total(self) -> int:
        """All on the device."""
        return sum(self) - self.usable - self.host

    @property
    def over(self) -> int:
        """What is too much; negative: what is free."""
        return self.total - self.usable


class Exchanged(NamedTuple):
    """Exchanges of one kind, from one line, in one phase."""

    kind: str
    source: str
    phase: str
    axes: str  # of the mesh: "fsdp"; "data + fsdp"
    times: int
    bytes: int  # that leave a device in a step
    seconds: float
    hidden: bool  # they go on while other work is done


class Kernel(NamedTuple):
    """A Pallas kernel."""

    name: str
    phase: str
    source: str
    times: int
    flops: float  # on one device in a step; 0: not known


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step needs on one device, and how long it takes."""

    name: str
    topology: Topology
    mesh: dict[str, int]
    batch_size: int
    tokens: int  # of a step
    rows: int  # of a step, on one device
    steps: int
    all_tokens: int  # of all steps; with train.ramp_from less than steps x tokens
    n_params: int
    memory: Memory
    largest: list[tuple[int, str, str, str]]  # bytes, shape, path, line
    cycles: dict[str, dict[str, int]]  # phase -> part -> cycles of one step
    kernels: list[Kernel]
    exchanged: list[Exchanged]
    compute_s: float  # planned cycles, or, where the clock of the chip is not known, the FLOPs of all products but those of attention, at its peak
    kernels_s: tuple[float, float]  # at best, and as estimated
    flops_s: float  # the model's FLOPs at the peak of the devices
    budget: Budget
    versions: dict[str, str]
    compiled_in_s: float

    @property
    def communication_s(self) -> float:
        """All exchanges, one after the other."""
        return sum(one.seconds for one in self.exchanged)

    @property
    def lower_s(self) -> float:
        """Kernels at their best, every exchange beside other work, and those along different axes of the mesh beside each other."""
        axes = {axis for one in self.exchanged for axis in one.axes.split(" + ")}
        along = [sum(one.seconds for one in self.exchanged if axis in one.axes.split(" + ")) for axis in axes]
        return max([self.compute_s + self.kernels_s[0], *along])

    @property
    def step_s(self) -> float:
        """The estimate: exchanges that the compiler starts ahead of their use are hidden as far as there is work, the others are not."""
        work = self.compute_s + self.kernels_s[1]
        hidden = sum(one.seconds for one in self.exchanged if one.hidden)
        return max(work, hidden) + self.communication_s - hidden

    @property
    def upper_s(self) -> float:
        """The same, with no exchange hidden."""
        return self.compute_s + self.kernels_s[1] + self.communication_s

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step of that length."""
        return self.flops_s / seconds

    def to_json(self) -> dict[str, Any]:
        """All of it, as one JSON object."""
        found = dataclasses.asdict(self) | {
            "topology": {
                "name": self.topology.name,
                "accelerator_type": self.topology.accelerator_type,
                "slices": self.topology.slices,
                "chips": self.topology.n_chips,
                "cores": self.topology.n_cores,
                "devices": self.topology.n_devices,
            },
            "fits": True,  # what does not is not planned
            "memory": self.memory._asdict() | {"total": self.memory.total, "over": self.memory.over},
            "largest": [dict(zip(("bytes", "shape", "made_by", "line"), one, strict=True)) for one in self.largest],
            "kernels": [one._asdict() for one in self.kernels],
            "exchanged": [one._asdict() for one in self.exchanged],
            "budget": self.budget._asdict() | {name: getattr(self.budget, name) for name in ("days", "chip_hours", "usd")},
        }
        seconds = {name: getattr(self, name) for name in ("lower_s", "step_s", "upper_s")}
        speeds = {name.replace("_s", "_mfu"): self.mfu(s) for name, s in seconds.items()}
        return found | seconds | speeds | {"communication_s": self.communication_s, "tokens_per_s": self.tokens / self.step_s}


class DoesNotFit(Exception):
    """A step needs more memory than a device has."""

    def __init__(self, need: int, usable: int, largest: list[str]) -> None:
        super().__init__(f"needs {need / 2**30:.2f} GiB on a device that has {usable / 2**30:.2f}: {(need - usable) / 2**30:.2f} GiB too much")
        self.need, self.usable, self.largest = need, usable, largest[:N_NAMED]


def with_vocabulary(config: Config) -> Config:
    """`config` with the vocabulary that its tokenizer will have.

    Raises:
      InputError: that depends on the text.
    """
    if config.model.vocab_size:
        return config
    size = config.data.vocab_size
    if not size:
        remedy = "Set model.vocab_size to what `mlm-jax prepare` found, for example 65"
        raise InputError("model.vocab_size", 0, f"the size of a vocabulary of kind {config.data.tokenizer} depends on the text", remedy)
    return override(config, {"model.vocab_size": size})


def with_slices(config: Config, topology: Topology) -> Config:
    """`config` with as many slices as the topology has, where it does not say how many."""
    return override(config, {"mesh.slices": topology.slices}) if config.mesh.slices == 1 else config


def plan(config: Config, build: Build, topology: Topology, *, usd_per_chip_hour: float | None = None) -> Plan:
    """The plan of the train step of `config` on all devices of `topology`; takes as long as compiling it, about a minute for GPT-2.

    Raises:
      InputError: the mesh does not fit the topology, or the batch the mesh; the price is none; libtpu is not installed.
      DoesNotFit: it needs more memory than a device has.
    """
    all_rows = config.train.rows_before(config.train.steps)
    # A price that is none is refused before a minute of compiling.
    money = budget(topology, 0.0, all_rows / config.train.batch_size, usd_per_chip_hour)
    config = with_slices(with_vocabulary(config), topology)
    devices = topology.devices()
    mesh, model = sharding.make_mesh(config.mesh, devices), build(config.model)
    check_batches(mesh, config)
    documents = objectives.documents_of(config.data, config.model.vocab_size - 1)
    started = time.monotonic()
    with jax.sharding.set_mesh(mesh):
        state = abstract_state(config, model, mesh)
        compiled = compiled_for(topology, lower_step(config, model, mesh, config.train.batch_size, documents), held(state))
    took = time.monotonic() - started
    program = hlo.Program(compiled.as_text() or "")

    memory, largest = _memory(compiled, program, state, topology), program.arrays()[:N_KEPT]
    if memory.over > 0:  # the compiler itself looks at temporaries alone
        named = [f"{shape} ({size / 2**30:.2f} GiB) {name} {line}" for size, shape, name, line in largest]
        raise DoesNotFit(memory.total, memory.usable, named)
    n_params, tokens = gpt2.n_params(state.params), config.train.batch_size * config.model.context_len
    cycles: dict[str, dict[str, int]] = {}
    for (phase, part), n in sorted(program.cycles().items(), key=lambda item: -item[1]):
        cycles.setdefault(phase, {})[part] = n
    clock = topology.chip.clock_hz
    n_rows = config.train.batch_size // math.prod(mesh.shape[axis] for axis in sharding.RULES["B"])
    product = 2 * n_rows * config.model.n_heads // mesh.shape["tensor"] * config.model.context_len**2 * config.model.head_dim / 2
    kernels = _kernels(program, product / config.train.micro_batches)
    at_best = sum(one.flops for one in kernels) / topology.chip.peak_flops / min(1.0, config.model.head_dim / UNIT.get(topology.chip.name, 128))
    flops_s = metrics.flops_per_token(config.model, n_params) * tokens / (topology.chip.peak_flops * mesh.size)
    dense_s = 6 * n_params * tokens / (topology.chip.peak_flops * mesh.size) if kernels else flops_s
    made = Plan(
        name=config.name,
        topology=topology,
        mesh=dict(mesh.shape),
        batch_size=config.train.batch_size,
        tokens=tokens,
        rows=n_rows,
        steps=config.train.steps,
        all_tokens=all_rows * config.model.context_len,
        n_params=n_params,
        memory=memory,
        largest=largest,
        cycles=cycles,
        kernels=kernels,
        exchanged=exchanged(program, mesh, topology),
        compute_s=sum(n for parts in cycles.values() for n in parts.values()) / clock if clock else dense_s,
        kernels_s=(at_best, SOFTMAX * at_best),
        flops_s=flops_s,
        budget=money,
        versions={name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        compiled_in_s=round(took, 1),
    )
    return dataclasses.replace(made, budget=money._replace(step_s=made.step_s))


def compiled_for(topology: Topology, lowered: Any, held: int) -> Any:
    """`lowered`, compiled. `held` is what its arguments take on a device, bytes.

    Raises:
      DoesNotFit: it needs more memory than a device has.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        raise _too_large(str(e), held, topology) or e from e


def _memory(compiled: Any, program: hlo.Program, state: Any, topology: Topology) -> Memory:
    """The memory that the compiler planned, split by what it is for."""
    stats = compiled.memory_analysis()
    parameters, optimizer, average = held(state.params), held(state.opt_state), held(state.average)
    stacked = program.stacked()
    outside = held({name: leaf for name, leaf in state.params.items() if name != "blocks"})
    within = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    activations = min(stacked.get("forward", 0), within)
    gradients = min(stacked.get("backward", 0) + outside, within - activations)
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        batch=stats.argument_size_in_bytes - parameters - optimizer - average,
        gradients=gradients,
        activations=activations,
        temporaries=within - activations - gradients,
        host=stats.host_temp_size_in_bytes,
        usable=int(topology.chip.usable_bytes),
    )


def held(tree: Any) -> int:
    """Bytes of the part of sharded arrays that one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _too_large(message: str, held: int, topology: Topology) -> DoesNotFit | None:
    """What libtpu's error says of memory; None where it is about something else. `held` is what the state takes, bytes.

    It has two forms: with temporaries that are too large alone, and with all together, for which it lists the largest.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    alone = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", message)
    found = alone or re.search(r"Used ([\d.]+)([KMGT]?) of \S+ hbm", message)  # not of vmem or smem, whose size no setting of a run changes
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    largest = [
        f"{shape} ({size}) {hlo.short(name)}".strip()
        for size, name, shape in re.findall(r"Size: (\S+)(?:\s+Operator: op_type=\S* ?op_name=\"([^\"]*)\")?.*?Shape: (\S+?)\{", message, re.DOTALL)
    ]
    need = int(float(found[1]) * units[found[2]]) + (held if alone else 0)
    return DoesNotFit(need, int(topology.chip.usable_bytes), largest)


def exchanged(program: hlo.Program, mesh: jax.sharding.Mesh, topology: Topology) -> list[Exchanged]:
    """The exchanges of a step, those of one kind, line and phase together, the longest first."""
    devices: Sequence[Any] = tuple(mesh.devices.flat)
    found: dict[tuple[str, str, str, str, bool], list[float]] = {}
    for one in program.collectives():
        key = one.kind, one.source, one.phase, _axes(one.groups, mesh), one.hidden
        sums = found.setdefault(key, [0, 0, 0.0])
        sums[0] += one.times
        sums[1] += round(communication.wire_bytes(one) * one.times)
        sums[2] += communication.seconds(one, devices, topology)
    rows = [Exchanged(kind, source, phase, axes, int(n), int(size), s, hidden) for (kind, source, phase, axes, hidden), (n, size, s) in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _axes(groups: tuple[tuple[int, ...], ...], mesh: jax.sharding.Mesh) -> str:
    """The axes of the mesh along which the devices of a group differ."""
    if not groups:
        return ""
    places = [np.unravel_index(device, mesh.devices.shape) for device in groups[0]]
    return " + ".join(name for k, name in enumerate(mesh.shape) if len({place[k] for place in places}) > 1)


def _kernels(program: hlo.Program, product: float) -> list[Kernel]:
    """The Pallas kernels of a step. `product` is what one product of attention takes in one execution on one device, half a square of T x T: FLOPs.

    A kernel for attention has two of them forward, and backward five where it gives all gradients; where the gradient of the queries has a kernel
    of its own, that has three, and the other, which computes scores and their gradient again, four.

    Source: Dao et al. 2022 (FlashAttention), algorithms 1 and 4; the kernels' code, jax/experimental/pallas/ops/tpu.
    """
    found = program.kernels()
    apart = any("_dq" in name for name, _, _ in found)

    def products(name: str, phase: str) -> int:
        if not re.search("splash|flash|attention|mha", name):
            return 0
        if phase != "backward":
            return 2
        return (3 if "_dq" in name else 4) if apart else 5

    return [Kernel(name, phase, source, times, times * products(name, phase) * product) for (name, phase, source), times in found.items()]
