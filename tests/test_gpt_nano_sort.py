"""A model that another project trained and published, with the activations that its own code computed, gives the same numbers here.

tests/golden/gpt_nano_sort holds the weights, minGPT's gpt-nano (three layers, trained to sort six letters), and the activations for three inputs, the
same arrays as bbycroft/llm-viz publishes as JSON in public/gpt-nano-sort-model.json and gpt-nano-sort-t0-partials.json (MIT licence).
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax import huggingface
from mlm_jax.config import SampleConfig
from mlm_jax.decode.loop import Decoding
from mlm_jax.model import gpt2

GOLDEN = Path(__file__).parent / "golden" / "gpt_nano_sort"
SETTINGS = {"n_heads": 3, "activation": "gelu_tanh"}  # minGPT's files say neither


def trained() -> tuple[Any, Any]:
    config, params = huggingface.import_weights(GOLDEN / "model.safetensors", settings=SETTINGS)
    return config, jax.tree.map(jnp.asarray, params)


def test_the_published_activations_of_a_trained_mingpt_are_computed_here() -> None:
    config, params = trained()
    bar = np.load(GOLDEN / "activations.npz")
    model = gpt2.GPT2(config, stacked=False)
    variables = {"params": gpt2.unstack(params)}
    logits_BTV, found = model.apply(
        variables, jnp.asarray(bar["idx"]), capture_intermediates=lambda module, _: isinstance(module, gpt2.Block), mutable=["intermediates"]
    )
    for layer in range(3):
        (x_BTD,) = found["intermediates"][f"block_{layer}"]["__call__"]
        np.testing.assert_allclose(x_BTD, bar[f"block{layer}"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits_BTV, bar["lm_head"], rtol=0, atol=2e-5)
    assert np.abs(bar["lm_head"]).max() > 5  # a trained model's: a tolerance of 2e-5 says something


def test_the_trained_mingpt_sorts_here_and_chooses_what_its_own_logits_choose() -> None:
    config, params = trained()
    bar = np.load(GOLDEN / "activations.npz")
    logits_BTV = jax.jit(gpt2.GPT2(config).apply)({"params": params}, bar["idx"])
    assert np.array_equal(np.argmax(logits_BTV, -1), bar["lm_head"].argmax(-1))
    prompts = list(itertools.product(range(3), repeat=6))  # all there are
    decoding = Decoding(gpt2.GPT2(config), params, prompts, SampleConfig(max_tokens=6, temperature=0.0, overflow="window"), eot_id=-1)
    decoding.advance(6)
    right = [row.tolist() == sorted(prompt) for (row, _), prompt in zip(decoding.rows(), prompts, strict=True)]
    assert np.mean(right) > 0.95
