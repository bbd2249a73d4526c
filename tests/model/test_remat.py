"""Rematerialisation: less memory, the same result."""

import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import parallel_block
from mlm_jax.config import REMATS, InputError, ModelConfig, override
from mlm_jax.model import gpt2
from mlm_jax.objectives import cross_entropy

# Deep, and dropout on: a block that is computed again must drop the same numbers.
CONFIG = ModelConfig(vocab_size=61, context_len=32, n_layers=8, n_heads=2, d_model=32, d_ff=128, dropout=0.1)
TOKENS = jax.random.randint(jax.random.key(7), (4, 33), 0, 61)


def loss_of(make, **changes):
    """(a function of parameters that gives the training loss, a function that gives new parameters)."""
    model = make(override(CONFIG, changes))

    def loss(params):
        logits_BTV = model.apply({"params": params}, TOKENS[:, :-1], train=True, rngs={"dropout": jax.random.key(1)})
        return cross_entropy(logits_BTV, TOKENS[:, 1:]).mean()

    return loss, lambda: gpt2.init(model, jax.random.key(0))


def measured(make, remat):
    """((loss, gradients), temporary memory in bytes)."""
    loss, init = loss_of(make, remat=remat)
    params = jax.jit(init)()
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return compiled(params), compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def all_of_them():
    return {remat: measured(gpt2.GPT2, remat) for remat in ("none", "full", "dots", "attention")}


def same(got, expected):
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(expected[1]), strict=True):
        if path[-1].key != "b_k_KH":  # its true gradient is zero
            np.testing.assert_allclose(x, y, atol=1e-6 * float(jnp.abs(y).max()), rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_no_policy_changes_the_loss_or_the_gradient(all_of_them, remat):
    same(all_of_them[remat][0], all_of_them["none"][0])


def test_what_is_kept_orders_the_memory(all_of_them):
    temp = {remat: memory for remat, (_, memory) in all_of_them.items()}
    print("\n".join(f"{remat:10s} {memory:12,} bytes" for remat, memory in temp.items()))
    order = [temp[remat] for remat in ("full", "attention", "dots", "none")]
    assert all(less < more for less, more in itertools.pairwise(order)), temp
    L, B, T, D = 8, 4, 32, 32
    assert temp["attention"] - temp["full"] == pytest.approx(L * B * T * D * 4, rel=1e-3)  # the outputs of attention, and nothing else


@pytest.mark.slow
def test_offloading_changes_neither_the_loss_nor_the_gradient(all_of_them):
    same(measured(gpt2.GPT2, "offload")[0], all_of_them["none"][0])


def test_offloading_keeps_the_outputs_of_attention_of_all_layers_on_the_host():
    loss, init = loss_of(gpt2.GPT2, remat="offload")
    program = str(jax.make_jaxpr(jax.grad(loss))(jax.eval_shape(init)))
    L, B, N, T, H = 8, 4, 2, 32, 16
    assert f"f32<host>[{L},{B},{N},{T},{H}]" in program
    assert set(re.findall(r"<host>\[[\d,]*\]", program)) == {f"<host>[{L},{B},{N},{T},{H}]", f"<host>[{B},{N},{T},{H}]"}


@pytest.mark.parametrize("remat", REMATS)
def test_a_block_of_an_experiment_is_computed_again_too(remat):
    model = parallel_block.MODEL(override(CONFIG, {"remat": remat}))
    params = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))
    program = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS[:, :-1]))(params))
    assert program.count("prevent_cse=") == 1 + (remat != "none")  # the first is that of the activation


@pytest.mark.slow
def test_a_block_of_an_experiment_needs_less_memory_for_the_same_result():
    (none, more), (full, less) = (measured(parallel_block.MODEL, remat) for remat in ("none", "full"))
    same(full, none)
    assert less < more / 2


@pytest.mark.parametrize("unroll", [False, True])
def test_only_unrolled_layers_keep_the_compiler_from_merging_the_two_computations(unroll):
    loss, init = loss_of(gpt2.GPT2, remat="full", unroll_layers=unroll)
    assert f"prevent_cse={unroll}" in str(jax.make_jaxpr(loss)(jax.eval_shape(init)))


def test_the_logits_are_the_same_with_a_cache_and_one_block_after_the_other():
    def outputs(remat):
        model = gpt2.GPT2(override(CONFIG, {"n_layers": 2, "remat": remat}))
        params = gpt2.init(model, jax.random.key(0))
        stacked, cache = model.apply({"params": params}, TOKENS[:, :4], cache_len=8, mutable=["cache"])
        return params, stacked, cache, model.clone(stacked=False).apply({"params": gpt2.unstack(params)}, TOKENS[:, :4])

    jax.tree.map(np.testing.assert_array_equal, *jax.jit(lambda: (outputs("none"), outputs("full")))())


def test_offloading_without_host_memory_is_refused(monkeypatch):
    device = SimpleNamespace(device_kind="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(InputError) as refused:
        gpt2.GPT2(override(CONFIG, {"remat": "offload"})).init(jax.random.key(0), TOKENS[:, :-1])
    assert str(refused.value) == (
        "model.remat = offload: abacus has no pinned_host memory. Set model.remat = attention, which keeps the same on the device."
    )
