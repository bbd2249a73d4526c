"""The experiment files of the family have exactly the published shapes."""

from pathlib import Path

import jax
import pytest

from mlm_jax import experiment
from mlm_jax.model import gpt2

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


# Radford et al. 2019, table 2, as released (openai-community/gpt2 and its sizes), and distilbert/distilgpt2.
@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2_124m", 124_439_808), ("gpt2_355m", 354_823_168), ("gpt2_774m", 774_030_080), ("gpt2_1558m", 1_557_611_200), ("distilgpt2", 81_912_576)],
)
def test_every_size_has_exactly_its_number_of_parameters(name: str, count: int) -> None:
    loaded = experiment.load(str(EXPERIMENTS / f"{name}.py"))
    assert loaded.config.data.tokenizer == "gpt2" and loaded.config.model.head_dim == 64
    model = loaded.with_changes({"model.vocab_size": 50_257})
    assert gpt2.n_params(jax.eval_shape(lambda: gpt2.init(model.build(model.config.model), jax.random.key(0)))) == count
