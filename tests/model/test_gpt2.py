"""The model is GPT-2: its size, its initialisation, its causality, and names that say its shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.config import InputError, ModelConfig, override
from mlm_jax.model import gpt2
from mlm_jax.objectives import cross_entropy
from mlm_jax.sharding import axes_of

# Sizes that all differ, so that a wrong letter cannot hide.
CONFIG = ModelConfig(vocab_size=61, context_len=16, n_layers=5, n_heads=3, d_model=24, d_ff=40)
SIZE = {"V": 61, "T": 16, "L": 5, "N": 3, "K": 3, "D": 24, "H": 8, "F": 40}


@pytest.fixture(scope="module")
def params():
    """Parameters with every array perturbed, so that biases and gains matter too."""

    def draw():
        fresh = gpt2.init(gpt2.GPT2(CONFIG), jax.random.key(0))
        return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)

    return jax.jit(draw)()


def tokens(B: int, T: int) -> jax.Array:
    return jax.random.randint(jax.random.key(7), (B, T), 0, CONFIG.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def logits(model: gpt2.GPT2, params, tokens_BT: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens_BT)


def shapes_of(config: ModelConfig):
    return jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))


def test_every_parameter_is_shaped_as_its_name_says():
    leaves = jax.tree_util.tree_leaves_with_path(shapes_of(CONFIG))
    assert len(leaves) == 20
    for path, leaf in leaves:
        name = path[-1].key
        stacked = (SIZE["L"],) if path[0].key == "blocks" else ()
        assert leaf.shape == (*stacked, *(SIZE[letter] for letter in axes_of(name))), jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32
        assert name.split("_")[0] in ("w", "b", "scale"), name


def test_gpt2_small_has_124439808_parameters():
    # Source: Hugging Face openai-community/gpt2, head tied.
    assert gpt2.n_params(shapes_of(ModelConfig(vocab_size=50_257))) == 124_439_808


def test_no_position_sees_what_comes_after_it(params):
    tokens_BT = tokens(2, 16)
    changed_BT = tokens_BT.at[:, 9:].set((tokens_BT[:, 9:] + 1) % 61)
    apply = jax.jit(lambda t: gpt2.GPT2(CONFIG).apply({"params": params}, t))
    before, after = apply(tokens_BT), apply(changed_BT)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (jnp.abs(before[:, 9:] - after[:, 9:]).max(axis=(0, 2)) > 1e-3).all()


def test_every_position_sees_what_came_before_it(params):
    # The gradient of the last position's logits reaches the embedding of each position.
    def last(w_position_TD):
        return gpt2.GPT2(CONFIG).apply({"params": params | {"w_position_TD": w_position_TD}}, tokens(1, 16))[:, -1].var()

    reach_T = jnp.abs(jax.grad(last)(params["w_position_TD"])).max(axis=1)
    assert (reach_T > 0).all()


def test_logits_equal_a_plain_numpy_gpt2(params):
    # Written from the equations, one head and one position at a time.
    def norm(x, p):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p["scale_D"] + p["b_D"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    tokens_T = np.asarray(tokens(1, 6)[0])
    p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p64["w_token_VD"][tokens_T] + p64["w_position_TD"][: len(tokens_T)]
    for layer in range(5):
        p = jax.tree.map(lambda w, layer=layer: w[layer], p64["blocks"])
        a = p["attention"]
        h = np.stack([norm(row, p["norm_1"]) for row in x])
        mixed = np.zeros((len(x), 3, 8))
        for head in range(3):
            q = h @ a["w_q_DNH"][:, head] + a["b_q_NH"][head]
            k = h @ a["w_k_DKH"][:, head] + a["b_k_KH"][head]
            v = h @ a["w_v_DKH"][:, head] + a["b_v_KH"][head]
            for t in range(len(x)):
                weight = np.exp(k[: t + 1] @ q[t] / np.sqrt(8))
                mixed[t, head] = weight @ v[: t + 1] / weight.sum()
        x = x + np.tensordot(mixed, a["w_out_NHD"], 2) + a["b_out_D"]
        h = np.stack([norm(row, p["norm_2"]) for row in x])
        x = x + gelu(h @ p["mlp"]["w_up_DF"] + p["mlp"]["b_up_F"]) @ p["mlp"]["w_down_FD"] + p["mlp"]["b_down_D"]
    expected = np.stack([norm(row, p64["norm_f"]) for row in x]) @ p64["w_token_VD"].T
    got = jax.jit(lambda t: gpt2.GPT2(CONFIG).apply({"params": params}, t))(tokens_T[None])[0]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_initial_loss_is_near_ln_v():
    config = override(CONFIG, {"vocab_size": 500, "d_model": 48})
    model = gpt2.GPT2(config)
    tokens_BT = jax.random.randint(jax.random.key(1), (8, 17), 0, 500)
    logits_BTV = jax.jit(lambda t: model.apply({"params": gpt2.init(model, jax.random.key(0))}, t))(tokens_BT[:, :-1])
    assert abs(float(cross_entropy(logits_BTV, tokens_BT[:, 1:]).mean()) - np.log(500)) < 0.05


def test_initialisation_has_gpt2s_standard_deviations():
    model = gpt2.GPT2(override(CONFIG, {"d_model": 240, "d_ff": 400, "vocab_size": 999}))
    p = jax.jit(lambda: gpt2.init(model, jax.random.key(0)))()
    residual = 0.02 / np.sqrt(2 * 5)
    for array, std in (
        (p["w_token_VD"], 0.02),
        (p["w_position_TD"], 0.01),
        (p["blocks"]["attention"]["w_q_DNH"], 0.02),
        (p["blocks"]["attention"]["w_out_NHD"], residual),
        (p["blocks"]["mlp"]["w_up_DF"], 0.02),
        (p["blocks"]["mlp"]["w_down_FD"], residual),
    ):
        assert abs(float(array.std()) / std - 1) < 0.05 and abs(float(array.mean())) < std / 10
    first, second = p["blocks"]["mlp"]["w_up_DF"][:2]
    assert jnp.abs(first - second).max() > 0.01, "layers start alike"
    assert all((x == 0).all() for x in (p["norm_f"]["b_D"], p["blocks"]["mlp"]["b_up_F"])) and (p["norm_f"]["scale_D"] == 1).all()


@pytest.mark.parametrize("attention", ["splash", "flash", "cudnn", "blocked"])
def test_new_parameters_are_made_whatever_computes_attention(attention):
    """Also where that cannot run here, or not with so few positions as they are made with."""
    made = shapes_of(override(CONFIG, {"attention": attention}))
    assert made == shapes_of(CONFIG)


def test_unrolled_and_unstacked_layers_give_the_same_logits(params):
    tokens_BT = tokens(2, 16)
    scanned = logits(gpt2.GPT2(CONFIG), params, tokens_BT)
    unrolled = logits(gpt2.GPT2(override(CONFIG, {"unroll_layers": True})), params, tokens_BT)
    unstacked = logits(gpt2.GPT2(CONFIG, stacked=False), gpt2.unstack(params), tokens_BT)
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5)
    np.testing.assert_allclose(unstacked, scanned, atol=1e-5)


def test_the_cache_gives_the_logits_of_the_full_forward(params):
    tokens_BT, flat, flat_params = tokens(3, 16), gpt2.GPT2(CONFIG, stacked=False), gpt2.unstack(params)
    full_BTV = logits(gpt2.GPT2(CONFIG), params, tokens_BT)
    first_BTV, grown = jax.jit(lambda t: flat.apply({"params": flat_params}, t, cache_len=16, mutable=["cache"]))(tokens_BT[:, :5])
    got = [first_BTV]
    step = jax.jit(lambda cache, t, start: flat.apply({"params": flat_params, **cache}, t, start=start, mutable=["cache"]))
    for start, T in ((5, 1), (6, 1), (7, 4), (11, 5)):  # single tokens, and chunks
        next_BTV, grown = step(grown, tokens_BT[:, start : start + T], start)
        got.append(next_BTV)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), full_BTV, atol=1e-5)


def test_dropout_is_off_unless_asked_for_and_keeps_the_mean(params):
    model = gpt2.GPT2(override(CONFIG, {"dropout": 0.3}))
    tokens_BT = tokens(2, 16)
    np.testing.assert_array_equal(logits(model, params, tokens_BT), logits(gpt2.GPT2(CONFIG), params, tokens_BT))
    train = jax.jit(lambda key: model.apply({"params": params}, tokens_BT, train=True, rngs={"dropout": key}))
    a, b, again = train(jax.random.key(0)), train(jax.random.key(1)), train(jax.random.key(0))
    np.testing.assert_array_equal(a, again)
    assert jnp.abs(a - b).max() > 0.1


def test_bfloat16_compute_stays_near_float32_and_keeps_float32_parameters(params):
    model = gpt2.GPT2(override(CONFIG, {"compute_dtype": "bfloat16"}))
    assert {x.dtype for x in jax.tree.leaves(shapes_of(model.config))} == {jnp.dtype("float32")}
    got, full = (logits(m, params, tokens(2, 16)) for m in (model, gpt2.GPT2(CONFIG)))
    assert got.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(got - full).max()) < 0.05 * float(jnp.abs(full).max())


def test_a_text_longer_than_the_context_is_refused(params):
    with pytest.raises(InputError, match=r"17 positions: model\.context_len = 16"):
        gpt2.GPT2(CONFIG).apply({"params": params}, tokens(1, 17))
