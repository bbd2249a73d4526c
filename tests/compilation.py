"""How the tests compile: quickly, as that is most of what the default ones do. What is to be compiled as users do has a process of its own.

JAX_DISABLE_MOST_OPTIMIZATIONS=0 before the command has all of them compiled as users do, but for children that are to be quick whatever it says.
"""

import os

import jax
import jaxlib.version

# XLA's older emitters, where it still has them, take half the time of the others; with all optimisations they take longer.
_FLAGS = " --xla_cpu_use_fusion_emitters=false --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE" if jaxlib.version.__version_info__ < (0, 11) else ""


def _environment(quick: bool, more: dict[str, str]) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "").removesuffix(_FLAGS) + (_FLAGS if quick else "")
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)), "XLA_FLAGS": flags} | more


def quick(**more: str) -> dict[str, str]:
    """The environment of a child that compiles in less than half the time, and `more`."""
    return _environment(True, more)


def as_users(**more: str) -> dict[str, str]:
    """The environment of a child that compiles with all optimisations, and `more`."""
    return _environment(False, more)


def be_quick() -> None:
    """Has this process and its children compile quickly, unless JAX_DISABLE_MOST_OPTIMIZATIONS says otherwise."""
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
        os.environ.update(quick())  # the first of pytest's processes hands it on to the others
        jax.config.update("jax_disable_most_optimizations", True)
