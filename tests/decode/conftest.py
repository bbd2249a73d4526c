"""A small model whose text varies, and its parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mlm_jax import sharding
from mlm_jax.config import MeshConfig, ModelConfig, override
from mlm_jax.model import gpt2

CONFIG = ModelConfig(vocab_size=257, context_len=64, n_layers=2, n_heads=2, d_model=32, d_ff=64)


@pytest.fixture(scope="session")
def model() -> gpt2.GPT2:
    return gpt2.GPT2(CONFIG)


@pytest.fixture(scope="session")
def draw() -> Callable[..., gpt2.Params]:
    """A function: parameters of a model, `std` away from their initialisation. One compiled program: op by op takes twice as long."""

    def drawn(model: gpt2.GPT2, std: float, seed: int = 0, shift: int = 0) -> gpt2.Params:
        def fresh() -> gpt2.Params:
            start = gpt2.init(model, jax.random.key(seed))
            return jax.tree.map(lambda x: x + std * jax.random.normal(jax.random.key(x.size + shift), x.shape), start)

        return jax.jit(fresh)()

    return drawn


@pytest.fixture(scope="session")
def params(model: gpt2.GPT2, draw: Callable[..., gpt2.Params]) -> gpt2.Params:
    """Far from their initialisation, so that the next token is no foregone conclusion and depends on all that came before."""
    return draw(model, 0.2)


@pytest.fixture(scope="session")
def padded() -> Callable[[gpt2.GPT2, gpt2.Params], Any]:
    """A function: the same model with its vocabulary padded to a multiple of 128, and its parameters."""

    def pad(model: gpt2.GPT2, params: gpt2.Params) -> tuple[gpt2.GPT2, gpt2.Params]:
        wide = gpt2.GPT2(override(model.config, {"vocab_multiple": 128}))
        rows = wide.config.padded_vocab_size - model.config.vocab_size
        return wide, params | {"w_token_VD": jnp.pad(params["w_token_VD"], ((0, rows), (0, 0)))}

    return pad


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """Every axis twice, over eight devices."""
    return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
