"""A plan as a page of text."""

from collections.abc import Iterable, Sequence

from mlm_jax import chips
from mlm_jax.metrics import duration
from mlm_jax.plan.tpu import N_NAMED, Exchanged, Memory, Plan

PHASES = ("forward", "recomputed", "backward", "update")
N_EXCHANGED = 10


def describe(plan: Plan) -> str:
    """The page: what fits, what it is made of, how long a step takes, days and price."""
    t, m, largest = plan.topology, plan.memory, plan.largest[:N_NAMED]
    slices = f"{t.slices} slices of " if t.slices > 1 else ""
    lines = [
        f"{plan.name}, {plan.n_params:,} parameters, on {slices}{t.name} ({t.accelerator_type}): {t.n_chips} chips, {t.n_cores} cores, {_mesh(plan)}",
        f"{plan.batch_size} x {plan.tokens // plan.batch_size} tokens a step, {plan.rows} rows a device; "
        + ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
        "",
        f"FITS: {gib(m.total)} of {gib(m.usable)} GiB a device, {gib(-m.over)} GiB free",
        *table(("GiB a device", ""), _memory(m)),
        "",
        "Largest arrays in a device's memory",
        *table(("GiB", "shape", "made by", "line"), [(gib(size), shape, name or "(no name)", line) for size, shape, name, line in largest]),
        "",
        *_cycles(plan),
        "",
        *exchanges("in a step", plan.exchanged),
        "",
        *_time(plan),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def summary(plan: Plan) -> list[str]:
    """The page in three lines: for the header of an experiment that is meant for one slice."""
    t, m, b = plan.topology, plan.memory, plan.budget
    return [
        f"{t.name} ({t.accelerator_type}), {_mesh(plan)}: {gib(m.total)} of {gib(m.usable)} GiB a device; "
        + ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
        f"{plan.step_s * 1e3:.1f} ms a step, {plan.lower_s * 1e3:.1f} at least: "
        f"{plan.tokens / plan.step_s:,.0f} tokens/s, MFU {plan.mfu(plan.step_s):.1%}",
        f"{plan.steps:,} steps in {duration(b.step_s * b.steps)}, {amount(b.chip_hours)} chip-hours, "
        f"{amount(b.usd)} USD at {b.usd_per_chip_hour:.2f}",
    ]


def _mesh(plan: Plan) -> str:
    return "mesh " + (" x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1 device")


def _memory(m: Memory) -> list[tuple[str, str]]:
    rows = [
        ("parameters", m.parameters),
        ("optimizer state", m.optimizer),
        ("averaged parameters", m.average),
        ("batch, scalars, and padding to whole tiles", m.batch),
        ("gradients", m.gradients),
        ("activations kept for the backward pass", m.activations),
        ("temporaries", m.temporaries),
        ("in the host's memory", m.host),
    ]
    return [(gib(size), name) for name, size in rows if size]


def _cycles(plan: Plan) -> list[str]:
    """Cycles by part and phase, and the kernels that have none."""
    parts = list(dict.fromkeys(part for phase in plan.cycles.values() for part in phase))
    phases = [phase for phase in PHASES if phase in plan.cycles]
    total = sum(n for phase in plan.cycles.values() for n in phase.values())
    parts.sort(key=lambda part: -sum(plan.cycles[phase].get(part, 0) for phase in phases))
    rows = [
        (part, *(mega(plan.cycles[phase].get(part, 0)) for phase in phases), mega(sum(plan.cycles[p].get(part, 0) for p in phases))) for part in parts
    ]
    rows.append(("all", *(mega(sum(plan.cycles[phase].values())) for phase in phases), mega(total)))
    clock = plan.topology.chip.clock_hz
    lines = [f"Planned cycles, in millions{f'; {clock / 1e9:.2f} GHz' if clock else ''}", *table(("", *phases, "all"), rows)]
    for kernel in plan.kernels:
        flops = f", {kernel.flops / 1e9:.1f} GFLOP" if kernel.flops else ""
        lines.append(f"without an estimate: kernel {kernel.name}, {kernel.phase}, {kernel.times} x{flops}, {kernel.source}")
    return lines


def exchanges(what: str, exchanged: Sequence[Exchanged]) -> list[str]:
    """The exchanges of a device, the longest by name; `what` says when."""
    rows = [
        (
            one.kind,
            one.axes,
            f"{one.times}",
            f"{one.bytes / 1e6:.1f}",
            f"{one.seconds * 1e3:.2f}",
            "yes" if one.hidden else "no",
            one.phase,
            one.source,
        )
        for one in exchanged[:N_EXCHANGED]
    ]
    if rest := exchanged[N_EXCHANGED:]:
        n, size, seconds = (sum(getattr(one, name) for one in rest) for name in ("times", "bytes", "seconds"))
        rows.append((f"{len(rest)} others", "", f"{n}", f"{size / 1e6:.1f}", f"{seconds * 1e3:.2f}", "", "", ""))
    if not rows:
        return [f"No exchanges between devices {what}"]
    sums = [(kind, sum(one.bytes for one in exchanged if one.kind == kind)) for kind in dict.fromkeys(one.kind for one in exchanged)]
    every = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in sums)
    title = f"Exchanges of a device {what}: {sum(size for _, size in sums) / 1e6:.1f} MB sent ({every})"
    return [title, *table(("kind", "along", "times", "MB sent", "ms", "hidden", "phase", "line"), rows)]


def _time(plan: Plan) -> list[str]:
    b, t = plan.budget, plan.topology
    how = "planned cycles" if t.chip.clock_hz else "FLOPs at peak, for want of a known clock"
    speeds = [
        ("at least", plan.lower_s, "every exchange hidden, kernels at their best"),
        ("estimate", plan.step_s, "exchanges hidden that the compiler starts early"),
        ("at most", plan.upper_s, "no exchange hidden"),
    ]
    parts = [(f"{plan.compute_s * 1e3:.1f}", how), (f"{plan.communication_s * 1e3:.1f}", "exchanges, by bytes over links")]
    if plan.kernels:
        parts.append((f"{plan.kernels_s[0] * 1e3:.1f} to {plan.kernels_s[1] * 1e3:.1f}", "kernels, by FLOPs"))
    rows = [(name, f"{s * 1e3:.1f}", f"{plan.tokens / s:,.0f}", f"{plan.mfu(s):.1%}", why) for name, s, why in speeds]
    return [
        "Time of a step, in ms",
        *table(("ms", ""), parts),
        "",
        *table(("", "ms", "tokens/s", "MFU", ""), rows),
        "",
        f"{plan.steps:,} steps, {plan.all_tokens / 1e9:.2f} billion tokens: {duration(b.step_s * b.steps)} of stepping ({b.days:.2f} days), "
        f"{amount(b.chip_hours)} chip-hours, {amount(b.usd)} USD at {b.usd_per_chip_hour:.2f} a chip-hour",
        *(["A batch that is still to grow is taken to need time as its rows do."] if plan.all_tokens < plan.steps * plan.tokens else []),
        f"List price of a {t.chip.name} on demand, {chips.PRICES_OF}; --price sets another. Validation, checkpoints and starting are not in it.",
    ]


def amount(n: float) -> str:
    """Whole, or where that says little in two figures."""
    return f"{n:,.0f}" if n >= 10 or n == 0 else f"{n:.2g}"


def gib(size: float) -> str:
    """Bytes in GiB, in four figures or so."""
    return f"{size / 2**30:.3f}" if abs(size) < 2**30 else f"{size / 2**30:.2f}"


def mega(cycles: float) -> str:
    """In millions."""
    return f"{cycles / 1e6:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns that line up: numbers to the right, words to the left."""
    every = [list(head), *map(list, rows)]
    widths = [max(len(row[k]) for row in every) for k in range(len(head))]
    numeric = [all(row[k][:1].isdigit() or not row[k] for row in every[1:]) for k in range(len(head))]
    return ["  " + "  ".join(cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(row, widths, numeric, strict=True)) for row in every]
