"""Names decide where arrays live, and where they live changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlm_jax import optim, sharding
from mlm_jax.config import InputError, MeshConfig, ModelConfig, OptimConfig
from mlm_jax.model import gpt2
from mlm_jax.train import init_state, make_train_step

CONFIG = ModelConfig(vocab_size=64, context_len=16, n_layers=2, n_heads=4, d_model=32, d_ff=64)


def curve(mesh_config: MeshConfig, n_devices: int, steps: int = 5):
    """(losses, final parameters) of a few training steps on a mesh."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:n_devices])
    # eps: Adam divides a gradient near zero by its own size, and would show the order of summation as if it were a difference.
    config = OptimConfig(peak_lr=1e-3, end_lr=1e-4, warmup_steps=2, eps=1e-4)
    model, tx = gpt2.GPT2(CONFIG), optim.optimizer(config, steps)
    with jax.sharding.set_mesh(mesh):
        shardings = sharding.shardings(mesh, jax.eval_shape(lambda: init_state(model, tx, 0)))
        state = jax.jit(lambda: init_state(model, tx, 0), out_shardings=shardings)()
        step = jax.jit(make_train_step(model, tx, 0), out_shardings=(shardings, None))
        losses = []
        rows = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
        for _ in range(steps):
            state, measured = step(state, sharding.put_rows(lambda a, b: rows[a:b], rows.shape, np.int32, mesh))
            losses.append(float(measured["loss"]))
    return losses, state.params


@pytest.fixture(scope="module")
def one_device():
    return curve(MeshConfig(), 1)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4)])
def test_eight_devices_train_as_one_does(one_device, sizes):
    losses, params = curve(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), 8)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert losses[0] > losses[-1]
    for (path, got), expected in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(one_device[1]), strict=True):
        if path[-1].key != "b_k_KH":  # its true gradient is zero, so Adam amplifies rounding
            np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max()), err_msg=jax.tree_util.keystr(path))


def test_parameters_and_moments_are_split_by_their_names():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tx = optim.optimizer(OptimConfig(), 10_000)
    state = jax.eval_shape(lambda: init_state(gpt2.GPT2(CONFIG), tx, 0))
    specs = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(sharding.shardings(mesh, state))}
    up = [spec for name, spec in specs.items() if name.endswith("['w_up_DF']")]
    assert up == [P(None, "fsdp", "tensor")] * 3  # the parameter and its two moments, stacked over layers
    assert [spec for name, spec in specs.items() if name.endswith("['w_token_VD']")] == [P("tensor", "fsdp")] * 3
    assert all(spec == P() for name, spec in specs.items() if name.endswith(("count", "step")))


def test_an_axis_of_the_mesh_is_used_once_in_an_array():
    assert sharding.spec("BTD") == P(("data", "fsdp"), None, None)
    assert sharding.spec("DF") == P("fsdp", "tensor") and sharding.spec("V.") == P("tensor", None)


def test_each_device_is_given_its_own_rows_alone():
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return np.arange(start * 3, stop * 3).reshape(-1, 3)

    batch = sharding.put_rows(rows, (8, 3), np.int32, mesh)
    assert set(asked) == {(0, 2), (2, 4), (4, 6), (6, 8)}
    np.testing.assert_array_equal(batch, np.arange(24).reshape(8, 3))


@pytest.mark.parametrize("name, shape", [("w_DF", (2,)), ("w_up_DF", (2, 3, 4, 5)), ("b_D", ())])
def test_a_misnamed_parameter_is_found(name, shape):
    mesh = sharding.make_mesh(MeshConfig())
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
    if shape:
        with pytest.raises(ValueError, match="the name says"):
            sharding.shardings(mesh, tree)
    else:
        assert sharding.shardings(mesh, tree)[name].spec == P()


def test_a_mesh_that_does_not_fill_the_devices_is_refused():
    with pytest.raises(InputError, match=r"mesh = data 3 x fsdp 1 x tensor 1: does not fill 8 devices\. Set one axis to -1"):
        sharding.make_mesh(MeshConfig(data=3))
    with pytest.raises(InputError, match="does not fill 8 devices"):
        sharding.make_mesh(MeshConfig(fsdp=16))


def test_a_mesh_that_does_not_divide_an_axis_is_refused_by_its_letter():
    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(InputError, match=r"mesh\.tensor = 8: 8 parts do not divide axis K = 4 of b_k_KH\. Choose a divisor of 4"):
        sharding.shardings(mesh, jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(CONFIG), jax.random.key(0))))
