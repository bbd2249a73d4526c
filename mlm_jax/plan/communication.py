"""How long devices talk to each other: bytes over the bandwidth of the links between them, about which the compiler says nothing.

It is what links allow that nothing else uses: a collective is seldom quicker, and mostly slower.

Source: Austin et al. 2025 (How to Scale Your Model), "Sharded Matrices and How to Multiply Them" for times, "How to Think About TPUs" for links.
"""

import collections
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlm_jax.plan.topology import Topology

HOP_S = 1e-6  # Source: the same, "A note on ICI latency": what a hop takes at least, typically


class Collective(NamedTuple):
    """One instruction by which devices exchange data."""

    kind: str  # all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute
    times: int  # executions in a step
    bytes: int  # on one device: what an all-gather gives, and what another takes
    groups: tuple[tuple[int, ...], ...]  # positions in mesh.devices.flat that take part together; of a permute (source, target) pairs
    source: str
    phase: str
    hidden: bool = False  # it is begun ahead of its use, and goes on beside other work


class _Layout(NamedTuple):
    """Where a group's devices are."""

    slices: int
    chips: int  # of each slice
    devices: int  # of each chip
    links: float  # by which data arrives at a chip, each one way
    crossing: float  # of what one device exchanges in an all-to-all within a slice, the part that a link carries
    hops: int  # between those farthest apart


def wire_bytes(collective: Collective) -> float:
    """Bytes that leave one device in one execution, however many links they pass.

    Source: that of the module: (n - 1) / n of the array for an all-gather, a reduce-scatter and an all-to-all of n devices, twice that for an
    all-reduce, which is the first two; a permute sends all.
    """
    n = max((len(set(group)) for group in collective.groups), default=1)
    if n == 1:
        return 0.0
    if collective.kind == "collective-permute":
        return float(collective.bytes)
    return _rounds(collective.kind) * collective.bytes * (n - 1) / n


def seconds(collective: Collective, devices: Sequence[Any], topology: Topology) -> float:
    """Seconds of a step that all executions of `collective` take, by the slowest of its groups. `devices` is the flattened mesh.

    A group of several slices does its work in each slice first, and then exchanges between slices what is left for each chip to do: an
    all-reduce is a reduce-scatter within the slice, an all-reduce of the parts between slices, and an all-gather within the slice.
    Between the two devices of one TPU7x no time is counted; they share the links of their chip.
    """
    if collective.kind == "collective-permute":
        return collective.times * _permute(collective, devices, topology)
    layouts = _layouts(collective.groups, tuple(devices), topology)
    return collective.times * max((_exchange(collective, layout, topology) for layout in layouts), default=0.0)


def _rounds(kind: str) -> int:
    return {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}[kind]


def _exchange(collective: Collective, layout: _Layout, topology: Topology) -> float:
    """Seconds of one execution in one group.

    Source: that of the module. All-gather of V bytes over n chips: max(hops x HOP_S, V (n - 1) / n / bandwidth), the bandwidth being that of
    all links that the group has. All-to-all on a ring: a quarter of an all-gather of all devices' arrays.
    """
    chip = topology.chip
    link, network = chip.link_bytes_per_s / chip.devices, chip.dcn_bytes_per_s / chip.devices  # a device's share
    rounds, between = _rounds(collective.kind), (layout.slices - 1) / layout.slices
    if collective.kind == "all-to-all":
        inside = collective.bytes / layout.slices * layout.crossing / link
        return max(layout.hops * HOP_S, inside) + collective.bytes * between / network
    part = collective.bytes / layout.devices  # the devices of a chip bring in a part each
    inside = part * (layout.chips - 1) / layout.chips / (layout.links * link) if layout.chips > 1 else 0.0
    return rounds * (max(layout.hops * HOP_S, inside) + part / layout.chips * between / network)


@functools.lru_cache
def _layouts(groups: tuple[tuple[int, ...], ...], devices: tuple[Any, ...], topology: Topology) -> frozenset[_Layout]:
    """The different layouts of the groups. In each they are taken to fill a mesh, and to be alike in each slice and chip."""
    found = set()
    for group in groups:
        slices = {_slice(devices[i]) for i in group}
        here = [tuple(devices[i].coords) for i in group if _slice(devices[i]) == min(slices)]
        axes = [
            _axis(sorted({place[axis] for place in here}), size, wraps)
            for axis, (size, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True))
        ]
        links, crossing, hops = sum(axis[0] for axis in axes), max(axis[1] for axis in axes), sum(axis[2] for axis in axes)
        found.add(_Layout(len(slices), len(set(here)), len(here) // len(set(here)), links, crossing, hops))
    return frozenset(found)


def _axis(members: Sequence[int], size: int, wraps: bool) -> tuple[float, float, int]:
    """What an axis of the torus is for a group with chips at the positions `members`: links, crossing and hops of _Layout.

    Data arrives from both sides where the axis is a ring that the group goes round, else, at its ends, from one. Where the group's chips are
    k apart, k groups share the links. In an all-to-all of n chips each sends to each across the middle: of the whole, floor(n^2 / 4) / n
    go over the link there, or the two of a ring.
    """
    n = len(members)
    if n == 1:
        return 0.0, 0.0, 0
    gaps = [after - before for before, after in itertools.pairwise(members)]
    ring = wraps and {*gaps, members[0] + size - members[-1]} == {gaps[0]}
    apart = max(gaps)
    links = (2 if ring else 1) / apart
    return links, n * n // 4 / n / links, apart * (n // 2 if ring else n - 1)


def _permute(collective: Collective, devices: Sequence[Any], topology: Topology) -> float:
    """Seconds of one execution: the most that one link, or one chip's way to other slices, has to carry over its bandwidth.

    Within a slice data goes along one axis after the other, on a ring the shorter way round.
    """
    links: collections.Counter[Any] = collections.Counter()
    ways_out: collections.Counter[Any] = collections.Counter()
    farthest = 0
    for start, end in collective.groups:
        source, target = devices[start], devices[end]
        at, to = list(source.coords), target.coords
        if _slice(source) != _slice(target):
            ways_out[_slice(source), *at] += 1
            continue
        hops = 0
        for axis, (size, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
            step = 1 if to[axis] > at[axis] else -1
            if wraps and abs(to[axis] - at[axis]) > size / 2:
                step = -step
            while at[axis] != to[axis]:
                links[_slice(source), *at, axis, step] += 1
                at[axis] = (at[axis] + step) % size
                hops += 1
        farthest = max(farthest, hops)
    inside = max(links.values(), default=0) * collective.bytes / topology.chip.link_bytes_per_s
    outside = max(ways_out.values(), default=0) * collective.bytes / topology.chip.dcn_bytes_per_s
    return max(farthest * HOP_S, inside, outside)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)  # none where there is one slice
