"""A small model whose text varies, and its parameters."""

import jax
import pytest

from mlm_jax.config import ModelConfig
from mlm_jax.model import gpt2

CONFIG = ModelConfig(vocab_size=257, context_len=64, n_layers=2, n_heads=2, d_model=32, d_ff=64)


@pytest.fixture(scope="session")
def model() -> gpt2.GPT2:
    return gpt2.GPT2(CONFIG)


@pytest.fixture(scope="session")
def params(model: gpt2.GPT2) -> gpt2.Params:
    """Far from their initialisation, so that the next token is no foregone conclusion and depends on all that came before."""
    fresh = gpt2.init(model, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
