"""Names decide where arrays live, and where they live changes no result."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlm_jax import optim, sharding
from mlm_jax.config import Config, InputError, MeshConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig, override
from mlm_jax.decode import loop
from mlm_jax.model import gpt2
from mlm_jax.train import first_state, init_state, lower_step

CONFIG = ModelConfig(vocab_size=64, context_len=16, n_layers=2, n_heads=8, d_model=32, d_ff=64)


def curve(mesh_config: MeshConfig, n_devices: int, steps: int = 10, model_config: ModelConfig = CONFIG, train_config: TrainConfig = TrainConfig()):  # noqa: B008
    """(losses, final parameters) of a few training steps on a mesh."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:n_devices])
    # eps: Adam divides a gradient near zero by its own size, and would show the order of summation as if it were a difference.
    optim_config = OptimConfig(peak_lr=1e-3, end_lr=1e-4, warmup_steps=2, eps=1e-4)
    train_config = dataclasses.replace(train_config, steps=steps)
    config = Config(name="curve", model=model_config, optim=optim_config, train=train_config)
    model = gpt2.GPT2(config.model)
    with jax.sharding.set_mesh(mesh):
        state, step = first_state(config, model, mesh), lower_step(config, model, mesh, 8).compile()
        losses = []
        rows = np.random.default_rng(0).integers(0, model_config.vocab_size, (8, 17)).astype(np.int32)
        for _ in range(steps):
            state, measured = step(state, sharding.put_rows(lambda a, b: rows[a:b], rows.shape, np.int32, mesh))
            losses.append(float(measured["loss"]))
    return losses, state.params


@pytest.fixture(scope="module")
def one_device():
    return curve(MeshConfig(), 1)


AXES = ("data", "fsdp", "tensor", "context", "slices")
EVERY = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
SLICED = [(2, 2, 1, 1, 2), (1, 2, 1, 2, 2)]
SOME = [(1, 8, 1, 1), (2, 1, 2, 2), (1, 2, 1, 2, 2)]  # every axis once, and beside others
assert len(EVERY) == 20


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=() if s in SOME else pytest.mark.slow) for s in EVERY + SLICED],
    ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in zip(AXES, sizes, strict=False) if size > 1),
)
def test_eight_devices_train_as_one_does(one_device, sizes):
    losses, params = curve(MeshConfig(**dict(zip(AXES, sizes, strict=False))), 8)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert losses[0] > losses[-1]
    for (path, got), expected in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(one_device[1]), strict=True):
        if path[-1].key != "b_k_KH":  # its true gradient is zero, so Adam amplifies rounding
            np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max()), err_msg=jax.tree_util.keystr(path))


ALL_AT_ONCE = {"model": {"remat": "full"}, "train": {"micro_batches": 2, "loss_chunks": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("saving", [{"model": {}, "train": {}}, ALL_AT_ONCE], ids=["plain", "saving memory"])
def test_a_vocabulary_padded_for_the_mesh_trains_as_the_bare_one_on_one_device(saving):
    bare = override(CONFIG, {"vocab_size": 61})
    losses, params = curve(MeshConfig(), 1, model_config=bare)
    padded = override(bare, {"vocab_multiple": 8, **saving["model"]})
    mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    got, split = curve(mesh, 8, model_config=padded, train_config=override(TrainConfig(), saving["train"]))
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    table = split["w_token_VD"]
    assert table.shape == (64, 32) and table.sharding.spec == P("tensor", "fsdp") and not np.asarray(table)[61:].any()
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(split | {"w_token_VD": table[:61]}), jax.tree.leaves(params), strict=True):
        if path[-1].key != "b_k_KH":
            np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()), err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (1, 2, 1, 2, 2)], ids=str)
def test_a_mesh_gives_the_same_bits_every_time(sizes):
    first, again = (curve(MeshConfig(**dict(zip(AXES, sizes, strict=False))), 8) for _ in range(2))
    assert first[0] == again[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], again[1])


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
    assert sharding.spec("BTD") == P(("slice", "data", "fsdp"), "context", None)
    assert sharding.spec("DF") == P("fsdp", "tensor") and sharding.spec("V.") == P("tensor", None)


def test_positions_are_split_in_activations_and_whole_in_parameters():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=4))
    assert sharding.shardings(mesh, {"w_position_TD": jax.ShapeDtypeStruct((16, 32), jnp.float32)})["w_position_TD"].spec == P(None, "fsdp")
    with jax.sharding.set_mesh(mesh):
        apply = jax.jit(lambda x: sharding.constrain(2 * x, "BTD"))
        whole = {T: apply(jnp.ones((2, T, 32))) for T in (16, 1)}
    assert {shard.data.shape for shard in whole[16].addressable_shards} == {(1, 4, 32)}
    assert {shard.data.shape for shard in whole[1].addressable_shards} == {(1, 1, 32)}  # a decoding step


def test_parameters_are_copied_over_data_and_slices_and_split_over_fsdp():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, slices=2))
    placed = jax.device_put(np.arange(32.0), sharding.shardings(mesh, {"b_D": np.zeros(32)})["b_D"])
    parts = [(shard.device.id % 2, tuple(np.asarray(shard.data)[[0, -1]])) for shard in placed.addressable_shards]
    assert set(parts) == {(0, (0, 15)), (1, (16, 31))} and len(parts) == 8  # neighbours share a copy


class Chip:
    """A device of a TPU slice that is not there."""

    platform, device_kind, process_index, core_on_chip = "tpu", "stand-in", 0, 0

    def __init__(self, id: int) -> None:
        self.id, self.slice_index, self.coords = id, id % 2, (id // 2 % 2, id // 4, 0)


def test_only_the_slice_axis_crosses_from_one_slice_to_another():
    chips = [Chip(i) for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, slices=2), chips)
    assert mesh.axis_names == ("slice", "data", "fsdp", "tensor", "context") and mesh.devices.shape == (2, 1, 2, 2, 1)
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match=r"mesh\.slices = 1: the devices are in 2 slices\. Set mesh\.slices = 2"):
        sharding.make_mesh(MeshConfig(), chips)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"position": "rotary", "n_kv_heads": 1, "qk_norm": True}, marks=pytest.mark.slow)], ids=["gpt2", "shared_keys"]
)
def test_generation_with_split_positions_equals_that_on_one_device(changes):
    model = gpt2.GPT2(override(CONFIG, {"context_len": 32, **changes}))
    params = jax.jit(lambda: jax.tree.map(lambda x: 5 * x, gpt2.init(model, jax.random.key(0))))()
    prompts, settings = [[1, 2, 3], [4] * 17], SampleConfig(max_tokens=12, num=2)

    def run(params):
        decoding = loop.Decoding(model, params, prompts, settings, eot_id=-1)
        decoding.advance(12)
        return [tokens.tolist() for tokens, _ in decoding.rows()]

    mesh = sharding.make_mesh(MeshConfig(data=2, context=4))
    alone = run(params)
    with jax.sharding.set_mesh(mesh):
        assert run(jax.device_put(params, sharding.shardings(mesh, params))) == alone


def test_each_device_is_given_its_own_rows_alone():
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return np.arange(start * 3, stop * 3).reshape(-1, 3)

    batch = sharding.put_rows(rows, (8, 3), np.int32, mesh)
    assert sorted(asked) == [(0, 2), (2, 4), (4, 6), (6, 8)]  # each once, though two devices hold them
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


@pytest.mark.parametrize(
    "asked, shown, fitting",
    [
        ({"tensor": 3}, "data -1 x tensor 3", "data 4 x tensor 2, data 2 x tensor 4, data 8"),
        ({"data": 3}, "data 3", "data 8, data 4 x fsdp 2, data 4 x tensor 2"),
        ({"fsdp": 16}, "data -1 x fsdp 16", "fsdp 8, data 2 x fsdp 4, data 4 x fsdp 2"),
        ({"data": 2, "context": 3, "slices": 2}, "slices 2 x data 2 x context 3", "slices 2 x data 2 x context 2"),
    ],
)
def test_a_mesh_that_does_not_fill_the_devices_is_refused_with_the_nearest_that_do(asked, shown, fitting):
    with pytest.raises(InputError) as refused:
        sharding.make_mesh(MeshConfig(**asked))
    assert str(refused.value).startswith(f"mesh = {shown}: does not fill 8 devices. Nearest that fit: {fitting}")
    for offered in refused.value.remedy.removeprefix("Nearest that fit: ").split(", "):
        assert (
            sharding.make_mesh(MeshConfig(**{"data": 1} | {field: int(n) for field, n in (part.split() for part in offered.split(" x "))})).size == 8
        )


def fake_mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple({"slice": 1, "data": 1, "fsdp": 1, "tensor": 1, "context": 1, **sizes}.values()), tuple(sharding.AXES))


def test_a_mesh_that_does_not_divide_an_axis_is_refused_by_its_letter_with_what_does():
    with pytest.raises(InputError) as refused:  # GPT-2 XL on 256 chips
        sharding.shardings(fake_mesh(fsdp=256), {"w_up_DF": jax.ShapeDtypeStruct((1600, 6400), jnp.float32)})
    assert str(refused.value) == (
        "mesh.fsdp = 256: 256 parts do not divide axis D = 1600 of w_up_DF, 64 would. Set mesh.fsdp = 64 and mesh.data = 4 (hybrid sharding)."
    )
    sharding.shardings(fake_mesh(data=4, fsdp=64), {"w_up_DF": jax.ShapeDtypeStruct((1600, 6400), jnp.float32)})
    model = gpt2.GPT2(override(CONFIG, {"n_heads": 4}))
    with pytest.raises(
        InputError, match=r"mesh\.tensor = 8: 8 parts do not divide axis K = 4 of b_k_KH, 4 would\. Set mesh\.tensor = 4 and mesh\.data = 2\."
    ):
        sharding.shardings(fake_mesh(tensor=8), jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0))))
    with pytest.raises(InputError, match=r"axis V = 50257 of w_token_VD, 1 would\. .* or model\.vocab_multiple to a multiple of 8"):
        sharding.shardings(fake_mesh(tensor=8), {"w_token_VD": jax.ShapeDtypeStruct((50257, 32), jnp.float32)})


def test_a_batch_that_the_mesh_does_not_divide_is_refused_with_what_it_does():
    sharding.check_batch(fake_mesh(slice=2, data=2, fsdp=2, tensor=8, context=4), 16, 16)
    with pytest.raises(InputError) as refused:
        sharding.check_batch(fake_mesh(slice=2, data=2, fsdp=2), 12, 16)
    assert str(refused.value) == (
        "train.batch_size = 12: not a multiple of the 8 devices along slices, data and fsdp. Set it to 8 or 16, or have 4 along them."
    )
    with pytest.raises(InputError, match=r"Set it to 8, or have 2 along them"):
        sharding.check_batch(fake_mesh(fsdp=8), 6, 16)
    with pytest.raises(InputError, match=r"train\.batch_size = 8: not a multiple of the 8 devices .* times train\.micro_batches = 2\. Set it to 16"):
        sharding.check_batch(fake_mesh(fsdp=8), 8, 16, micro_batches=2)
    with pytest.raises(InputError) as refused:
        sharding.check_batch(fake_mesh(data=2, context=8), 16, 12)
    assert str(refused.value) == ("mesh.context = 8: 8 parts do not divide model.context_len = 12, 4 would. Set mesh.context = 4 and mesh.data = 4.")
