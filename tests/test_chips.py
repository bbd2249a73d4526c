"""The public facts of chips agree with what else is published of them."""

import pytest

from mlm_jax import chips
from mlm_jax.chips import CHIPS


def test_the_peak_of_a_device_is_that_of_the_longest_name_that_fits():
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("TPU v5p") == 459e12
    assert chips.peak_flops("TPU v5") == 459e12  # what JAX calls a v5p
    assert chips.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert chips.peak_flops("NVIDIA A100-SXM4-40GB") == 312e12 and chips.peak_flops("NVIDIA H100 PCIe") == 756e12
    for unknown in ("cpu", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU v50"):  # not those of L4, of the card, of v5
        assert chips.peak_flops(unknown) is None


def test_the_parts_of_a_pod_add_up_to_what_is_published_of_the_whole():
    # Source: docs.cloud.google.com/tpu/docs, per pod: v4 1.1 EFLOP/s; v5e 50.63 and v6e 234.9 PFLOP/s, 6.4 and 25.6 Tbit/s to other pods.
    for name, flops in (("v4", 1.1e18), ("v5e", 50.63e15), ("v6e", 234.9e15)):
        chip = CHIPS[name]
        assert chip.peak_flops * chip.devices * chip.max_chips == pytest.approx(flops, rel=0.03)
    for name, bits_per_s in (("v5e", 6.4e12), ("v6e", 25.6e12)):
        assert CHIPS[name].dcn_bytes_per_s * CHIPS[name].max_chips * 8 == pytest.approx(bits_per_s)


def test_links_carry_nine_tenths_of_what_the_pages_on_the_chips_promise():
    # Source: the same, GB/s of a chip over all of its links and both ways.
    for name, both_ways in (("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9), ("tpu7x", 1200e9)):
        chip = CHIPS[name]
        assert chip.link_bytes_per_s * 2 * 2 * chip.dimensions == pytest.approx(0.9 * both_ways)


def test_clocks_give_the_peak_with_the_matrix_units_that_a_chip_has():
    # A unit of 128 x 128 makes that many multiplications and additions in a cycle; each TensorCore of a v4, a v5e and a v5p has four.
    for name in ("v4", "v5e", "v5p"):
        chip = CHIPS[name]
        assert chip.clock_hz * 4 * chip.cores * 2 * 128**2 == pytest.approx(chip.peak_flops, rel=0.01)


def test_every_chip_has_its_peak_and_a_compiler_that_leaves_little_of_its_memory_unused():
    for chip in CHIPS.values():
        assert {chips.peak_flops(kind) for kind in chip.device_kinds} == {chip.peak_flops}
        assert 0.95 * chip.hbm_bytes < chip.usable_bytes < chip.hbm_bytes
        assert chip.cores % chip.devices == 0
