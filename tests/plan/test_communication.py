"""Times of collectives against the worked problems of Austin et al. 2025 (How to Scale Your Model) and computations by hand."""

import collections
import itertools
from typing import NamedTuple

import pytest

from mlm_jax.chips import CHIPS
from mlm_jax.plan.communication import Collective, seconds, wire_bytes
from mlm_jax.plan.topology import Topology, parse

V5E, V5P = CHIPS["v5e"].link_bytes_per_s, CHIPS["v5p"].link_bytes_per_s


class Device(NamedTuple):
    coords: tuple[int, ...]
    slice_index: int = 0
    core_on_chip: int = 0


def devices(topology: Topology) -> list[Device]:
    """In the order of the coordinates; the last axis changes fastest, then comes the core."""
    places = itertools.product(range(topology.slices), itertools.product(*map(range, topology.shape)), range(topology.chip.devices))
    return [Device(coords, index, core) for index, coords, core in places]


def groups_along(topology: Topology, *axes: int | str) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ along these axes of the torus alone, or in "slice" or "core"."""
    found = collections.defaultdict(list)
    for i, device in enumerate(devices(topology)):
        place = dict(enumerate(device.coords)) | {"slice": device.slice_index, "core": device.core_on_chip}
        found[tuple(value for axis, value in place.items() if axis not in axes)].append(i)
    return tuple(tuple(group) for group in found.values())


def collective(kind: str, n_bytes: int, groups: tuple[tuple[int, ...], ...], times: int = 1) -> Collective:
    return Collective(kind, times, n_bytes, groups, "", "")


def time_of(kind: str, n_bytes: int, topology: Topology, groups: tuple[tuple[int, ...], ...]) -> float:
    return seconds(collective(kind, n_bytes, groups), devices(topology), topology)


def test_what_leaves_a_device_is_the_part_that_the_others_lack():
    eight = (tuple(range(8)),)
    assert wire_bytes(collective("all-gather", 800, eight)) == wire_bytes(collective("reduce-scatter", 800, eight)) == 700
    assert wire_bytes(collective("all-to-all", 800, eight)) == 700
    assert wire_bytes(collective("all-reduce", 800, eight)) == 1400
    assert wire_bytes(collective("collective-permute", 800, ((0, 1), (1, 0)))) == 800
    assert wire_bytes(collective("all-reduce", 800, ((0,), (1,)))) == wire_bytes(collective("collective-permute", 800, ((0, 0),))) == 0


def test_a_gather_along_an_axis_that_is_no_ring_takes_what_the_book_says():
    # Part 3, pop quiz 2: 2048 x 8192 in bfloat16 along 4 chips of a v5e takes 560 us (a profile: 680), 256 x 256 three hops of 1 us.
    topology = parse("v5e:4x8")
    assert time_of("all-gather", 2048 * 8192 * 2, topology, groups_along(topology, 0)) == pytest.approx(560e-6, rel=0.01)
    assert time_of("all-gather", 256 * 256 * 2, topology, groups_along(topology, 0)) == pytest.approx(3e-6)


def test_a_gather_along_rings_takes_what_the_book_says():
    # Part 3, questions 2 and 3, on a v4 4x4x4, where it leaves the factor (n - 1) / n out.
    topology = parse("v4:4x4x4")
    whole = 1024 * 4096 * 2
    assert time_of("all-gather", whole // 4, topology, groups_along(topology, 0)) == pytest.approx(23.3e-6 * 3 / 4, rel=0.01)
    assert time_of("all-gather", whole, topology, groups_along(topology, 0, 1)) == pytest.approx(46.6e-6 * 15 / 16, rel=0.01)
    assert time_of("all-gather", 256, topology, groups_along(topology, 2)) == pytest.approx(2e-6)


def test_a_gather_by_a_whole_plane_without_rings_has_two_links():
    # Part 2, question 6: 16 GB to all of a v5e 4x4, 15 of which a corner has to receive by two links, in 167 ms.
    topology = parse("v5e:4x4")
    assert time_of("all-gather", 16 * 10**9, topology, groups_along(topology, 0, 1)) == pytest.approx(167e-3, rel=0.01)


def test_a_reduction_is_a_scatter_and_a_gather_and_counts_as_often_as_it_runs():
    topology = parse("v5p:4x4x8")
    groups = groups_along(topology, 1)
    gather = time_of("all-gather", 10**9, topology, groups)
    assert gather == pytest.approx(10**9 * 3 / 4 / (2 * V5P))
    assert time_of("reduce-scatter", 10**9, topology, groups) == gather
    assert time_of("all-reduce", 10**9, topology, groups) == 2 * gather
    assert seconds(collective("all-gather", 10**9, groups, times=24), devices(topology), topology) == 24 * gather


def test_a_part_of_a_ring_is_no_ring_and_groups_whose_chips_alternate_share_the_links():
    topology = parse("v5e:16x16")  # positions along axis 1 are 0 to 15
    side_by_side, every_fourth, every_eighth = (tuple(range(0, 16, k)[:4]) for k in (1, 4, 8))
    whole_row = time_of("all-gather", 10**9, topology, (tuple(range(16)),))
    assert whole_row == pytest.approx(10**9 * 15 / 16 / (2 * V5E))
    assert time_of("all-gather", 10**9, topology, (side_by_side,)) == pytest.approx(10**9 * 3 / 4 / V5E)
    assert time_of("all-gather", 10**9, topology, (every_fourth,)) == pytest.approx(10**9 * 3 / 4 / (2 * V5E / 4))
    assert time_of("all-gather", 10**9, topology, (every_eighth,)) == pytest.approx(10**9 * 1 / 2 / (2 * V5E / 8))
    assert time_of("all-gather", 10**9, topology, (side_by_side, every_fourth)) == time_of("all-gather", 10**9, topology, (every_fourth,))
    assert time_of("all-gather", 10**9, topology, ((0,), (1,))) == 0


@pytest.mark.parametrize(
    ("name", "axes"), [("v5e:4x4", (0,)), ("v5e:2x4", (0, 1)), ("v5e:16x16", (0,)), ("v4:4x4x4", (0, 1, 2)), ("v5p:4x4x8", (0, 2))]
)
def test_an_all_to_all_takes_as_long_as_the_link_that_carries_most(name, axes):
    # By hand every part goes the shorter way along one axis after the other, and half of it each way where both are as long.
    topology = parse(name)
    group = groups_along(topology, *axes)[0]
    places = [devices(topology)[i].coords for i in group]
    loads = collections.Counter()
    for source, target in itertools.permutations(places, 2):
        at = list(source)
        for axis in axes:
            size, ahead = topology.shape[axis], target[axis] - at[axis]
            ways = [ahead]
            if topology.wraps[axis]:
                around = ahead - size if ahead > 0 else ahead + size
                shortest = min(abs(ahead), abs(around))
                ways = [way for way in (ahead, around) if abs(way) == shortest] if ahead else [0]
            for way in ways:
                for k in range(abs(way)):
                    step = 1 if way > 0 else -1
                    link = (*at[:axis], (at[axis] + k * step) % size, *at[axis + 1 :], axis, step)
                    loads[link] += 1 / len(ways)
            at[axis] = target[axis]
    n_bytes = 10**9
    slowest = max(loads.values()) * n_bytes / len(places) / topology.chip.link_bytes_per_s
    assert time_of("all-to-all", n_bytes, topology, (group,)) == pytest.approx(slowest)


def test_an_all_to_all_on_a_ring_takes_a_quarter_of_a_gather_of_all():
    # Part 3, "Our final communication primitive"; the gather without the factor (n - 1) / n.
    topology = parse("v5e:16x16")
    assert time_of("all-to-all", 10**9, topology, groups_along(topology, 0)) == pytest.approx(16 * 10**9 / (2 * V5E) / 4)


def test_slices_exchange_what_is_left_for_each_chip():
    topology = parse("v5e:2x4", slices=2)
    everything = groups_along(topology, 0, 1, "slice")
    network = CHIPS["v5e"].dcn_bytes_per_s
    inside, between = 10**9 * 7 / 8 / (2 * V5E), 10**9 / 8 * 1 / 2 / network
    assert time_of("all-gather", 10**9, topology, everything) == pytest.approx(inside + between)
    assert time_of("all-reduce", 10**9, topology, everything) == pytest.approx(2 * (inside + between))
    assert time_of("all-reduce", 10**9, topology, groups_along(topology, "slice")) == pytest.approx(2 * 10**9 / 2 / network)
    assert time_of("all-to-all", 10**9, topology, groups_along(topology, "slice")) == pytest.approx(10**9 / 2 / network)


def test_the_two_devices_of_a_chip_share_its_links():
    topology = parse("tpu7x:4x4x4")
    link = CHIPS["tpu7x"].link_bytes_per_s
    one_of_each, both = groups_along(topology, 0), groups_along(topology, 0, "core")
    assert time_of("all-gather", 10**9, topology, one_of_each) == pytest.approx(10**9 * 3 / 4 / (2 * link / 2))
    assert time_of("all-gather", 10**9, topology, both) == pytest.approx(10**9 * 3 / 4 / (2 * link))
    assert time_of("all-gather", 10**9, topology, groups_along(topology, "core")) == 0


def shift(n: int, by: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, (i + by) % n) for i in range(n))


def test_a_permute_takes_as_long_as_the_link_that_carries_most():
    row = parse("v5e:16x16")
    whole = 10**9
    assert time_of("collective-permute", whole, row, shift(16, 1)) == pytest.approx(whole / V5E)
    assert time_of("collective-permute", 8, row, shift(16, 15)) == pytest.approx(1e-6), "the shorter way round"
    assert time_of("collective-permute", whole, row, shift(16, 3)) == pytest.approx(3 * whole / V5E)
    line = parse("v5e:2x4")  # the last sends back to the first over links that carry nothing else that way
    assert time_of("collective-permute", whole, line, shift(4, 1)) == pytest.approx(whole / V5E)
    assert time_of("collective-permute", whole, line, ((0, 0), (1, 1))) == 0
    assert time_of("collective-permute", 8, line, shift(4, 1)) == pytest.approx(3e-6), "three hops back"


def test_a_permute_between_slices_goes_over_the_network():
    topology = parse("v5e:2x4", slices=2)
    there_and_back = (*((i, i + 8) for i in range(8)), *((i + 8, i) for i in range(8)))
    assert time_of("collective-permute", 10**9, topology, there_and_back) == pytest.approx(10**9 / CHIPS["v5e"].dcn_bytes_per_s)
