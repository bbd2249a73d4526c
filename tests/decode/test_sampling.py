"""Each setting does to a distribution what its name says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.config import InputError, SampleConfig, Sampling
from mlm_jax.decode.sampling import Seen, adjust, choose, filtered

PROBS = np.array([0.4, 0.05, 0.3, 0.15, 0.1], np.float32)
LOGITS = np.log(PROBS)


def frequencies(sampling: Sampling, n: int = 20_000) -> np.ndarray:
    drawn = choose(jnp.broadcast_to(jnp.asarray(LOGITS), (n, 5)), jax.random.split(jax.random.key(0), n), sampling)
    return np.bincount(drawn, minlength=5) / n


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), PROBS),
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=0.5), np.square(PROBS) / np.square(PROBS).sum()),
        (Sampling(top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
        (Sampling(top_k=100), PROBS),
        (Sampling(top_p=0.69), [4 / 7, 0, 3 / 7, 0, 0]),
        (Sampling(top_p=0.71), [0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (Sampling(top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [4 / 7, 0, 3 / 7, 0, 0]),
        (Sampling(min_p=0.3), [0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85, 0]),  # 0.3 x 0.4 = 0.12 is the least that stays
        (Sampling(min_p=1.0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=2.0, min_p=0.6), np.sqrt([0.4, 0, 0.3, 0.15, 0]) / np.sqrt([0.4, 0.3, 0.15]).sum()),  # after the temperature
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_setting_leaves(sampling, expected):
    # 20,000 draws: the standard error of a frequency is at most 0.0036.
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.015)
    assert (frequencies(sampling)[np.asarray(expected) == 0] == 0).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_sorting(top_p):
    logits_BV = 3 * np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    kept_BV = np.isfinite(filtered(jnp.asarray(logits_BV), Sampling(top_p=top_p)))
    probs_BV = np.exp(logits_BV.astype(np.float64)) / np.exp(logits_BV.astype(np.float64)).sum(-1, keepdims=True)
    for probs_V, kept_V in zip(probs_BV, kept_BV, strict=True):
        order = np.argsort(-probs_V)
        before = np.cumsum(probs_V[order]) - probs_V[order]  # the mass of the likelier tokens
        assert kept_V[order][before < top_p - 1e-6].all() and not kept_V[order][before > top_p + 1e-6].any()


def test_penalties_are_those_of_their_definitions():
    sampling = Sampling(repetition_penalty=2.0, frequency_penalty=0.5)
    prompt_BT, padding_B = jnp.array([[3, 0, 1]]), jnp.array([1])  # 3 stands in the padding
    seen = Seen.start(sampling, prompt_BT, padding_B, 5)
    for token in (2, 2, 1):
        seen = Seen.add(seen, jnp.array([token]))
    got = adjust(jnp.array([[1.0, -1.0, 3.0, 4.0, 5.0]]), seen, jnp.int32(3), 4, sampling)
    np.testing.assert_allclose(got, [[0.5, -2.0 - 0.5, 1.5 - 1.0, 4.0, 5.0]])


def test_banned_forced_and_ending_tokens():
    logits = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    inf = np.inf
    np.testing.assert_array_equal(adjust(logits, None, jnp.int32(0), 0, Sampling(banned=(3, 1))), [[1, -inf, 3, -inf]])
    np.testing.assert_array_equal(adjust(logits, None, jnp.int32(1), 3, Sampling(min_tokens=2)), [[1, 2, 3, -inf]])
    np.testing.assert_array_equal(adjust(logits, None, jnp.int32(2), 3, Sampling(min_tokens=2)), logits)
    forced = Sampling(forced=(2, 0))
    assert [int(adjust(logits, None, jnp.int32(n), 3, forced).argmax()) for n in range(4)] == [2, 0, 3, 3]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": float("inf")},
        {"min_tokens": -1},
        {"banned": (-1,)},
        {"forced": (0, -1)},
        {"num": 0},
        {"max_tokens": 0},
        {"beams": 0},
        {"stop": ("",)},
        {"overflow": "wrap"},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 99999999999999999999},
        {"length_penalty": float("nan")},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(InputError, match=f"^{name} = "):
        SampleConfig(**setting)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beams": 2, "num": 3}, "num = 3: more than beams = 2"),
        ({"beams": 2, "overflow": "window"}, "overflow = window: beam search does not slide"),
        ({"temperature": 0.0, "num": 2}, "num = 2: greedy continuations of a prompt are all the same"),
        ({"banned": (5, 3, 4), "forced": (4, 9, 3)}, r"^forced = \[3, 4\]: banned too. Take them out of banned or of forced\.$"),
        ({"beams": 2, "stop": ("a",)}, "^stop = .* ends none at a text. Set beams to 1"),
        ({"beams": 2, "temperature": 0.7}, r"^temperature = 0\.7: beam search draws nothing\. Leave it at 1\.0\.$"),
        ({"beams": 2, "top_k": 3}, "^top_k = 3: beam search draws nothing. Leave it at 0"),
        ({"beams": 2, "top_p": 0.5}, "^top_p = 0.5: beam search draws nothing. Leave it at 1.0"),
        ({"beams": 2, "min_p": 0.5}, "^min_p = 0.5: beam search draws nothing. Leave it at 0.0"),
        ({"length_penalty": 0.8}, "^length_penalty = 0.8: only beam search has a use for it. Leave it at 1.0"),
        ({"early_stopping": True}, "^early_stopping = True: only beam search has a use for it. Leave it at False"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SampleConfig(**settings)


def test_the_largest_seed_draws_otherwise_than_the_first():
    largest, first = (jax.random.key_data(jax.random.key(SampleConfig(seed=seed).seed)).tolist() for seed in (2**32 - 1, 0))
    assert largest != first
