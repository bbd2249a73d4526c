"""Products in 8 bits: rounded as by hand, differentiated as their formula says, the same on any mesh, and a loss that hardly knows."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import cli, objectives, sharding
from mlm_jax.config import Config, InputError, MeshConfig, ModelConfig, OptimConfig, TrainConfig, override
from mlm_jax.model import gpt2, int8, low_precision
from mlm_jax.train import first_state, lower_step
from tests import compilation

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(vocab_size=61, context_len=16, n_layers=2, n_heads=4, d_model=32, d_ff=64)
CASES = [  # letters, shapes of activations and weight, the axes of both that are summed
    ("BTD,DNH->BTNH", (2, 3, 16), (16, 4, 6), (2,), (0,)),
    ("BNTH,NHD->BTD", (2, 4, 3, 6), (4, 6, 16), (1, 3), (0, 1)),
    ("BTF,FD->BTD", (2, 3, 24), (24, 16), (2,), (0,)),
]
LOW = ("int8", "fp8")


# ---- by hand, in float64: every scale is the largest entry over the largest number of the type ----


def to_int8(x):
    """The nearest integer from -128 to 127; qwix's scale is the largest entry over 127.5."""
    return np.clip(np.round(x * 127.5), -128, 127) / 127.5


def to_float8(x, digits, largest, smallest):
    """The nearest number with `digits` binary digits after the first, at most `largest`; below the exponent `smallest` they are evenly spaced."""
    x = np.asarray(x, np.float64) * largest
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), smallest)
    unit = 2.0 ** (exponent - digits)
    return np.round(x / unit) * unit / largest


FORWARD = {"int8": to_int8, "fp8": lambda x: to_float8(x, 3, 448, -6)}  # e4m3
BACKWARD = {"int8": to_int8, "fp8": lambda x: to_float8(x, 2, 57344, -14)}  # e5m2


def by_hand(rounding, x, axes):
    largest = np.abs(x).max(axes, keepdims=True)
    largest = np.where(largest == 0, 1, largest)
    return rounding(x / largest) * largest, largest


def case(letters, x_shape, w_shape):
    """Activations, weight and gradient of the product; the largest entries are positive: -127.5 would be on the edge between two integers."""

    def draw(seed, shape):
        return jax.random.uniform(jax.random.key(seed), shape, minval=-0.1)

    x, w = draw(0, x_shape), draw(1, w_shape)
    x = x.at[0].multiply(50)  # one row must not cost the others their digits
    return x, w, draw(2, jax.eval_shape(lambda: jnp.einsum(letters, x, w)).shape)


@pytest.mark.parametrize(("letters", "x_shape", "w_shape", "x_axes", "w_axes"), CASES)
@pytest.mark.parametrize("matmul", LOW)
def test_a_product_and_its_gradients_are_those_of_the_stated_rounding(matmul, letters, x_shape, w_shape, x_axes, w_axes):
    x, w, dy = case(letters, x_shape, w_shape)

    @jax.jit
    def computed(x, w, dy):
        y, pull = jax.vjp(lambda x, w: low_precision.einsum(letters, x, w, matmul), x, w)
        return y, *pull(dy)

    X, W, DY = (np.asarray(a, np.float64) for a in (x, w, dy))
    left, right, out = letters.replace("->", ",").split(",")
    (r_x, s_x), (r_w, s_w) = by_hand(FORWARD[matmul], X, x_axes), by_hand(FORWARD[matmul], W, w_axes)
    of_x, _ = by_hand(BACKWARD[matmul], DY * s_w.squeeze(w_axes), tuple(range(2, len(out))))
    of_w, _ = by_hand(BACKWARD[matmul], DY * s_x.reshape(2, 3, *[1] * (len(out) - 2)), (0, 1))
    to_y, to_x, to_w = letters, f"{out},{right}->{left}", f"{left},{out}->{right}"
    stated = np.einsum(to_y, r_x, r_w), np.einsum(to_x, of_x, r_w / s_w), np.einsum(to_w, r_x / s_x, of_w)
    exact = np.einsum(to_y, X, W), np.einsum(to_x, DY, W), np.einsum(to_w, X, DY)
    for got, expected, true in zip(computed(x, w, dy), stated, exact, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
        error = np.linalg.norm(got - true) / np.linalg.norm(true)
        assert 1e-4 < error < (0.01 if matmul == "int8" else 0.1)


def test_more_rows_than_an_int32_can_sum_are_summed_in_parts(monkeypatch):
    x, w = jnp.full((4, 3, 8), 1.0), jnp.full((8, 5), 1.0)
    gradient = jax.jit(jax.grad(lambda w: low_precision.einsum("BTD,DF->BTF", x, w, "int8").sum()))
    whole = gradient(w)
    monkeypatch.setattr(low_precision, "SUMMANDS", 6)
    gradient.clear_cache()
    np.testing.assert_allclose(gradient(w), whole, rtol=1e-6)
    assert re.search(r"i32\[2,(8,5|5,8)\] = dot_general", str(jax.make_jaxpr(gradient)(w)))  # two rows of three tokens in each part
    assert 128 * 128 * 2**17 <= 2**31  # what is rounded is -128 to 127


@pytest.mark.parametrize(("matmul", "bad"), [("int8", np.nan), ("int8", np.inf), ("fp8", np.nan), ("fp8", np.inf)])
def test_what_is_not_finite_stays_so_for_the_guard_to_see(matmul, bad):
    x, w = jnp.ones((2, 3, 4)).at[0, 1, 2].set(bad), jnp.ones((4, 5))
    y_BTF = np.asarray(low_precision.einsum("BTD,DF->BTF", x, w, matmul))
    assert not np.isfinite(y_BTF[0, 1]).any() and np.isfinite(np.delete(y_BTF.reshape(6, 5), 1, 0)).all()


def test_a_weight_that_is_rounded_already_is_multiplied_as_before():
    x, w = jnp.ones((2, 3, 4)), int8.quantize(jax.random.normal(jax.random.key(0), (4, 5)), (0,))
    np.testing.assert_array_equal(int8.einsum("BTD,DF->BTF", x, w, matmul="fp8"), int8.einsum("BTD,DF->BTF", x, w))


def gradient_of(**changes):
    """(a function of parameters that gives loss and gradients of a small model in training, parameters)."""
    model = gpt2.GPT2(override(CONFIG, changes))
    tokens_BW = jax.random.randint(jax.random.key(1), (4, 17), 0, 61)

    def loss(params):
        return objectives.cross_entropy(model.apply({"params": params}, tokens_BW[:, :-1], train=True), tokens_BW[:, 1:]).mean()

    return jax.value_and_grad(loss), lambda: gpt2.init(model, jax.random.key(0))


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("full", 5), ("dots", 0)])
def test_the_products_of_the_blocks_are_in_8_bits_and_no_others(remat, again):
    gradient, init = gradient_of(matmul="int8", remat=remat)
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(jax.make_jaxpr(gradient)(jax.eval_shape(init))))
    # Once in each body of a scan: forward, with two gradients each, and what is computed again: nothing needs the last product
    # of a block; `dots` keeps all of them, not as int32.
    assert products.count("i32") == 3 * 6 + again
    assert products.count("f32") == 3 * 3 + 2 * (remat != "none")  # scores, mixed values and the head


@functools.cache
def plain_gradient(matmul):
    """(parameters, the loss, gradients) of the small model as it is."""
    gradient, init = gradient_of(matmul=matmul)
    params = init()
    return params, *jax.jit(gradient)(params)


@pytest.mark.slow
@pytest.mark.parametrize("matmul", LOW)
@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"unroll_layers": True}], ids=str)
def test_neither_rematerialisation_nor_unrolling_changes_the_gradient(matmul, changes):
    params, expected_loss, expected = plain_gradient(matmul)
    loss, got = jax.jit(gradient_of(matmul=matmul, **changes)[0])(params)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        if path[-1].key != "b_k_KH":  # its true gradient is zero
            assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other), jax.tree_util.keystr(path)  # a tie may round to the other side


def test_eight_devices_multiply_as_one_does_and_send_a_weight_in_8_bits():
    letters, shapes = "BTD,DF->BTF", ((8, 4, 32), (32, 16))
    x, w, dy = case(letters, *shapes)

    def computed(x, w, dy):
        y, pull = jax.vjp(lambda x, w: low_precision.einsum(letters, x, w, "int8"), x, w)
        return y, *pull(dy)

    expected = jax.jit(computed)(x, w, dy)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        spread = [jax.device_put(a, jax.NamedSharding(mesh, sharding.spec(name))) for a, name in ((x, "BT."), (w, "DF"), (dy, "BTF"))]
        compiled = jax.jit(computed).lower(*spread).compile()
        for got, one in zip(compiled(*spread), expected, strict=True):
            np.testing.assert_allclose(got, one, atol=1e-5 * float(jnp.abs(one).max()))
    gathered = [line.split(" = ")[1] for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert any(line.startswith("s8[") for line in gathered) and not any(line.startswith("f32[32,") for line in gathered), gathered


def curve(matmul, mesh_config, n_devices, steps=4):
    """(losses, parameters) of a few training steps on a mesh, with the loss in chunks."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:n_devices])
    optim_config = OptimConfig(peak_lr=1e-3, end_lr=1e-4, warmup_steps=2, eps=1e-4)  # eps: Adam would blow up what rounding leaves of a zero gradient
    model_config = override(CONFIG, {"matmul": matmul, "vocab_size": 64})
    config = Config(name="curve", model=model_config, optim=optim_config, train=TrainConfig(steps=steps, loss_chunks=2))
    model = gpt2.GPT2(model_config)
    with jax.sharding.set_mesh(mesh):
        state, step = first_state(config, model, mesh), lower_step(config, model, mesh, 8).compile()
        rows = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
        losses = []
        for _ in range(steps):
            state, measured = step(state, sharding.put_rows(lambda a, b: rows[a:b], rows.shape, np.int32, mesh))
            losses.append(float(measured["loss"]))
    return losses, jax.device_get(state.params)


@functools.cache
def curve_of_one_device(matmul):
    return curve(matmul, MeshConfig(), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("matmul", "sizes"),
    [
        ("int8", {"data": 1, "fsdp": 4, "tensor": 2}),
        ("int8", {"data": 2, "fsdp": 2, "context": 2}),
        ("fp8", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_eight_devices_train_as_one_does(matmul, sizes):
    """But for numbers between two integers that another order of summation rounds to the other one."""
    losses, params = curve(matmul, MeshConfig(**sizes), 8)
    expected, one_params = curve_of_one_device(matmul)
    assert losses[0] > losses[-1]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for (path, got), one in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(one_params), strict=True):
        if path[-1].key != "b_k_KH":  # its true gradient is zero
            assert np.linalg.norm(got - one) < 0.05 * np.linalg.norm(one), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("matmul", LOW)
def test_a_run_trains_is_evaluated_and_exported(tiny_run, tiny_experiment, tmp_path, capfd, matmul):
    """Its bits per byte are within 1 percent of those of the same run in full."""
    assert cli.main(["run", str(tiny_experiment), "--out", str(tmp_path / "run"), "--set", f"model.matmul={matmul}", "--json", "--traceback"]) == 0
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
    found = []
    for folder in (tiny_run.folder, tmp_path / "run"):
        capfd.readouterr()
        assert cli.main(["evaluate", str(folder), "--json"]) == 0
        found.append(json.loads(capfd.readouterr().out)["val_bits_per_byte"])
    assert 0 < abs(found[1] / found[0] - 1) < 0.01


def test_an_unknown_choice_is_refused():
    with pytest.raises(InputError, match=r"^model\.matmul = int4: unknown\. Did you mean 'int8'\? Choose from: full, int8, fp8\.$"):
        override(CONFIG, {"matmul": "int4"})


def test_without_qwix_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError) as refused:
        jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(override(CONFIG, {"matmul": "int8"})), jax.random.key(0)))
    remedy = 'Install it with pip install -e ".[low-precision]", or set model.matmul = full'
    assert str(refused.value) == f"model.matmul = int8: qwix is not installed. {remedy}."


AHEAD_OF_TIME = """
import json
import jax, jax.numpy as jnp
from mlm_jax.model.int8 import einsum
from mlm_jax.plan import hlo, topology

where = jax.sharding.SingleDeviceSharding(topology.parse("v5e:2x4").devices()[0])
shapes = ((8, 1024, 4096), jnp.bfloat16), ((4096, 4096), jnp.float32)
x, w = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes)
plans = {}
for matmul in ("full", "int8", "fp8"):
    product = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w, matmul=matmul))
    plans[matmul] = hlo.Program(product.lower(x, w).compile().as_text()).products()
print(json.dumps(plans))
"""


@pytest.mark.tpu_aot
def test_int8_products_run_on_the_integer_units_of_a_v5e_in_fewer_cycles():
    """2 x 8192 x 4096 x 4096 operations at 197 TFLOP/s of bfloat16 and 1.5 GHz are 2.09 million cycles."""
    pytest.importorskip("libtpu")
    environment = compilation.as_users(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    products = json.loads(done.stdout.splitlines()[-1])
    print(products)
    assert products["int8"].keys() == {"s8 x s8"}
    assert 1 < sum(products["full"].values()) / 2.09e6 < 1.2
    assert sum(products["int8"].values()) < 0.65 * sum(products["full"].values())
    assert sum(products["fp8"].values()) > 0.95 * sum(products["full"].values())  # a v5e has no units for it
