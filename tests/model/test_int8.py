"""Weights in 8 bits: rounded as by hand, multiplied exactly, a quarter of the size, and near the same text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlm_jax
from mlm_jax import cli, sharding
from mlm_jax.config import MeshConfig, ModelConfig, SampleConfig
from mlm_jax.decode import loop
from mlm_jax.model import gpt2
from mlm_jax.model.int8 import Int8, einsum, int8, quantize

CONFIG = ModelConfig(vocab_size=256, context_len=32, n_layers=2, n_heads=4, d_model=32, d_ff=64)
MODERN = {"activation": "swiglu", "n_kv_heads": 2, "tied_head": False, "biases": False, "vocab_multiple": 96}


def model_and_params(**changes):
    model = gpt2.GPT2(ModelConfig(**{**vars(CONFIG), **changes}))

    def draw():
        fresh = gpt2.init(model, jax.random.key(0))
        return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)

    return model, jax.jit(draw)()


def dequantized(params):
    is_int8 = lambda x: isinstance(x, Int8)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_int8(x) else x, params, is_leaf=is_int8)


def test_a_weight_is_rounded_by_the_largest_entry_of_its_channel():
    w_DF = jnp.array([[1.0, 0.0, -0.3], [-2.54, 0.0, 0.1]])
    w = quantize(w_DF, axes=(0,))
    np.testing.assert_array_equal(w.values, [[50, 0, -127], [-127, 0, 42]])  # 1 / (2.54 / 127) = 50; 0.1 / (0.3 / 127) = 42.3
    np.testing.assert_allclose(w.scale, [[0.02, 0, 0.3 / 127]], rtol=1e-6)
    np.testing.assert_allclose(w.astype(jnp.float32), [[1.0, 0, -0.3], [-2.54, 0, 42 * 0.3 / 127]], rtol=1e-6)


@pytest.mark.parametrize(
    ("letters", "x_shape", "w_shape"),
    [("BTD,DNH->BTNH", (3, 5, 4), (4, 2, 6)), ("BNTH,NHD->BTD", (3, 2, 5, 6), (2, 6, 4)), ("BTD,VD->BTV", (3, 5, 4), (7, 4))],
)
def test_on_one_device_a_product_and_its_gradients_are_numpys_and_sum_over_one_axis_of_tokens(letters, x_shape, w_shape):
    draw = np.random.default_rng(0)
    x, w = (draw.normal(size=shape).astype(np.float32) for shape in (x_shape, w_shape))
    (left, right), out = letters.split("->")[0].split(","), letters.split("->")[1]
    y, pull = jax.vjp(lambda x, w: einsum(letters, x, w), x, w)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        y_one, pull_one = jax.vjp(lambda x, w: einsum(letters, x, w), x, w)
        cotangent = draw.normal(size=y.shape).astype(np.float32)
        dx, dw = pull_one(cotangent)
        text = str(jax.make_jaxpr(lambda dy: pull_one(dy)[1])(cotangent))
    np.testing.assert_allclose(y_one, np.einsum(letters, x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum(f"{out},{right}->{left}", cotangent, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum(f"{left},{out}->{right}", x, cotangent), rtol=1e-5, atol=1e-5)
    assert "dimension_numbers=(([0], [0]), ([], []))" in text and "dimension_numbers=(([0, 1], [0, 1])" not in text
    for one, many in zip((dx, dw), pull(cotangent), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("letters", "x_shape", "w_shape", "summed"), [
    ("BTD,DF->BTF", (2, 3, 16), (16, 8), (0,)),
    ("BTD,DNH->BTNH", (2, 3, 16), (16, 4, 6), (0,)),
    ("BNTH,NHD->BTD", (2, 4, 3, 6), (4, 6, 16), (0, 1)),
    ("BTD,VD->BTV", (2, 3, 16), (9, 16), (1,)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_that_of_the_rounded_weight_to_14_bits(letters, x_shape, w_shape, summed, dtype):
    x = (10 * jax.random.normal(jax.random.key(0), x_shape)).astype(dtype)
    x = x.at[0, 0].set(0)  # a row of zeros has no largest entry to divide by
    w = quantize(jax.random.normal(jax.random.key(1), w_shape), summed)
    ours = einsum(letters, x, w, dtype=jnp.float32)
    exact = np.einsum(letters, np.asarray(x, np.float64), np.asarray(w.astype(jnp.float32), np.float64))
    np.testing.assert_allclose(ours, exact, atol=2**-14 * np.abs(x).max() * np.abs(w.astype(jnp.float32)).sum(summed).max())
    assert einsum(letters, x, w).dtype == dtype


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
def test_logits_are_those_of_the_rounded_weights(changes):
    model, params = model_and_params(**changes)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 20), 0, 256)
    rounded = int8(params)
    logits = jax.jit(lambda p: model.apply({"params": p}, tokens_BT)[..., :256])
    ours, expected = (np.asarray(logits(p)) for p in (rounded, dequantized(rounded)))
    np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())
    assert np.abs(ours - logits(params)).max() > 2e-3 * np.abs(expected).max()  # they are rounded


def test_the_weights_of_124m_take_a_quarter_of_the_memory():
    model = gpt2.GPT2(ModelConfig(vocab_size=50_257))
    shapes = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    small = jax.eval_shape(int8, shapes)
    assert bytes_of(shapes) == 4 * 124_439_808
    assert bytes_of(small) < 0.26 * bytes_of(shapes)
    kept = jax.tree.leaves_with_path(small, is_leaf=lambda x: isinstance(x, Int8))
    assert {path[-1].key for path, leaf in kept if not isinstance(leaf, Int8) and path[-1].key.startswith("w_")} == {"w_position_TD"}


@pytest.mark.slow
def test_text_from_the_cache_is_that_of_whole_passes():
    model, params = model_and_params()
    rounded = int8(params)
    decoding = loop.Decoding(model, rounded, [[5, 6, 7], [9]], SampleConfig(temperature=0, max_tokens=12), eot_id=-1)
    decoding.advance(12)
    for prompt, (tokens, _) in zip(([5, 6, 7], [9]), decoding.rows(), strict=True):
        whole = jnp.array([[*prompt, *tokens]])
        expected = model.apply({"params": rounded}, whole)[0, len(prompt) - 1 : -1].argmax(-1)
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_eight_devices_give_the_logits_of_one():
    model, params = model_and_params()
    tokens_BT = jax.random.randint(jax.random.key(1), (8, 16), 0, 256)
    expected = jax.jit(model.apply)({"params": int8(params)}, tokens_BT)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = int8(jax.tree.map(jax.device_put, params, sharding.shardings(mesh, params)))
    values = spread["blocks"]["mlp"]["w_up_DF"].values
    assert values.addressable_shards[0].data.size == values.size // 4  # over fsdp and tensor, as the weight was
    with jax.set_mesh(mesh):
        logits = jax.jit(model.apply)({"params": spread}, tokens_BT)
    np.testing.assert_allclose(logits, expected, atol=1e-3 * float(np.abs(expected).max()))


def test_a_trained_model_predicts_nearly_as_well(tiny_run, capfd):
    """Its perplexity moves by less than 0.5 percent, and moves."""
    found = []
    for flags in ([], ["--int8"]):
        capfd.readouterr()
        assert cli.main(["evaluate", str(tiny_run.folder), "--json", *flags]) == 0
        found.append(json.loads(capfd.readouterr().out)["perplexity"])
    assert 0 < abs(found[1] / found[0] - 1) < 5e-3


def test_generate_takes_int8_weights_by_flag_and_in_python(tiny_run, capfd):
    assert cli.main(["generate", str(tiny_run.folder), "--prompt", "def", "--max-tokens", "8", "--int8", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)["generations"][0]["text"]
    model, params, tokenizer = mlm_jax.load(tiny_run.folder)
    assert mlm_jax.generate(model, mlm_jax.int8(params), tokenizer, "def", max_tokens=8) == [said]
