"""Generation says what the full forward pass says, and each setting does what its name says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import decode
from mlm_jax.config import InputError, ModelConfig
from mlm_jax.data import tokenizer as tokenizers
from mlm_jax.model import gpt2

CONFIG = ModelConfig(vocab_size=257, context_len=64, n_layers=2, n_heads=2, d_model=32, d_ff=64)
MODEL = gpt2.GPT2(CONFIG)
GREEDY, EOT = decode.Sampling(temperature=0), 256


@pytest.fixture(scope="module")
def params():
    fresh = gpt2.init(MODEL, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


def generate(params, prompt, num=1, max_tokens=20, sampling=GREEDY, seed=0, eot_id=EOT):
    return decode.continuations(MODEL, params, prompt, num=num, max_tokens=max_tokens, eot_id=eot_id, sampling=sampling, seed=seed)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 44])
def test_greedy_tokens_are_those_of_the_full_forward_without_a_cache(params, length):
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    forward = jax.jit(lambda t: MODEL.apply({"params": params}, t))
    text = list(prompt)
    for _ in range(20):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(text)] = text
        text.append(int(forward(padded)[0, len(text) - 1].argmax()))
        if text[-1] == EOT:
            text.pop()
            break
    assert generate(params, prompt)[0].tolist() == text[length:]


def test_a_continuation_depends_on_its_number_and_the_seed_and_not_on_how_many_there_are(params):
    sampling = decode.Sampling()
    five = [row.tolist() for row in generate(params, [1, 2, 3], num=5, sampling=sampling)]
    assert [row.tolist() for row in generate(params, [1, 2, 3], num=2, sampling=sampling)] == five[:2]
    assert len({tuple(row) for row in five}) == 5
    assert [row.tolist() for row in generate(params, [1, 2, 3], num=5, sampling=sampling, seed=1)] != five


def test_text_stops_before_the_end_of_text_token(params):
    free = generate(params, [1, 2, 3])[0].tolist()
    end = free[4]
    assert generate(params, [1, 2, 3], eot_id=end)[0].tolist() == free[: free.index(end)]


def test_one_compiled_program_serves_prompts_of_many_lengths(params):
    generate(params, [1] * 17)
    prefills, decodes = decode.prefill._cache_size(), decode.decode._cache_size()
    for length in range(18, 33):
        generate(params, [1] * length, max_tokens=17 + length % 3)
    assert decode.prefill._cache_size() == prefills and decode.decode._cache_size() <= decodes + 1


def frequencies(logits, sampling, n=20_000):
    keys = jax.random.split(jax.random.key(0), n)
    drawn = decode.choose(jnp.broadcast_to(jnp.asarray(logits), (n, len(logits))), keys, sampling)
    return np.bincount(drawn, minlength=len(logits)) / n


LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.15, 0.1], np.float32))


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (decode.Sampling(), [0.4, 0.05, 0.3, 0.15, 0.1]),
        (decode.Sampling(temperature=0), [1, 0, 0, 0, 0]),
        (decode.Sampling(temperature=0.5), np.square([0.4, 0.05, 0.3, 0.15, 0.1]) / np.square([0.4, 0.05, 0.3, 0.15, 0.1]).sum()),
        (decode.Sampling(top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
        (decode.Sampling(top_k=100), [0.4, 0.05, 0.3, 0.15, 0.1]),
        (decode.Sampling(top_p=0.69), [4 / 7, 0, 3 / 7, 0, 0]),
        (decode.Sampling(top_p=0.71), [0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (decode.Sampling(top_p=0.01), [1, 0, 0, 0, 0]),
        (decode.Sampling(top_k=3, top_p=0.5), [4 / 7, 0, 3 / 7, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_setting_leaves(sampling, expected):
    # 20,000 draws: the standard error of a frequency is at most 0.0036.
    np.testing.assert_allclose(frequencies(LOGITS, sampling), expected, atol=0.015)
    assert (frequencies(LOGITS, sampling)[np.asarray(expected) == 0] == 0).all()


def test_generate_speaks_in_text(params):
    tokenizer = tokenizers.byte_level()
    texts = decode.generate(MODEL, params, tokenizer, "ab", num=2, max_tokens=5, temperature=0)
    assert texts == [tokenizer.decode(generate(params, [97, 98], max_tokens=5)[0])] * 2
    assert decode.generate(MODEL, params, tokenizer, max_tokens=5, temperature=0) == [tokenizer.decode(generate(params, [EOT], max_tokens=5)[0])]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num": 0}, "num = 0: nothing to generate"),
        ({"max_tokens": 0}, "max_tokens = 0: nothing to generate"),
        ({"max_tokens": 62}, r"max_tokens = 62: with 3 prompt tokens more than model\.context_len = 64\. Ask for at most 61"),
        ({"prompt": [1] * 64}, "Shorten the prompt to fewer than 64 tokens"),
        ({"prompt": [1, 300]}, "prompt = token 300: outside the model's vocabulary of 257"),
    ],
)
def test_what_cannot_be_generated_is_refused(params, changes, message):
    with pytest.raises(InputError, match=message):
        generate(params, **({"prompt": [1, 2, 3]} | changes))


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_a_sampling_setting_out_of_range_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(InputError, match=f"^{name} = "):
        decode.Sampling(**setting)
