"""The reference attention is the textbook's, every faster one equals it, and the choice between them never takes one that cannot do the call."""

import contextlib
import functools
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlm_jax.model.attention as module
from mlm_jax.config import InputError, MeshConfig, ModelConfig, override
from mlm_jax.model import gpt2
from mlm_jax.model.attention import Visibility, attention, interpreted
from mlm_jax.objectives import cross_entropy
from mlm_jax.sharding import make_mesh, spec
from tests import compilation

FAST = ("xla", "blocked", "splash", "flash")  # those that run on a CPU


def qkv(T: int, S: int):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, 3, n, 8)) for key, n in zip(keys, (T, S, S), strict=True)]


def test_each_query_gets_the_softmax_mean_of_the_values_it_sees():
    q, k, v = (np.asarray(x, np.float64) for x in qkv(4, 6))
    visible_TS = np.arange(6)[None] <= np.arange(4)[:, None] + 2
    expected = np.zeros((2, 3, 4, 8))
    for b, n, t in np.ndindex(2, 3, 4):
        seen = np.flatnonzero(visible_TS[t])
        weight = np.exp([q[b, n, t] @ k[b, n, s] / np.sqrt(8) for s in seen])
        expected[b, n, t] = (weight / weight.sum()) @ v[b, n, seen]
    np.testing.assert_allclose(attention(*qkv(4, 6), Visibility(start=jnp.int32(2))), expected, atol=1e-6)


def test_invisible_keys_get_no_gradient():
    q, k, v = qkv(4, 6)
    first = jnp.zeros((2, 4), jnp.int32), jnp.broadcast_to(jnp.minimum(jnp.arange(6), 1), (2, 6))  # all see the first key alone
    visibility = Visibility(causal=False, q_segments_BT=first[0], k_segments_BS=first[1])
    dk, dv = jax.grad(lambda k, v: attention(q, k, v, visibility).sum(), argnums=(0, 1))(k, v)
    assert (dv[:, :, 1:] == 0).all() and (dk == 0).all() and (dv[:, :, 0] != 0).all()


def test_dropout_zeroes_its_share_of_the_probabilities_and_scales_the_rest():
    # With one-hot values the output is the probabilities themselves.
    S = 64
    q = k = jnp.zeros((1, 2, S, S))
    v = jnp.broadcast_to(jnp.eye(S)[None, None], (1, 2, S, S))
    probs = attention(q, k, v, Visibility(causal=False), dropout=0.25, dropout_key=jax.random.key(0))
    kept = probs[probs > 0]
    assert abs(float((probs == 0).mean()) - 0.25) < 0.02
    np.testing.assert_allclose(kept, 1 / S / 0.75, rtol=1e-5)


def case(*, causal: bool = True, segmented: bool = False, K: int = 4, T: int = 256, B: int = 2, dtype: str = "float32", H: int = 16):
    """Four query heads, K key heads, a cotangent for the output, and the visibility; three segments in other places in each row."""
    keys = jax.random.split(jax.random.key(1), 5)
    arrays = [jax.random.normal(key, (B, n, T, H), dtype) for key, n in zip(keys, (4, K, K, 4), strict=False)]
    segments = jnp.sort(jax.random.randint(keys[4], (B, T), 0, 3), axis=1) if segmented else None
    return arrays, Visibility(causal=causal, q_segments_BT=segments, k_segments_BS=segments)


def outputs_and_gradients(implementation: str, arrays, visibility: Visibility, scale: float | None = None):
    """The output, and the gradients of its product with the cotangent by q, k and v; a kernel of a TPU is interpreted."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(lambda *x: attention(*x, visibility, implementation=implementation, scale=scale), q, k, v)
        return out, *pull(cotangent)

    with interpreted() if implementation in ("splash", "flash") else contextlib.nullcontext():
        return run(*arrays)


@functools.cache
def references(scale: float | None = None, **how):
    """What `outputs_and_gradients` gives for the reference and `case`."""
    return outputs_and_gradients("reference", *case(**how), scale)


def assert_equals_reference(implementation: str, scale: float | None = None, **how) -> None:
    ours, reference = outputs_and_gradients(implementation, *case(**how), scale), references(scale, **how)
    np.testing.assert_allclose(ours[0], reference[0], rtol=0, atol=1e-5)
    for gradient, expected in zip(ours[1:], reference[1:], strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "how",
    [{}, {"segmented": True, "K": 2}, {"causal": False, "segmented": True}, {"causal": False, "K": 1}],
    ids=lambda how: "-".join(how) or "plain",
)
def test_output_and_gradients_equal_the_references(monkeypatch, implementation, how):
    for name in ("MAX_BLOCK", "QUERIES"):
        monkeypatch.setattr(module, name, 128)  # two blocks: some are all visible, some partly, some not at all
    assert_equals_reference(implementation, scale=0.3, **how)


@pytest.mark.parametrize("implementation", ["splash", "flash"])
def test_one_block_of_all_positions_equals_the_reference_too(implementation):
    # Then splash takes another backward pass, and flash another forward pass.
    assert_equals_reference(implementation, segmented=True, K=2)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize(("T", "H", "K"), [*((T, H, K) for T, H in ((128, 64), (384, 8)) for K in (4, 2, 1)), (1152, 128, 2)])
def test_output_and_gradients_equal_the_references_at_every_size(implementation, causal, segmented, K, T, H):
    assert_equals_reference(implementation, causal=causal, segmented=segmented, K=K, T=T, H=H)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_bfloat16_stays_within_two_units_of_its_precision_of_float32(implementation):
    # Some versions of XLA add up products of bfloat16 in bfloat16 on a CPU: most of the room is theirs, 1.5 units at T = 256.
    arrays, visibility = case(dtype="bfloat16", segmented=True)
    exact = outputs_and_gradients("reference", [x.astype(jnp.float32) for x in arrays], visibility)
    for ours, true in zip(outputs_and_gradients(implementation, arrays, visibility), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.square(ours - true).mean() < (2 * jnp.finfo(jnp.bfloat16).eps) ** 2 * jnp.square(true).mean()


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_what_a_query_does_not_see_changes_nothing_bit_for_bit(monkeypatch, implementation):
    for name in ("MAX_BLOCK", "QUERIES"):
        monkeypatch.setattr(module, name, 128)
    arrays, _ = case()
    segments = jnp.broadcast_to(jnp.arange(256) >= 100, (2, 256)).astype(jnp.int32)
    visibility = Visibility(q_segments_BT=segments, k_segments_BS=segments)

    apply = jax.jit(lambda q, k, v: attention(q, k, v, visibility, implementation=implementation))
    with interpreted():
        before, later, first = (apply(*(x.at[:, :, there].add(3) for x in arrays[:3])) for there in (slice(0), slice(200, None), slice(100)))
    np.testing.assert_array_equal(before[:, :, :200], later[:, :, :200])  # a later position
    np.testing.assert_array_equal(before[:, :, 100:], first[:, :, 100:])  # another segment
    assert (before[:, :, 200:] != later[:, :, 200:]).any(axis=(0, 1, 3)).all() and (before[:, :, :100] != first[:, :, :100]).any(axis=(0, 1, 3)).all()


@pytest.mark.parametrize("implementation", FAST)
def test_eight_devices_compute_what_one_does_each_on_its_rows_and_heads(implementation):
    arrays, visibility = case(B=4, K=2, segmented=True, T=128)
    alone = outputs_and_gradients(implementation, arrays, visibility)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        together = outputs_and_gradients(implementation, arrays, visibility)
    for one, eight in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, eight, rtol=0, atol=1e-6)
    if implementation not in ("xla", "blocked"):  # the compiler splits those as it likes
        assert {shard.data.shape for shard in together[0].addressable_shards} == {(1, 2, 128, 16)}


def split_cases() -> list:
    """(implementation, parts of the positions, case); a few that hold all of them are not slow."""
    quick = [("auto", 2, 0), ("auto", 4, 2), ("auto", 8, 3), ("xla", 4, 2)]
    cases = [{}, {"segmented": True}, {"segmented": True, "K": 2}, {"K": 1}, {"causal": False, "segmented": True, "K": 2}]
    every = itertools.product(("auto", "xla"), (2, 4, 8), range(len(cases)))
    return [pytest.param(*who, cases[i], marks=() if (*who, i) in quick else pytest.mark.slow) for *who, i in every]


@pytest.mark.parametrize(("implementation", "context", "how"), split_cases())
def test_split_positions_give_the_output_and_gradients_of_one_device(implementation, context, how):
    arrays, visibility = case(B=4, T=64, **how)
    with jax.set_mesh(make_mesh(MeshConfig(context=context))):
        split = outputs_and_gradients(implementation, arrays, visibility)
    for one, many in zip(references(B=4, T=64, **how), split, strict=True):
        np.testing.assert_allclose(one, many, rtol=0, atol=1e-5)
    assert {shard.data.shape[2] for shard in split[0].addressable_shards} == {64 // context}


def test_split_positions_drop_the_same_probabilities_as_one_device():
    (q, k, v, _), visibility = case(T=64)
    apply = jax.jit(lambda *x: attention(*x, visibility, dropout=0.5, dropout_key=jax.random.key(3)))
    alone = apply(q, k, v)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        np.testing.assert_allclose(apply(q, k, v), alone, atol=1e-6)


def test_split_positions_gather_keys_and_values_and_no_device_has_the_scores_of_all_queries():
    arrays, visibility = case(B=4, K=2, T=64, segmented=True)

    def run(q, k, v, cotangent):
        out, pull = jax.vjp(lambda *x: attention(*x, visibility), q, k, v)
        return out, *pull(cotangent)

    mesh = make_mesh(MeshConfig(data=1, tensor=2, context=4))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, jax.NamedSharding(mesh, spec(axes))) for x, axes in zip(arrays, ("BNT.", "BKT.", "BKT.", "BNT."), strict=True)]
        text = jax.jit(run).lower(*placed).compile().as_text()
    assert re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text) == ["4,1,64,16"] * 2  # B K S H of the keys, and of the values
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert (4, 1, 2, 16, 64) in shapes  # B K G T S of the scores
    assert max(map(math.prod, shapes)) == 4 * 2 * 16 * 64


@pytest.mark.parametrize("implementation", ["splash", "flash"])
def test_a_kernel_that_needs_all_positions_is_refused_where_they_are_split_and_not_taken_by_auto(implementation):
    arrays, visibility = case(T=512)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))), interpreted():
        with pytest.raises(InputError, match=r"it needs all positions on one device, the mesh splits them in 4\. Set mesh\.context = 1, or"):
            attention(*arrays[:3], visibility, implementation=implementation)
        jax.eval_shape(lambda q, k, v: attention(q, k, v, visibility), *arrays[:3])


def test_within_a_shard_map_the_kernel_takes_the_part_that_it_is_given():
    arrays, visibility = case(T=128)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))), interpreted():
        heads = jax.P("data", "tensor")
        apply = jax.shard_map(lambda *x: attention(*x, visibility, implementation="splash"), in_specs=heads, out_specs=heads, check_vma=False)
        out = jax.jit(apply)(*arrays[:3])
    np.testing.assert_allclose(out, references(T=128)[0], atol=1e-5)


@pytest.fixture(scope="module")
def run_model():
    """Loss, logits and gradients of a small model with a given attention, compiled once for each."""
    config = ModelConfig(vocab_size=61, context_len=128, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=40, attention="reference")
    shapes = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))
    params = jax.jit(lambda: jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), shapes))()
    tokens_BW = jax.random.randint(jax.random.key(7), (2, 129), 0, 61)
    segments_BT = jnp.broadcast_to(jnp.arange(128) // 50, (2, 128))

    @functools.cache
    def run(attention: str):
        def loss(params):
            model = gpt2.GPT2(override(config, {"attention": attention}))
            logits = model.apply({"params": params}, tokens_BW[:, :-1], segments_BT=segments_BT)
            return cross_entropy(logits, tokens_BW[:, 1:]).mean(), logits

        with interpreted():
            return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    return run


@pytest.mark.parametrize("implementation", FAST)
def test_the_model_has_the_same_logits_loss_and_gradients(run_model, implementation):
    (loss, logits), gradients = run_model(implementation)
    (expected_loss, expected_logits), expected = run_model("reference")
    np.testing.assert_allclose(logits, expected_logits, atol=2e-5)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, expected)


def shape_of_call(implementation: str, options, **how):
    """The shape of the output of a call of `case`, with a key for dropout; nothing is computed."""

    def call():
        arrays, visibility = case(**how)
        return attention(*arrays[:3], visibility, implementation=implementation, dropout_key=jax.random.key(0), **options)

    return jax.eval_shape(call).shape


REFUSALS = {
    "splash on a CPU": ("splash", {}, ("cpu", 0.0), {}, "it runs on a TPU, this is a CPU. Set model.attention = auto."),
    "flash on a GPU": ("flash", {}, ("gpu", 9.0), {}, "it runs on a TPU, this is a GPU. Set model.attention = auto."),
    "cudnn on a CPU": ("cudnn", {}, ("cpu", 0.0), {}, "it runs on an NVIDIA GPU, this is a CPU. Set model.attention = auto."),
    "an old or an AMD GPU": ("cudnn", {}, ("gpu", 7.5), {}, "it needs an NVIDIA GPU of compute capability 8.0, here is 7.5."),
    "float32 in cudnn": ("cudnn", {}, ("gpu", 9.0), {}, "it computes in 16 bits, not in float32. Set model.compute_dtype = bfloat16, or"),
    "a wide head in cudnn": ("cudnn", {"dtype": "bfloat16", "H": 136}, ("gpu", 8.0), {}, "a multiple of 8 and at most 128 wide, it is 136."),
    "an odd head in cudnn": ("cudnn", {"dtype": "bfloat16", "H": 12}, ("gpu", 9.0), {}, "a multiple of 8 and at most 256 wide, it is 12."),
    "segments in cudnn": ("cudnn", {"dtype": "bfloat16", "segmented": True}, ("gpu", 9.0), {}, "it takes no segments. Set model.attention = auto."),
    "dropout in xla": ("xla", {}, ("cpu", 0.0), {"dropout": 0.1}, "it drops no attention probabilities. Set model.dropout = 0, or"),
    "dropout in splash": ("splash", {}, ("tpu", 0.0), {"dropout": 0.1}, "it drops no attention probabilities. Set model.dropout = 0, or"),
    "an odd length": ("splash", {"T": 100}, ("tpu", 0.0), {}, "100 positions are not a multiple of 128. Change the length, or set"),
    "a wide head": ("flash", {"H": 192}, ("tpu", 0.0), {}, "a head wider than 128 must be a multiple of it, it is 192. Change model.n_heads, or"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_named_implementation_that_cannot_do_the_call_is_refused_in_one_line(monkeypatch, what):
    implementation, how, machine, options, message = REFUSALS[what]
    monkeypatch.setattr(module, "hardware", lambda: machine)
    with pytest.raises(InputError) as refused:
        shape_of_call(implementation, options, **how)
    assert str(refused.value).startswith(f"model.attention = {implementation}: ") and message in str(refused.value)
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(module, "splash", lambda q_BNTH, *_, **__: q_BNTH)
    shape_of_call("auto", options, **how)  # the remedy works


def test_blocked_multiplies_no_query_with_the_keys_after_its_block(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 64)
    q, k, v, _ = case()[0]
    multiplied = str(jax.make_jaxpr(lambda *x: attention(*x, Visibility(), implementation="blocked"))(q, k, v))
    scores = re.findall(r"f32\[2,4,1,(\d+),(\d+)\] = dot_general", multiplied)  # the products with the values have 16 for keys
    assert [tuple(map(int, found)) for found in scores if found[1] != "16"] == [(64, 64), (64, 128), (64, 192), (64, 256)]


def test_keys_that_are_not_the_queries_positions_are_refused_by_a_kernel():
    q, k, v = qkv(128, 256)
    with interpreted(), pytest.raises(InputError, match="here are 128 queries and 256 keys"):
        attention(q, k, v, Visibility(), implementation="splash")


@pytest.mark.parametrize(("shape", "message"), [({"B": 2}, "4 parts of the mesh do not divide B = 2"), ({"B": 4, "K": 1}, "2 parts .* K = 1")])
def test_a_mesh_that_does_not_divide_the_call_is_refused_by_a_kernel_and_taken_by_auto(shape, message):
    arrays, visibility = case(T=128, **shape)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), interpreted():
        with pytest.raises(InputError, match=message):
            attention(*arrays[:3], visibility, implementation="splash")
        out = jax.jit(lambda q, k, v: attention(q, k, v, visibility))(*arrays[:3])
    np.testing.assert_allclose(out, outputs_and_gradients("reference", arrays, visibility)[0], atol=1e-6)


CHOICES = {
    "a CPU": (("cpu", 0.0), {"segmented": True}, {}, "blocked"),
    "a CPU, dropout": (("cpu", 0.0), {}, {"dropout": 0.1}, "reference"),
    "a TPU": (("tpu", 0.0), {}, {}, "splash"),
    "a TPU, bfloat16, segments, shared keys": (("tpu", 0.0), {"dtype": "bfloat16", "segmented": True, "K": 1}, {}, "splash"),
    "a TPU, an odd length": (("tpu", 0.0), {"T": 100}, {}, "blocked"),
    "a TPU, dropout": (("tpu", 0.0), {}, {"dropout": 0.1}, "reference"),
    "a TPU, dropout of nothing": (("tpu", 0.0), {}, {"dropout": 0.0}, "splash"),
    "a GPU": (("gpu", 8.0), {"dtype": "bfloat16"}, {}, "cudnn"),
    "a GPU, float32": (("gpu", 8.0), {}, {}, "reference"),
    "a GPU, segments": (("gpu", 8.0), {"dtype": "bfloat16", "segmented": True}, {}, "reference"),
    "a GPU, dropout": (("gpu", 8.0), {"dtype": "bfloat16"}, {"dropout": 0.1}, "reference"),
    "an old GPU": (("gpu", 7.5), {"dtype": "bfloat16"}, {}, "reference"),
}


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The implementations that calls went to; they compute nothing."""
    calls: list[str] = []

    def stand_in(name: str):
        def record(q_BNTH, *_, implementation: str = name, **__):
            calls.append(implementation)
            return q_BNTH

        return record

    for name in ("reference", "blocked", "splash", "flash", "from_jax"):
        monkeypatch.setattr(module, name, stand_in(name))
    return calls


@pytest.mark.parametrize("what", CHOICES)
def test_auto_takes_the_fastest_that_can_do_the_call(monkeypatch, taken, what):
    machine, how, options, expected = CHOICES[what]
    monkeypatch.setattr(module, "hardware", lambda: machine)
    shape_of_call("auto", options, **how)
    assert taken == [expected]


@pytest.mark.parametrize("implementation", ["auto", "reference", "splash", "flash", "cudnn"])
def test_a_call_that_continues_a_cache_goes_to_the_reference(taken, implementation):
    # On this machine, which has neither a TPU nor a GPU: who trained with a kernel can generate anywhere.
    attention(*qkv(1, 6), Visibility(start=jnp.int32(5)), implementation=implementation)
    assert taken == ["reference"]


def test_xla_continues_a_cache_as_the_reference_does():
    q, k, v = qkv(4, 16)
    visibility = Visibility(start=jnp.int32(7))
    xla, reference = (attention(q, k, v, visibility, implementation=name) for name in ("xla", "reference"))
    np.testing.assert_allclose(xla, reference, atol=1e-6)


def test_the_devices_of_the_mesh_say_what_the_call_is_for_and_else_the_default_device(monkeypatch):
    with interpreted():
        assert module.hardware() == ("tpu", 0.0)
    cpu = jax.devices()[0]

    class Gpu:
        platform, compute_capability = "gpu", "8.6"

    class Amd:
        platform, compute_capability = "gpu", "gfx942"

    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert module.hardware() == ("gpu", 8.6)
    with jax.default_device(cpu):
        assert module.hardware()[0] == "cpu"
    with jax.set_mesh(jax.sharding.Mesh([cpu], "data")):
        assert module.hardware()[0] == "cpu"
        assert jax.jit(lambda: jnp.ones(()) * (module.hardware()[0] == "cpu"))() == 1
    monkeypatch.setattr(jax, "devices", lambda: [Amd()])
    assert module.hardware() == ("gpu", 0.0)


@pytest.mark.parametrize("K", [4, 2])
def test_cudnn_lowers_for_a_gpu_that_is_not_there(monkeypatch, K):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91500)  # it asks the library, which is not here
    monkeypatch.setattr(module, "hardware", lambda: ("gpu", 8.0))
    (q, k, v, _), visibility = case(dtype="bfloat16", H=64, K=K)

    def loss(q, k, v):
        return attention(q, k, v, visibility, implementation="cudnn", scale=0.3).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    for call in ("@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("):
        (line,) = [line for line in text.splitlines() if call in line]
        assert "CAUSAL" in line and "fmha_scale\\22: 0.3" in line


@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="needs an NVIDIA GPU")
def test_cudnn_stays_within_two_units_of_its_precision_of_float32_on_a_gpu():
    code = f"import runpy; runpy.run_path({__file__!r})['compare_cudnn']()"
    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=compilation.as_users(JAX_PLATFORMS="cuda"), check=True, timeout=300
    )


def compare_cudnn() -> None:
    """Raises AssertionError where cuDNN, on the GPU at hand, is further from the reference than bfloat16 explains."""
    for how in ({}, {"K": 2}, {"causal": False}, {"T": 1024, "K": 1}):
        arrays, visibility = case(dtype="bfloat16", H=64, **how)
        exact = outputs_and_gradients("reference", [x.astype(jnp.float32) for x in arrays], visibility)
        for ours, true in zip(outputs_and_gradients("cudnn", arrays, visibility), exact, strict=True):
            assert jnp.square(ours - true).mean() < (2 * jnp.finfo(jnp.bfloat16).eps) ** 2 * jnp.square(true).mean(), how


AHEAD_OF_TIME = """
import sys, jax, jax.numpy as jnp
from jax.sharding import NamedSharding
from mlm_jax.config import MeshConfig
from mlm_jax.model.attention import Visibility, attention
from mlm_jax.plan import topology
from mlm_jax.sharding import make_mesh, spec

mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2), topology.parse(sys.argv[1]).devices())
q = jax.ShapeDtypeStruct((8, 12, 1024, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec("BN..")))
segments = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, spec("B.")))

for implementation, s in (("splash", segments), ("auto", None), ("flash", segments)):
    def loss(q, k, v, s):
        return attention(q, k, v, Visibility(q_segments_BT=s, k_segments_BS=s), implementation=implementation).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        hlo = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q, s).compile().as_text()
    kernels = hlo.count('custom_call_target="tpu_custom_call"')
    print(implementation, kernels, sum(hlo.count(name) for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")))
"""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_the_kernels_compile_for_a_tpu_without_communication_and_auto_finds_splash(topology):
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME, topology], env=compilation.as_users(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # Splash: a forward and a fused backward kernel; flash: a forward one, one for the keys and values, one for the queries.
    assert done.stdout.splitlines() == ["splash 2 0", "auto 2 0", "flash 3 0"]
