"""Beam search finds what its rules say: all sequences where it is wide enough, and what transformers finds."""

import itertools
import warnings

import jax
import numpy as np
import pytest

from mlm_jax import huggingface, sharding
from mlm_jax.config import InputError, ModelConfig, SampleConfig
from mlm_jax.decode.beam import beam_search
from mlm_jax.model import gpt2

SMALL = gpt2.GPT2(ModelConfig(vocab_size=6, context_len=16, n_layers=1, n_heads=2, d_model=16, d_ff=32))


@pytest.fixture(scope="module")
def small_params(draw) -> gpt2.Params:
    return draw(SMALL, 0.5, seed=1)


def test_a_beam_wide_enough_finds_the_best_of_all_continuations(small_params):
    # By enumeration: every continuation of up to 3 tokens, ended by token 5 or by its length, scored by the full forward pass.
    prompt, eot, n = [1, 2], 5, 3
    forward = jax.jit(lambda t: jax.nn.log_softmax(SMALL.apply({"params": small_params}, t)))
    scores = {}
    for length in range(1, n + 1):
        for text in itertools.product(range(6), repeat=length):
            if eot in text[:-1] or (length < n and text[-1] != eot):
                continue
            logprobs_TV = np.asarray(forward(np.array([[*prompt, *text]], np.int32))[0], np.float64)
            scores[text] = sum(logprobs_TV[1 + i, token] for i, token in enumerate(text)) / length**0.7
    best = sorted(scores, key=lambda text: -scores[text])[:4]
    (found,) = beam_search(SMALL, small_params, [prompt], SampleConfig(beams=200, num=4, max_tokens=n, length_penalty=0.7), eot)
    assert [tokens.tolist() for tokens, _, _ in found] == [[t for t in text if t != eot] for text in best]
    np.testing.assert_allclose([score for _, _, score in found], [scores[text] for text in best], atol=1e-4)
    np.testing.assert_allclose([p.sum() for _, p, _ in found], [scores[text] * len(text) ** 0.7 for text in best], atol=1e-4)


def test_log_probabilities_of_beams_are_those_of_the_full_forward_whatever_the_penalties(model, params):
    (found,) = beam_search(model, params, [[1, 2, 3]], SampleConfig(beams=4, num=4, max_tokens=10, repetition_penalty=1.8, banned=(7,)), 256)
    for tokens, logprobs, score in found:
        text = np.array([1, 2, 3, *tokens, *[256] * (len(logprobs) - len(tokens))], np.int32)
        full_TV = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, text[None])[0]))
        np.testing.assert_allclose(logprobs, full_TV[np.arange(2, len(text) - 1), text[3:]], atol=1e-4)
        assert score <= logprobs.sum() / len(logprobs) + 1e-4  # the penalty is in the score alone


@pytest.mark.slow
def test_beams_on_a_mesh_are_those_of_one_device(model, params, padded, mesh):
    model, params = padded(model, params)
    prompts, config = [[1, 2, 3], [7], list(range(40, 61)), [9, 8, 7, 6, 5]], SampleConfig(beams=3, num=2, max_tokens=12)
    alone = beam_search(model, params, prompts, config, 256)
    with jax.sharding.set_mesh(mesh):
        shared = beam_search(model, jax.device_put(params, sharding.shardings(mesh, params)), prompts, config, 256)
    for one, other in zip(alone, shared, strict=True):
        assert [tokens.tolist() for tokens, _, _ in one] == [tokens.tolist() for tokens, _, _ in other]
        np.testing.assert_allclose([s for _, _, s in one], [s for _, _, s in other], atol=1e-4)


def test_prompts_of_different_lengths_in_one_batch_give_what_each_gives_alone(model, params):
    prompts, config = [[1, 2, 3], [7], list(range(40, 61))], SampleConfig(beams=3, num=3, max_tokens=10)
    together = beam_search(model, params, prompts, config, 256)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = beam_search(model, params, [prompt], config, 256)
        assert [tokens.tolist() for tokens, _, _ in found] == [tokens.tolist() for tokens, _, _ in alone]
        np.testing.assert_allclose([s for _, _, s in found], [s for _, _, s in alone], atol=1e-4)


def test_what_the_context_cannot_hold_is_refused(model, params):
    with pytest.raises(InputError, match="max_tokens = 62"):
        beam_search(model, params, [[1, 2, 3]], SampleConfig(beams=2, max_tokens=62), 256)


def test_parameters_that_are_no_numbers_are_refused(model, params):
    with pytest.raises(InputError, match=r"^params: the logits"):
        beam_search(model, jax.tree.map(lambda x: x * np.nan, params), [[1]], SampleConfig(beams=2, max_tokens=4), 256)


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 2},
        {"beams": 4, "num": 4},
        {"beams": 4, "num": 2, "length_penalty": 2.0},
        {"beams": 3, "num": 3, "length_penalty": 0.0},
        {"beams": 3, "num": 3, "length_penalty": -1.0},
        {"beams": 5, "num": 5, "early_stopping": True},
        {"beams": 4, "num": 2, "repetition_penalty": 1.7, "banned": (3, 11)},
        {"beams": 3, "num": 2, "min_tokens": 6},
    ],
)
def test_twenty_prompts_give_the_sequences_and_scores_of_transformers(tmp_path, settings, draw):
    import torch
    import transformers

    config = ModelConfig(vocab_size=40, context_len=64, n_layers=2, n_heads=2, d_model=32, d_ff=64)
    model, eot = gpt2.GPT2(config), 39
    params = draw(model, 0.25, seed=3)
    huggingface.export_weights(config, jax.tree.map(np.asarray, params), tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 39, draw.integers(1, 20)).tolist() for _ in range(20)]
    chosen = SampleConfig(max_tokens=16, **settings)
    found = beam_search(model, params, prompts, chosen, eot)
    names = {"beams": "num_beams", "num": "num_return_sequences", "banned": "bad_words_ids", "min_tokens": "min_new_tokens"}
    kwargs = {names.get(name, name): [[i] for i in value] if name == "banned" else value for name, value in settings.items()}
    ended = 0
    for prompt, ours in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=eot,
                pad_token_id=eot,
                return_dict_in_generate=True,
                output_scores=True,
                **kwargs,
            )
        rows = [row[len(prompt) :].tolist() for row in out.sequences]
        rows = [row[: row.index(eot)] if eot in row else row for row in rows]
        assert [tokens.tolist() for tokens, _, _ in ours] == rows
        scores = [score for _, _, score in ours]  # sums of hundreds of nats in float32
        np.testing.assert_allclose(scores, out.sequences_scores.numpy(), rtol=1e-6, atol=1e-4)
        ended += sum(len(row) < 16 for row in rows)
    assert ended > 0  # the end of text was met, or the rules about it were not tried
