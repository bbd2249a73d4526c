"""What is publicly known of the chips that runs use: peak FLOP/s of all, and of TPUs also memory, links and price. One place for each number."""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU chip. On a TPU7x each TensorCore is a JAX device; on the others the chip is one, with both of its cores where it has two."""

    name: str  # as libtpu names it
    accelerator: str  # as accelerator types begin
    device_kinds: tuple[str, ...]  # how device_kind of its JAX devices begins
    cores: int  # TensorCores
    devices: int  # JAX devices
    dimensions: int  # of the torus
    max_chips: int  # in a slice

    # Of one JAX device.
    peak_flops: float  # FLOP/s, dense bfloat16
    hbm_bytes: float
    usable_bytes: float  # what libtpu's compiler has of it
    hbm_bytes_per_s: float

    # Of the chip.
    link_bytes_per_s: float  # of one of its links to neighbours, one way
    dcn_bytes_per_s: float  # its share of the network between slices, one way
    clock_hz: float | None  # of the compiler's estimated cycles; None: not known
    usd_per_hour: float


# Source, where nothing else is said: the pages on each chip in docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), per chip.
#   hbm_bytes: all that the chip has; the page on v5p says 95 GiB, and in a note that there are 96.
#   usable_bytes: "available HBM" in the error of libtpu 0.0.42.1 for a program that is too large.
#   link_bytes_per_s, dcn_bytes_per_s: Austin et al. 2025 (How to Scale Your Model), "TPU Specs"; the links are a tenth slower than in the
#     pages. A TPU7x is not in that table: its page gives it the links of a v5p and 100 Gbit/s of network.
#   clock_hz: peak_flops over what all matrix units do in a cycle, of a v4 as in Jouppi et al. 2023 (TPU v4); puts a large bfloat16 matmul, as
#     compiled, at 88 to 97 % of peak_flops. The matrix units of a TPU7x are not known.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            accelerator="v4",
            device_kinds=("TPU v4",),
            cores=2,
            devices=1,
            dimensions=3,
            max_chips=4096,
            peak_flops=275e12,
            hbm_bytes=32 * GIB,
            usable_bytes=31.75 * GIB,
            hbm_bytes_per_s=1200e9,
            link_bytes_per_s=45e9,
            dcn_bytes_per_s=6.25e9,
            clock_hz=1.05e9,
            usd_per_hour=3.22,
        ),
        Chip(
            name="v5e",
            accelerator="v5litepod",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            cores=1,
            devices=1,
            dimensions=2,
            max_chips=256,
            peak_flops=197e12,
            hbm_bytes=16 * GIB,
            usable_bytes=15.75 * GIB,
            hbm_bytes_per_s=819e9,
            link_bytes_per_s=45e9,
            dcn_bytes_per_s=3.125e9,
            clock_hz=1.5e9,
            usd_per_hour=1.20,
        ),
        Chip(
            name="v5p",
            accelerator="v5p",
            device_kinds=("TPU v5", "TPU v5p"),
            cores=2,
            devices=1,
            dimensions=3,
            max_chips=6144,
            peak_flops=459e12,
            hbm_bytes=96 * GIB,
            usable_bytes=95.74 * GIB,
            hbm_bytes_per_s=2765e9,
            link_bytes_per_s=90e9,
            dcn_bytes_per_s=6.25e9,
            clock_hz=1.75e9,
            usd_per_hour=4.20,
        ),
        Chip(
            name="v6e",
            accelerator="v6e",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            cores=1,
            devices=1,
            dimensions=2,
            max_chips=256,
            peak_flops=918e12,
            hbm_bytes=32 * GIB,
            usable_bytes=31.25 * GIB,
            hbm_bytes_per_s=1638e9,
            link_bytes_per_s=90e9,
            dcn_bytes_per_s=12.5e9,
            clock_hz=1.75e9,
            usd_per_hour=2.70,
        ),
        Chip(
            name="tpu7x",
            accelerator="tpu7x",
            device_kinds=("TPU7x",),
            cores=2,
            devices=2,
            dimensions=3,
            max_chips=9216,
            peak_flops=2307e12 / 2,
            hbm_bytes=192 * GIB / 2,
            usable_bytes=94.75 * GIB,
            hbm_bytes_per_s=7380e9 / 2,
            link_bytes_per_s=90e9,
            dcn_bytes_per_s=12.5e9,
            clock_hz=None,
            usd_per_hour=12.00,
        ),
    )
}

# When `usd_per_hour` was what Google asked for a chip on demand, at the lowest price of a region in the United States.
# Source: cloud.google.com/tpu/pricing; v4, which is no longer there: skypilot-org/skypilot-catalog, catalogs/v8/gcp/vms.csv, us-central2.
PRICES_OF = "2026-09"

# Peak dense bfloat16 FLOP/s (float16 where a GPU has no bfloat16) of one JAX device, by the start of its device_kind.
# Source: docs.cloud.google.com/tpu/docs (per chip; v2 and v3 devices are half a chip); NVIDIA data sheets.
PEAK_FLOPS = {kind: chip.peak_flops for chip in CHIPS.values() for kind in chip.device_kinds} | {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device; None where it is not known (a CPU, say)."""
    if "Laptop" in device_kind:  # with the name of a card that is quicker
        return None
    matches = [name for name in PEAK_FLOPS if re.match(rf"{name}(?![0-9A-Za-z])", device_kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
