"""What is predicted, and at what cost."""

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax import objectives


def test_each_target_is_the_token_after_its_input():
    examples = objectives.causal(jnp.array([[5, 6, 7, 8]]))
    assert examples.inputs_BT.tolist() == [[5, 6, 7]] and examples.targets_BT.tolist() == [[6, 7, 8]] and examples.weights_BT.tolist() == [[1, 1, 1]]


def test_cross_entropy_is_minus_the_log_of_the_targets_probability():
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)) * 5
    targets = np.array([[0, 3, 6], [1, 1, 2]])
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [[-np.log(probs[b, t, targets[b, t]]) for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(objectives.cross_entropy(jnp.float32(logits), jnp.asarray(targets)), expected, rtol=1e-5)


def test_cross_entropy_stays_finite_for_huge_logits():
    value, grad = jax.value_and_grad(lambda x: objectives.cross_entropy(x, jnp.array([[1]])).sum())(jnp.array([[[1e4, -1e4, 0.0]]]))
    assert float(value) == 2e4 and np.isfinite(grad).all()


def test_the_mean_leaves_out_what_does_not_count():
    mean = objectives.weighted_mean(jnp.array([[1.0, 2.0, 30.0]]), jnp.array([[1.0, 1.0, 0.0]]))
    assert float(mean) == 1.5
    assert float(objectives.weighted_mean(jnp.ones((1, 2)), jnp.zeros((1, 2)))) == 0
