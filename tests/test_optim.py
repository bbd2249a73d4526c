"""AdamW, its schedule and its decay mask, against arithmetic done here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import optim
from mlm_jax.config import ModelConfig, OptimConfig
from mlm_jax.model import gpt2
from mlm_jax.sharding import is_decayed


def test_two_steps_equal_adamw_by_hand():
    c = OptimConfig(peak_lr=0.1, end_lr=0.01, warmup_steps=2, weight_decay=0.5, b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0)
    tx = optim.optimizer(c, steps=10)
    params = {"w_up_DF": jnp.array([[1.0, -2.0]]), "b_up_F": jnp.array([3.0])}
    gradients = [{"w_up_DF": [[3.0, 0.0]], "b_up_F": [4.0]}, {"w_up_DF": [[0.1, -0.2]], "b_up_F": [0.2]}]

    # By hand: the first gradient has norm 5 and is clipped to 1, the second has norm 0.3 and stays.
    x = {"w": np.array([1.0, -2.0]), "b": np.array([3.0])}
    m = dict.fromkeys(x, 0.0)
    v = dict.fromkeys(x, 0.0)
    state = tx.init(params)
    for t, (g, clip, lr) in enumerate(zip(gradients, (1 / 5, 1.0), (0.05, 0.1), strict=True), start=1):
        for name, full in (("w", "w_up_DF"), ("b", "b_up_F")):
            grad = np.ravel(np.array(g[full])) * clip
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.95 * v[name] + 0.05 * grad**2
            update = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            x[name] = x[name] - lr * (update + (0.5 * x[name] if name == "w" else 0.0))
        updates, state = tx.update(jax.tree.map(jnp.asarray, g, is_leaf=lambda y: isinstance(y, list)), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        np.testing.assert_allclose(np.ravel(params["w_up_DF"]), x["w"], rtol=1e-5)
        np.testing.assert_allclose(params["b_up_F"], x["b"], rtol=1e-5)


def test_the_schedule_rises_to_the_peak_and_falls_along_half_a_cosine_to_the_end():
    lr = optim.schedule(OptimConfig(peak_lr=1.0, end_lr=0.2, warmup_steps=4), steps=12)
    expected = [(n + 1) / 4 for n in range(4)] + [0.2 + 0.8 * (1 + np.cos(np.pi * n / 8)) / 2 for n in range(1, 9)]
    np.testing.assert_allclose([lr(n) for n in range(12)], expected, rtol=1e-5)
    assert float(lr(11)) == pytest.approx(0.2) and float(lr(100)) == pytest.approx(0.2)


def test_without_warm_up_the_first_step_is_near_the_peak():
    lr = optim.schedule(OptimConfig(peak_lr=1.0, end_lr=0.0, warmup_steps=0), steps=100)
    assert 0.99 < float(lr(0)) < 1


def test_weights_decay_and_biases_and_gains_do_not():
    params = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(ModelConfig(vocab_size=50_257)), jax.random.key(0)))
    decayed = is_decayed(params)
    n = sum(x.size for x, yes in zip(jax.tree.leaves(params), jax.tree.leaves(decayed), strict=True) if yes)
    # By hand for 124M: embeddings, and per block q, k, v, out and the two of the MLP.
    assert n == 50_257 * 768 + 1024 * 768 + 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert not decayed["blocks"]["attention"]["b_q_NH"]  # two axes, and a bias all the same
