"""How the tests compile: quickly, as that is most of what they do; what is to be compiled as users do has a process of its own."""

import os

import jax
import jaxlib.version

# The older emitters of XLA, where it still has them.
QUICK = " --xla_cpu_use_fusion_emitters=false --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"


def quickly() -> None:
    """Lets this process and its children compile in less than half the time; nothing where JAX_DISABLE_MOST_OPTIMIZATIONS says otherwise."""
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "1":
        return
    jax.config.update("jax_disable_most_optimizations", True)
    if jaxlib.version.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").removesuffix(QUICK) + QUICK  # the first of pytest's processes hands it on


def as_users(**more: str) -> dict[str, str]:
    """The environment of a child that compiles with all optimisations, and `more`."""
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").removesuffix(QUICK)} | more
