"""The reference attention is the textbook's."""

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.model.attention import Visibility, attention


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
