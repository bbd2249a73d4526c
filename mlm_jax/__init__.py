"""mlm_jax: raw text to a trained, evaluated, talking GPT-2 and back to the Hugging Face format, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlm_jax.decode import generate as generate
    from mlm_jax.runs import load as load

__all__ = ["generate", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `generate`, imported when first asked for: `import mlm_jax` and `mlm-jax --help` stay quick."""
    if name == "load":
        from mlm_jax.runs import load

        return load
    if name == "generate":
        from mlm_jax.decode import generate

        return generate
    raise AttributeError(f"module 'mlm_jax' has no attribute {name!r}")
