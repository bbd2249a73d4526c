"""How the tests compile: quickly, as that is most of what they do. What is to be compiled as users do has a process of its own."""

import os

import jax
import jaxlib.version

# XLA's older emitters, where it still has them, take half the time of the others; with all optimisations they take longer.
_FLAGS = " --xla_cpu_use_fusion_emitters=false --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE" if jaxlib.version.__version_info__ < (0, 11) else ""


def be_quick() -> None:
    """Has this process and its children compile in less than half the time."""
    flags = os.environ.get("XLA_FLAGS", "").removesuffix(_FLAGS)  # the first of pytest's processes hands its own on to the others
    os.environ.update(JAX_DISABLE_MOST_OPTIMIZATIONS="1", XLA_FLAGS=flags + _FLAGS)
    jax.config.update("jax_disable_most_optimizations", True)


def as_users(**more: str) -> dict[str, str]:
    """The environment of a child that compiles with all optimisations, and `more`."""
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").removesuffix(_FLAGS)} | more
