"""Generation says what the full forward pass says, whatever the batch, the mesh and the length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import sharding
from mlm_jax.config import InputError, MeshConfig, ModelConfig, SampleConfig, override
from mlm_jax.decode import loop
from mlm_jax.model import gpt2

EOT = 256
PROMPTS = [[1, 2, 3], [7], list(range(40, 61)), [9, 8, 7, 6, 5]]


def run(model, params, prompts, *, eot_id=EOT, **settings) -> list[list[int]]:
    decoding = loop.Decoding(model, params, prompts, SampleConfig(**{"max_tokens": 20, **settings}), eot_id)
    decoding.advance(10**6)
    return [tokens.tolist() for tokens, _ in decoding.rows()]


@functools.cache
def forward_of(model):
    return jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT))


def greedy(model, params, prompt, n: int) -> list[int]:
    """The likeliest tokens one by one, from the full forward pass without a cache."""
    forward, text, T = forward_of(model), list(prompt), model.config.context_len
    for _ in range(n):
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(text)] = text
        text.append(int(forward(params, padded)[0, len(text) - 1].argmax()))
        if text[-1] == EOT:
            return text[len(prompt) : -1]
    return text[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 16, 17, 44])
def test_greedy_tokens_are_those_of_the_full_forward_without_a_cache(model, params, length):
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    assert run(model, params, [prompt], temperature=0) == [greedy(model, params, prompt, 20)]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "num": 2}, {"repetition_penalty": 1.5, "top_p": 0.9}])
def test_prompts_of_different_lengths_in_one_batch_give_the_text_that_each_gives_alone(model, params, settings):
    together = run(model, params, PROMPTS, **settings)
    assert together == [row for prompt in PROMPTS for row in run(model, params, [prompt], **settings)]
    assert len({tuple(row) for row in together}) == len(together)


def test_a_continuation_depends_on_its_number_and_the_seed_and_not_on_how_many_there_are(model, params):
    five = run(model, params, [[1, 2, 3]], num=5)
    assert run(model, params, [[1, 2, 3]], num=2) == five[:2]
    assert len({tuple(row) for row in five}) == 5
    assert run(model, params, [[1, 2, 3]], num=5, seed=1) != five


def test_text_stops_before_the_end_of_text_token(model, params):
    (free,) = run(model, params, [[1, 2, 3]], temperature=0)
    end = free[4]
    assert run(model, params, [[1, 2, 3]], temperature=0, eot_id=end) == [free[: free.index(end)]]


def test_going_on_in_steps_gives_the_same_tokens_as_at_once(model, params):
    decoding = loop.Decoding(model, params, PROMPTS, SampleConfig(max_tokens=20), EOT)
    while not decoding.ended:
        decoding.advance(decoding.n + 3)
    assert [tokens.tolist() for tokens, _ in decoding.rows()] == run(model, params, PROMPTS)


def test_log_probabilities_are_those_of_the_full_forward(model, params):
    decoding = loop.Decoding(model, params, [[1, 2, 3]], SampleConfig(max_tokens=12, temperature=1.3, top_k=20), EOT)
    decoding.advance(12)
    ((tokens, logprobs),) = decoding.rows()
    text = np.concatenate([[1, 2, 3], tokens])[None].astype(np.int32)
    full_TV = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, jnp.asarray(text))[0]), np.float64)
    np.testing.assert_allclose(logprobs[: len(tokens)], [full_TV[2 + i, token] for i, token in enumerate(tokens)], atol=1e-4)


def test_one_compiled_program_serves_prompts_of_many_lengths(model, params):
    run(model, params, [[1] * 25], max_tokens=17)
    before = loop.prefill._cache_size(), loop.advance._cache_size()
    for length in range(25, 33):
        run(model, params, [[1] * length], max_tokens=17 + length % 8)
    after = loop.prefill._cache_size(), loop.advance._cache_size()
    assert after[0] - before[0] <= 1 and after[1] - before[1] <= 1  # 49 to 57 positions: one more bucket


@pytest.mark.slow
def test_past_the_context_length_a_row_goes_on_from_its_last_half(model, params):
    # By hand: greedy from what is visible; 64 positions seen predict one token more, then the last 32 are what is visible.
    prompt, visible, expected = [1, 2, 3], [1, 2, 3], []
    for _ in range(150):
        if len(visible) > 64:
            visible = visible[-32:]
        (token,) = greedy(model, params, visible, 1)
        visible.append(token)
        expected.append(token)
    assert run(model, params, [prompt], temperature=0, max_tokens=150, overflow="window", eot_id=-1) == [expected]


@pytest.mark.slow
def test_sliding_is_the_same_whatever_the_batch(model, params):
    together = run(model, params, PROMPTS, max_tokens=100, overflow="window", eot_id=-1)
    assert [len(row) for row in together] == [100] * 4
    assert together == [row for prompt in PROMPTS for row in run(model, params, [prompt], max_tokens=100, overflow="window", eot_id=-1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_multiple": 128},
        {"position": "rotary", "n_kv_heads": 1, "qk_norm": True, "vocab_multiple": 128},
    ],
)
def test_generation_on_a_mesh_equals_that_on_one_device(model, changes):
    model = gpt2.GPT2(override(model.config, changes))
    params = jax.jit(lambda: jax.tree.map(lambda x: 5 * x, gpt2.init(model, jax.random.key(0))))()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4 // model.config.n_keys, tensor=model.config.n_keys), jax.devices())
    alone = run(model, params, PROMPTS, num=2)
    with jax.sharding.set_mesh(mesh):
        assert run(model, jax.device_put(params, sharding.shardings(mesh, params)), PROMPTS, num=2) == alone


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[1, 2, 3]], {"max_tokens": 62}, r"max_tokens = 62: with 3 prompt tokens more than model\.context_len = 64\. Ask for at most 61"),
        ([[1] * 64], {}, "Shorten the prompt to fewer than 64 tokens"),
        ([[1, 300]], {}, "prompt = token 300: outside the model's vocabulary of 257"),
        ([[1]], {"banned": (3, 300)}, "^banned = token 300: outside the model's vocabulary of 257. Give ids below 257"),
        ([[1]], {"forced": (257,)}, "^forced = token 257: outside the model's vocabulary of 257. Give ids below 257"),
        ([[1], []], {}, "prompt: holds no token"),
        ([], {}, "prompt: holds no token"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, params, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        run(model, params, prompts, **settings)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("changes", [{}, {"vocab_multiple": 128}])
def test_parameters_that_are_no_numbers_are_refused(model, changes, value):
    model = gpt2.GPT2(override(model.config, changes))
    healthy = jax.jit(lambda: gpt2.init(model, jax.random.key(0)))()
    assert len(run(model, healthy, [[1, 2, 3]], max_tokens=3, eot_id=-1)[0]) == 3
    sick = jax.tree_util.tree_map_with_path(lambda path, x: x.at[0].set(value) if "norm_f" in str(path) else x, healthy)
    with pytest.raises(InputError, match=r"^params: the logits that the model computes with them are not finite\. Use a checkpoint from before"):
        run(model, sick, [[1, 2, 3]], max_tokens=3, eot_id=-1)


def kept() -> list[int]:
    """Identities of the leaves whose unstacked copies are kept."""
    return [id(ref()) for refs, _, _ in loop._flat for ref in refs]


def test_edited_parameters_are_never_taken_for_those_before_the_edit(params):
    fresh, first = jax.tree.map(lambda x: x + 0, params), None
    for i in range(50):
        blocks = fresh["blocks"]
        edited = fresh | {"blocks": blocks | {"mlp": blocks["mlp"] | {"w_up_DF": jnp.full_like(blocks["mlp"]["w_up_DF"], i)}}}
        assert float(loop.flat(edited)["block_0"]["mlp"]["w_up_DF"].max()) == i
        first = first or id(jax.tree.leaves(edited)[0])
        assert kept().count(first) == 1  # every edit shares the first leaf: copies of those that are gone are gone
        del edited
        assert first not in kept()


def test_an_array_that_is_written_into_is_read_again(params):
    mine = jax.tree.map(np.array, params)
    loop.flat(mine)
    mine["blocks"]["mlp"]["w_up_DF"][:] = 7
    assert float(loop.flat(mine)["block_1"]["mlp"]["w_up_DF"].min()) == 7


def test_two_trees_are_kept_and_no_more(params):
    trees = [jax.tree.map(lambda x: x + 0, params) for _ in range(3)]
    a, b = loop.flat(trees[0]), loop.flat(trees[1])
    assert loop.flat(trees[0]) is a and loop.flat(trees[1]) is b and loop.flat(trees[0]) is a
    loop.flat(trees[2])
    assert len(loop._flat) == 2 and loop.flat(trees[0]) is a and loop.flat(trees[1]) is not b


@pytest.mark.slow
def test_the_readmes_fifty_prompts_compile_five_prefills_and_three_loops():
    model = gpt2.GPT2(ModelConfig(vocab_size=11, context_len=128, n_layers=1, n_heads=1, d_model=8, d_ff=16))
    params, before = jax.jit(lambda: gpt2.init(model, jax.random.key(0)))(), (loop.prefill._cache_size(), loop.advance._cache_size())
    for length in range(1, 51):
        assert len(run(model, params, [[1] * length], max_tokens=32, eot_id=-1)[0]) == 32
    assert (loop.prefill._cache_size() - before[0], loop.advance._cache_size() - before[1]) == (5, 3)
