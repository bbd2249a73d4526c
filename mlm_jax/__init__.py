"""mlm_jax: raw text to a trained, evaluated, talking GPT-2 and back to the Hugging Face format, in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlm_jax.decode.text import Draft as Draft
    from mlm_jax.decode.text import generate as generate
    from mlm_jax.decode.text import generations as generations
    from mlm_jax.decode.text import stream as stream
    from mlm_jax.model.int8 import int8 as int8
    from mlm_jax.runs import load as load

_HOMES = {
    "load": "mlm_jax.runs",
    "generate": "mlm_jax.decode.text",
    "generations": "mlm_jax.decode.text",
    "stream": "mlm_jax.decode.text",
    "Draft": "mlm_jax.decode.text",
    "int8": "mlm_jax.model.int8",
}
__all__ = ["Draft", "generate", "generations", "int8", "load", "stream"]


def __getattr__(name: str) -> Any:
    """What the package offers, imported when first asked for: `import mlm_jax` and `mlm-jax --help` stay quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mlm_jax' has no attribute {name!r}")
