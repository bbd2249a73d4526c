"""The sizes of GPT-2 that were published, as experiments: each has its exact number of parameters and differs from the 124M in little else."""

from pathlib import Path

import jax
import pytest

from mlm_jax import experiment
from mlm_jax.config import diff
from mlm_jax.model import gpt2

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

# Source: the weight files of openai-community/gpt2, gpt2-medium, gpt2-large and gpt2-xl, and of distilbert/distilgpt2, head tied.
PARAMETERS = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_member_of_the_family_has_its_exact_number_of_parameters(name):
    loaded = experiment.load(str(EXPERIMENTS / f"{name}.py")).with_changes({"model.vocab_size": 50_257})
    assert loaded.config.data.tokenizer == "gpt2"  # which has as many
    c = loaded.config.model
    params = jax.eval_shape(lambda: gpt2.init(loaded.build(c), jax.random.key(0)))
    assert c.padded_vocab_size == 50_304  # a multiple of 128, for TPUs and meshes
    assert gpt2.n_params(params) - (c.padded_vocab_size - c.vocab_size) * c.d_model == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "gpt2_124m"])
def test_a_member_of_the_family_differs_in_name_shape_and_learning_rate_alone(name):
    small, config = (experiment.load(str(EXPERIMENTS / f"{n}.py")).config for n in ("gpt2_124m", name))
    changed = set(diff(small, config))
    assert changed <= {"name", "model.n_layers", "model.n_heads", "model.d_model", "model.d_ff", "optim.peak_lr"}
    assert config.name == name
    assert config.model.head_dim == 64 and config.model.d_ff == 4 * config.model.d_model
