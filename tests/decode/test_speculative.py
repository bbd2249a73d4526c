"""A draft changes the speed and not the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import sharding
from mlm_jax.config import InputError, ModelConfig, SampleConfig, override
from mlm_jax.decode import loop
from mlm_jax.decode.speculative import speculative
from mlm_jax.model import gpt2

PROMPTS = [[1, 2, 3], [7], list(range(40, 61))]
DRAFT = gpt2.GPT2(ModelConfig(vocab_size=257, context_len=64, n_layers=1, n_heads=1, d_model=16, d_ff=32))


@pytest.fixture(scope="module")
def draft_params(draw) -> gpt2.Params:
    return draw(DRAFT, 0.2, seed=5)


@pytest.mark.parametrize("drafted", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_greedy_text_is_the_models_own(model, params, draft_params, drafted):
    config = SampleConfig(temperature=0, max_tokens=25)
    decoding = loop.Decoding(model, params, PROMPTS, config, 256)
    decoding.advance(25)
    texts, per_call = speculative(model, params, DRAFT, draft_params, PROMPTS, config, 256, drafted=drafted)
    assert [text.tolist() for text, _ in texts] == [tokens.tolist() for tokens, _ in decoding.rows()]
    assert 1 <= per_call <= drafted + 1


def test_a_draft_that_is_the_model_itself_is_always_right(model, params):
    config = SampleConfig(max_tokens=25)
    texts, per_call = speculative(model, params, model, params, PROMPTS, config, -1, drafted=3)
    assert per_call > 3.5  # 24 tokens after the first in 6 calls
    assert [len(text) for text, _ in texts] == [25] * 3


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["model", "draft"])
def test_a_padded_vocabulary_beside_one_that_is_not_changes_nothing(model, params, draft_params, wide, padded):
    def texts(side, small, **settings):
        return [text.tolist() for text, _ in speculative(*side, *small, PROMPTS, SampleConfig(max_tokens=12, **settings), 256)[0]]

    sides = {"model": (model, params), "draft": (DRAFT, draft_params)}
    plain = [texts(*sides.values(), **settings) for settings in ({"temperature": 0}, {"seed": 3, "top_p": 0.9})]
    sides[wide] = padded(*sides[wide])
    assert [texts(*sides.values(), **settings) for settings in ({"temperature": 0}, {"seed": 3, "top_p": 0.9})] == plain


@pytest.mark.parametrize("settings", [pytest.param({"temperature": 0}, marks=pytest.mark.slow), {"temperature": 1.3, "top_k": 20, "num": 4}])
def test_log_probabilities_are_the_models_own(model, params, draft_params, settings):
    found, _ = speculative(model, params, DRAFT, draft_params, [[1, 2, 3]], SampleConfig(max_tokens=25, **settings), 256)
    for tokens, logprobs in found:
        text = np.array([1, 2, 3, *tokens, *[256] * (len(logprobs) - len(tokens))], np.int32)
        assert len(text) >= 28 or text[-1] == 256
        full_TV = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, text[None])[0]))
        np.testing.assert_allclose(logprobs, full_TV[np.arange(2, len(text) - 1), text[3:]], atol=1e-4)


@pytest.mark.slow
def test_a_draft_on_a_mesh_gives_the_text_of_one_device(model, params, padded, mesh):
    model, params = padded(model, params)
    draft = gpt2.GPT2(override(model.config, {"n_layers": 1}))
    draft_params = params | {"blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    prompts, config = [*PROMPTS, [9, 8, 7, 6, 5]], SampleConfig(temperature=0, max_tokens=25)
    alone, per_call = speculative(model, params, draft, draft_params, prompts, config, 256)
    with jax.sharding.set_mesh(mesh):
        placed, small = (jax.device_put(x, sharding.shardings(mesh, x)) for x in (params, draft_params))
        shared, _ = speculative(model, placed, draft, small, prompts, config, 256)
    assert [text.tolist() for text, _ in shared] == [text.tolist() for text, _ in alone]
    assert len({tuple(text.tolist()) for text, _ in alone}) == 4 and per_call > 1


def test_a_text_depends_on_its_number_and_the_seed_and_not_on_the_batch(model, params, draft_params):
    def texts(prompts, **settings):
        found, _ = speculative(model, params, DRAFT, draft_params, prompts, SampleConfig(max_tokens=12, **settings), 256)
        return [text.tolist() for text, _ in found]

    together = texts(PROMPTS, num=2)
    assert together == [text for prompt in PROMPTS for text in texts([prompt], num=2)]
    assert len({tuple(text) for text in together}) == 6 and texts(PROMPTS, num=2, seed=1) != together


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), {"temperature": 0.7, "top_k": 3}])
def test_text_is_distributed_as_the_models_own(settings, draw):
    # Three tokens of a vocabulary of 4: 64 texts, whose probabilities are products from the full forward pass.
    config = ModelConfig(vocab_size=4, context_len=8, n_layers=1, n_heads=2, d_model=16, d_ff=32)
    model, n = gpt2.GPT2(config), 20_000
    big, small = draw(model, 0.6), draw(model, 0.6, seed=1, shift=1)
    found, per_call = speculative(model, big, model, small, [[1, 2]], SampleConfig(max_tokens=3, num=n, **settings), -1, drafted=2)
    counts = np.bincount([int(text @ [16, 4, 1]) for text, _ in found], minlength=64)
    texts = np.array(list(np.ndindex(4, 4, 4)), np.int32)
    prompted_BT = np.concatenate([np.tile(np.array([[1, 2]], np.int32), (64, 1)), texts], axis=1)
    logits_BTV = np.asarray(jax.jit(model.apply)({"params": big}, prompted_BT), np.float64)
    logits_BTV = logits_BTV[:, 1:4] / settings.get("temperature", 1.0)
    if "top_k" in settings:
        logits_BTV[logits_BTV < np.sort(logits_BTV, axis=-1)[..., -settings["top_k"]][..., None]] = -np.inf
    probs_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    expected = n * np.take_along_axis(probs_BTV, texts[:, :, None], axis=-1)[..., 0].prod(axis=1)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    chi2 = (np.square(counts - expected)[likely] / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations of chi squared
    assert 1.05 < per_call < 2.95  # some guesses stayed and some went


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"repetition_penalty": 1.5}, "repetition_penalty = 1.5: looks at the text so far"),
        ({"overflow": "window"}, "draft: neither slides"),
        ({"max_tokens": 62}, "max_tokens = 62: with 3 prompt tokens"),
    ],
)
def test_what_a_draft_cannot_follow_is_refused(model, params, draft_params, settings, message):
    with pytest.raises(InputError, match=message):
        speculative(model, params, DRAFT, draft_params, [[1, 2, 3]], SampleConfig(**settings), 256)


def test_a_draft_with_another_vocabulary_is_refused(model, params, draw):
    other = gpt2.GPT2(ModelConfig(vocab_size=99, context_len=64, n_layers=1, n_heads=1, d_model=16, d_ff=32))
    with pytest.raises(InputError, match="draft = 99 tokens: the model has a vocabulary of 257"):
        speculative(model, params, other, draw(other, 0.2), [[1]], SampleConfig(), 256)


@pytest.mark.parametrize("drafted", [-3, 0, 64, 200])
def test_a_number_of_guesses_out_of_range_is_refused(model, params, draft_params, drafted):
    with pytest.raises(InputError, match=rf"^drafted = {drafted}: not a number of tokens from 1 to 63, one less than the context\. Give 4\.$"):
        speculative(model, params, DRAFT, draft_params, [[1]], SampleConfig(max_tokens=8), 256, drafted=drafted)


@pytest.mark.parametrize("sick", ["model", "draft"])
def test_parameters_that_are_no_numbers_are_refused(model, params, draft_params, sick):
    sides = {"model": params, "draft": draft_params}
    sides[sick] = jax.tree.map(lambda x: x * jnp.nan, sides[sick])
    with pytest.raises(InputError, match=r"^params: the logits"):
        speculative(model, sides["model"], DRAFT, sides["draft"], [[1]], SampleConfig(max_tokens=8), 256)
