"""Reads the text of a program that was compiled for a TPU: what it is planned to do, how often, and which line of the model asked for it.

What is in a loop counts as often as the loop goes round. Cycles are the compiler's own estimates, which neither Pallas kernels nor exchanges
between devices have.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_jax.plan.communication import Collective

INSTRUCTION = re.compile(r"(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")  # a layout has no space, so a type that is no tuple is a word
ARRAY = re.compile(r"\b([a-z]+\d+(?:e\dm\d\w*)?|pred)\[([\d,]*)\](\{[^}]*\})?")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # of the others the number in their name
KERNEL = "tpu_custom_call"
ALLOCATED = "AllocateBuffer"  # what others write into: one of these is the array's maker
VIEWS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "constant", "conditional", "call"}  # make no array of their own
BETWEEN = ("sharding.py", "int8.py", "low_precision.py")  # what a line of the model calls to have a product or an exchange made


class Instruction(NamedTuple):
    """One line of a program."""

    root: bool
    name: str
    type: str
    op: str
    operands: list[str]
    text: str

    def attribute(self, key: str) -> str:
        """What stands behind `key` = in the text; "" where nothing does."""
        found = re.search(rf'\b{key}"?[=:]"?%?([\w.\-]+)', self.text)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """The path of what was traced: "jit(train_step)/jvp(GPT2)/while/body/.../blocks/mlp/BTD,DF->BTF/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution; None where it has none."""
        found = self.attribute("estimated_cycles")
        return int(found) if found.isdigit() and int(found) < 2**62 else None  # beyond: unknown

    @property
    def collective(self) -> str:
        """The kind of exchange that this begins; "" where it is none, or what ends one."""
        kind = self.op.removesuffix("-start")
        return kind if kind in COLLECTIVES else ""


Computation = dict[str, Instruction]


class Executed(NamedTuple):
    """An instruction that a device executes `times` times."""

    instruction: Instruction
    around: Computation
    times: int


def array_bytes(type_: str) -> int:
    """Bytes of all arrays of a type in memory: of "(bf16[8,4]{1,0}, f32[2])" 72; those in on-chip or host memory, S(1) and beyond, count too."""
    return sum(math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8 for dtype, dims, _ in ARRAY.findall(type_))


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])


class Program:
    """A compiled program. A loop that ends by what it computes is taken to go round `uncounted` times, where that is given."""

    def __init__(self, text: str, *, uncounted: int | None = None) -> None:
        self._uncounted = uncounted
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text, re.MULTILINE)
        self.n_devices = int(partitions[1]) if partitions else 1
        self._tables: dict[str, dict[int, str]] = {name: {} for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")}
        inside, table, last = None, None, None
        for line in text.splitlines():
            if line in self._tables:
                table = self._tables[line]
            elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
                table[int(row[1])] = row[2].strip('"')
            elif head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                inside = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif inside is not None and (one := INSTRUCTION.match(re.sub(r"/\*index=\d+\*/", "", line.strip()))):
                root, name, kind, op, rest = one.groups()
                last = Instruction(bool(root), name, kind, op, re.findall(r"%([\w.\-]+)", rest.split("), ")[0]), line)
                inside[name] = last
            elif inside is not None and last and line.strip() not in ("", "}"):  # the text of a Pallas kernel goes on
                last = last._replace(text=last.text + line)
                inside[last.name] = last

    @functools.cached_property
    def executed(self) -> list[Executed]:
        """Every instruction outside of fusions, with how often it is executed.

        Raises:
          ValueError: a loop does not count from a constant to a constant, and nothing was said of such loops.
        """
        return list(self._visit(self.entry, 1))

    def _visit(self, name: str, times: int) -> Iterator[Executed]:
        around = self.computations[name]
        for one in around.values():
            yield Executed(one, around, times)
            if one.op == "while":
                yield from self._visit(one.attribute("body"), times * self.trips(around, one))
            elif one.op in ("call", "async-start"):
                yield from self._visit(one.attribute("to_apply") or one.attribute("calls"), times)
            elif one.op == "conditional":  # the branch with the most cycles
                branches = re.findall(r"%([\w.\-]+)", re.sub(r".*(?:branch_computations=\{|true_computation=)", "", one.text))
                taken = [list(self._visit(branch, times)) for branch in branches if branch in self.computations]
                yield from max(taken, key=lambda found: sum(e.instruction.cycles or 0 for e in found), default=[])

    def trips(self, around: Computation, loop: Instruction) -> int:
        """How often `loop`, of the computation `around`, goes round: from its condition (below a constant), step and start.

        Raises:
          ValueError: it does not count so, and nothing was said of such loops.
        """
        try:
            return self._counted(around, loop)
        except ValueError:
            if self._uncounted is None:
                raise
            return self._uncounted

    def _counted(self, around: Computation, loop: Instruction) -> int:
        condition, body = self.computations[loop.attribute("condition")], self.computations[loop.attribute("body")]
        test = next(one for one in condition.values() if one.root)
        counter, limit = condition.get(test.operands[0]), _constant(condition, test.operands[1]) if len(test.operands) == 2 else None
        if test.op != "compare" or test.attribute("direction") != "LT" or counter is None or counter.op != "get-tuple-element" or limit is None:
            raise ValueError(f"a loop that is not counted: {test.text}")
        k, step = int(counter.attribute("index")), 0
        start = _constant(around, around[loop.operands[0]].operands[k])
        name = next(one for one in body.values() if one.root).operands[k]
        while (one := body.get(name)) is not None and one.op in ("add", "copy", "bitcast"):
            added = [_constant(body, operand) for operand in one.operands]
            step += sum(n for n in added if n is not None)
            name = next(operand for operand, n in zip(one.operands, added, strict=True) if n is None)
        if not step or start is None:
            raise ValueError(f"a loop from {start} in steps of {step}: {loop.text}")
        return max(math.ceil((limit - start) / step), 0)

    def line(self, one: Instruction) -> str:
        """The line that asked for `one`, "mlm_jax/model/gpt2.py:88": the innermost of the model or the experiment; "" where none is known."""
        frame = int(one.attribute("stack_frame_id") or 0)
        while frame in self._tables["StackFrames"]:
            location, parent = (int(n) for n in re.findall(r"=(\d+)", self._tables["StackFrames"][frame]))
            file, _, line = re.findall(r"=(\d+)", self._tables["FileLocations"].get(location, "=0 =0 =0"))[:3]
            path = Path(self._tables["FileNames"].get(int(file), ""))
            if path.name and "site-packages" not in path.parts and path.name not in BETWEEN:
                return f"{'/'.join(path.parts[_root(path) :])}:{line}"
            frame = parent - 1  # the tables count parents from 1, with 1 for none
        return ""

    def cycles(self) -> dict[tuple[str, str], int]:
        """Estimated cycles by (phase, part)."""
        found: collections.Counter[tuple[str, str]] = collections.Counter()
        for one, _, times in self.executed:
            if (n := one.cycles) is not None and not one.collective:
                found[phase(one.op_name), part(one.op_name)] += n * times
        return dict(found)

    def kernels(self) -> dict[tuple[str, str, str], int]:
        """How often each Pallas kernel is executed, by (name, phase, line); they have no estimate."""
        found: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for one, _, times in self.executed:
            if one.attribute("custom_call_target") == KERNEL:
                name = one.attribute("kernel_name") or re.sub(r"[.\d]+$", "", one.name)
                found[name, phase(one.op_name), self.line(one)] += times
        return dict(found)

    def products(self) -> dict[str, int]:
        """Estimated cycles of the instructions that multiply matrices, by the types of both: {"bf16 x bf16": ...}."""
        found: collections.Counter[str] = collections.Counter()

        def types(around: Computation, one: Instruction) -> list[str]:
            if one.op in ("convolution", "dot"):
                return [" x ".join(around[name].type.split("[")[0] for name in one.operands)]
            inside = self.computations.get(one.attribute("calls"), {}) if one.op == "fusion" else {}
            return [kinds for inner in inside.values() for kinds in types(inside, inner)]

        for one, around, times in self.executed:
            for kinds in types(around, one)[:1] if one.cycles is not None else []:
                found[kinds] += (one.cycles or 0) * times
        return dict(found)

    def collectives(self) -> list[Collective]:
        """Every exchange between devices, once each."""
        found = []
        for executed in self.executed:
            for one, around, hidden in self._exchanges(executed):
                sent = sum(array_bytes(around[name].type) for name in one.operands if name in around)
                together = groups(one.text, self.n_devices)
                n = len(together[0]) if together else 1
                origins = _origins(one, around) or _origins(executed.instruction, executed.around)
                op_name = next((origin.op_name for origin in origins), "")
                found.append(
                    Collective(
                        kind=one.collective,
                        times=executed.times,
                        bytes=sent * n if one.collective == "all-gather" else sent,
                        groups=together,
                        source=" ".join(dict.fromkeys(line for origin in origins if (line := self.line(origin)))),
                        phase=phase(op_name) if op_name else usual_phase(executed.around),
                        hidden=hidden,
                    )
                )
        return found

    def _exchanges(self, executed: Executed) -> Iterator[tuple[Instruction, Computation, bool]]:
        """The exchanges that an instruction begins, itself or in the fusion that it is, and whether they end elsewhere."""
        one, around, _ = executed
        if one.collective:
            yield one, around, one.op.endswith("-start")
        elif one.op == "send" and (kind := one.attribute("_xla_megascale_transfer_type")):  # between slices, by way of their hosts
            yield one._replace(op=kind.lower().replace("_", "-")), around, True
        elif one.op == "fusion":
            inside = self.computations.get(one.attribute("calls"), {})
            exchanges = [inner for inner in inside.values() if inner.collective]
            if "AllReduceScatterFusion" in one.text:  # what libtpu makes of a reduce-scatter: an all-reduce of which each keeps its part
                exchanges = [inner._replace(op="reduce-scatter") if inner.op == "all-reduce" else inner for inner in exchanges]
            targets = {inner.attribute("custom_call_target") for inner in inside.values()}
            # It is written where it starts, in each fusion beside whose work it goes on, and where it ends. Its channel does not tell them: all
            # exchanges of shard_map are on channel 1.
            if "AsyncCollectiveDone" not in targets and not one.attribute("calls").startswith("async_collective_fusion"):
                yield from ((inner, inside, "AsyncCollectiveStart" in targets) for inner in exchanges)

    def arrays(self) -> list[tuple[int, str, str, str]]:
        """(bytes, shape, path, line) of the arrays that instructions make in the device's memory, the largest first, each shape and path once."""
        found = {}
        for one, _, _ in self.executed:
            if one.op in VIEWS or one.op.endswith("-done") or one.attribute("custom_call_target") == ALLOCATED:
                continue
            for dtype, dims, layout in ARRAY.findall(one.type):
                if "S(" not in layout:
                    found.setdefault((f"{dtype}[{dims}]", short(one.op_name)), (array_bytes(f"{dtype}[{dims}]"), self.line(one)))
        return sorted(((size, shape, name, line) for (shape, name), (size, line) in found.items()), reverse=True)

    def stacked(self) -> dict[str, int]:
        """Bytes that loops write layer by layer: those of the way forward are kept for the way back; those of the way back are gradients.

        An array has a place for each time that its loop goes round, or one more, where libtpu has taken one of them out of the loop.
        """
        found: collections.Counter[str] = collections.Counter()
        for one, around, _ in self.executed:
            if one.op != "while":
                continue
            body = self.computations[one.attribute("body")]
            root = next(inner for inner in body.values() if inner.root)
            trips = self.trips(around, one)
            in_phase = usual_phase(body)
            for name in root.operands:
                made = body[name]
                arrays = ARRAY.findall(made.type)
                stacked = len(arrays) == 1 and arrays[0][1].startswith((f"{trips},", f"{trips + 1},")) and "S(1)" not in arrays[0][2]
                if stacked and (made.op != "get-tuple-element" or body[made.operands[0]].op != "parameter"):
                    found["forward" if in_phase == "forward" else "backward"] += array_bytes(made.type)
        return dict(found)


def _origins(one: Instruction, around: Computation, depth: int = 4) -> list[Instruction]:
    """`one`, or, where the compiler joined several and forgot what they were, the nearest that it reads and whose path is known."""
    if one.op_name or not depth:
        return [one] if one.op_name else []
    return [origin for name in one.operands if name in around for origin in _origins(around[name], around, depth - 1)]


def _root(path: Path) -> int:
    """Where the part of a path begins that readers know: mlm_jax, experiments, or the file alone."""
    return next((i for i, name in enumerate(path.parts) if name in ("mlm_jax", "experiments") and i < len(path.parts) - 1), len(path.parts) - 1)


def phase(op_name: str) -> str:
    """forward, recomputed (the forward pass again, on the way back), backward, or update (all that has no gradient: the optimizer, the norm)."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def usual_phase(computation: Computation) -> str:
    """The phase of most of its instructions."""
    found = collections.Counter(phase(one.op_name) for one in computation.values() if one.op_name)
    return found.most_common(1)[0][0] if found else "update"


def part(op_name: str) -> str:
    """The part of a model that a path belongs to: the name of a block's part, embedding, norm, or "head and loss"; "other" of all else."""
    if in_block := re.search(r"/block(?:s|_\d+)/([a-z]+)", op_name):
        return in_block[1]
    if "norm_f" in op_name:
        return "norm"
    if "head" in op_name or re.search(r"jvp\(\)", op_name):
        return "head and loss"
    if re.search(r"jvp\(\w+\)+/(gather|scatter|add)", op_name):
        return "embedding"
    return "other"


def short(op_name: str) -> str:
    """A path without what tracing puts around the model's own names."""
    kept = [word for word in op_name.split("/") if not re.search(r"\(|lambda|^(while|body|closed_call|checkpoint|rematted_computation)$", word)]
    return "/".join(kept)


def _constant(computation: Computation, name: str) -> int | None:
    """The number that `name` is, behind copies; None where it is none."""
    one = computation.get(name)
    if one is None or one.op in ("copy", "bitcast", "convert"):
        return _constant(computation, one.operands[0]) if one else None
    value = re.search(r"constant\((-?\d+)\)", one.text)
    return int(value[1]) if one.op == "constant" and value else None


def groups(text: str, n_devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that take part together, of `n_devices`, of an instruction's text; () of a permute that moves nothing.

    Raises:
      ValueError: the text says it in a way that is not known here.

    Source: openxla.org/xla/operation_semantics: listed, {{0,1},{2,3}}; as counts, [groups,size]<=[dims]T(order); as axes of a mesh,
    mesh['a'=2,'b'=4] {'b'}. Between slices, as libtpu writes it: {1,2}x{0:3} is each of devices 0 to 3 with its like in the other slice.
    """
    if between := re.search(r"_xla_megascale_target=\"\{([\d,]+)\}x\{0:(\d+)\}", text):
        n_slices, n = len(between[1].split(",")), int(between[2]) + 1
        return tuple(tuple(range(i, n_slices * n, n)) for i in range(n))
    if "replica_groups={}" in text:
        return (tuple(range(n_devices)),)
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", text):
        return tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d, ]+)\}", pairs[1]))
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", listed[1]))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(n) for n in counted[3].split(",")]
        order = [int(n) for n in counted[4].split(",")] if counted[4] else list(range(len(dims)))
        return _split(dims, order, int(counted[2]))
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\](?:\s*,?\s*(?:device_ids=)?\((\S*)\))? ?\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.\-]+)'=(\d+)", axes[1])}
        names = list(sizes)
        along = [names.index(name) for name in re.findall(r"'([\w.\-]+)'", axes[3])]
        if re.search(r"'[\w.\-]+':\(", axes[3]):
            raise ValueError(f"groups along a part of an axis are not read: {axes[0]}")
        order = [i for i in range(len(names)) if i not in along] + along
        split = _split(list(sizes.values()), order, math.prod(list(sizes.values())[i] for i in along))
        devices = _devices(axes[2] or "", math.prod(sizes.values()))
        return tuple(tuple(devices[place] for place in group) for group in split)
    if unread := re.search(r"(replica_groups|_xla_megascale_target).{,200}", text):
        raise ValueError(f"groups that are not read: {unread[0]}")
    return ()


def _split(dims: list[int], order: list[int], size: int) -> tuple[tuple[int, ...], ...]:
    """0, 1, ... as an array of shape `dims`, its axes put in `order`, cut into groups of `size`."""
    numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, size)
    return tuple(tuple(map(int, group)) for group in numbers)


def _devices(text: str, n: int) -> tuple[int, ...]:
    """The devices of a mesh of `n` in the order that `text` says: listed, "0,2,1,3", or as counts, "[2,4]T(1,0)"; "": 0, 1, ..."""
    if counted := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(size) for size in counted[1].split(",")]
        order = [int(axis) for axis in counted[2].split(",")] if counted[2] else list(range(len(dims)))
        return _split(dims, order, n)[0]
    return tuple(int(device) for device in text.split(",")) if text else tuple(range(n))
