"""AdamW, its schedule, its decay mask and muP, against arithmetic done here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm_jax import objectives, optim
from mlm_jax.config import ModelConfig, OptimConfig, override
from mlm_jax.model import gpt2
from mlm_jax.sharding import is_decayed, is_hidden


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


NAMES = {"w_up_DF": (2, 3), "w_q_DNH": (2, 1, 2), "w_token_VD": (5, 2), "w_position_TD": (4, 2), "w_head_VD": (5, 2), "b_up_F": (3,), "scale_D": (2,)}


def draw(seed: int):
    keys = jax.random.split(jax.random.key(seed), len(NAMES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, NAMES.items(), strict=True)}


def updates_of(tx, steps: int = 3):
    params, state = draw(0), tx.init(draw(0))
    for step in range(steps):
        updates, state = tx.update(draw(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return updates, state


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_without_mup_updates_and_state_are_those_of_optax_adamw(clip_norm):
    c = OptimConfig(peak_lr=0.1, end_lr=0.01, warmup_steps=2, weight_decay=0.5, clip_norm=clip_norm)
    adamw = optax.adamw(optim.schedule(c, 9), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=0.5, mask=is_decayed)
    expected = updates_of(optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw)
    got = updates_of(optim.optimizer(c, 9))
    assert jax.tree.structure(got) == jax.tree.structure(expected)  # checkpoints of before are read
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_mup_divides_the_step_of_hidden_weights_and_neither_their_decay_nor_other_steps():
    c = OptimConfig(peak_lr=0.1, end_lr=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1.0)
    adam = updates_of(optim.optimizer(override(c, {"weight_decay": 0.0}), 9), steps=1)[0]
    got = updates_of(optim.optimizer(c, 9, width_multiplier=4.0), steps=1)[0]
    for name, w in draw(0).items():
        step = adam[name] / (4 if name in ("w_up_DF", "w_q_DNH") else 1)
        np.testing.assert_allclose(got[name], step - (0.1 * 0.5 * w if name.startswith("w_") else 0), rtol=1e-5, err_msg=name)


def test_hidden_weights_are_those_of_the_blocks():
    config = ModelConfig(vocab_size=61, context_len=8, n_layers=2, n_heads=2, d_model=8, d_ff=16, tied_head=False, activation="swiglu", qk_norm=True)
    hidden = is_hidden(jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0))))
    names = {path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(hidden) if yes}
    assert names == {"w_q_DNH", "w_k_DKH", "w_v_DKH", "w_out_NHD", "w_up_DF", "w_gate_DF", "w_down_FD"}


def test_the_model_of_mup_is_table_8_of_its_paper():
    # Yang et al. 2022, table 8: hidden variance 1 / fan_in, so 1 / m from the base on; input and output variance 1; output multiplier 1 / m.
    base = ModelConfig(vocab_size=999, context_len=64, n_layers=1, n_heads=2, d_model=64, d_ff=256, mup_base_width=64)
    wide = override(base, {"d_model": 256, "d_ff": 1024})
    shallow, deep = (jax.jit(lambda c=c: gpt2.init(gpt2.GPT2(c), jax.random.key(0)))() for c in (base, wide))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(shallow), jax.tree.leaves(deep), strict=True):
        name = path[-1].key
        if name.startswith("w_"):
            shrunk = 1 if name in ("w_token_VD", "w_position_TD") else 2
            assert float(a.std() / b.std()) == pytest.approx(shrunk, rel=0.05), name

    def logits(config, q_times):
        attention = deep["blocks"]["attention"]
        attention = attention | {"w_q_DNH": q_times * attention["w_q_DNH"]}
        params = deep | {"blocks": deep["blocks"] | {"attention": attention}}
        return jax.jit(lambda t: gpt2.GPT2(config).apply({"params": params}, t))(jax.random.randint(jax.random.key(1), (2, 8), 0, 999))

    # Definition 4.1: q k / H, here times 8, instead of q k / sqrt(H); H is 128. Queries large enough for it to matter.
    plain = override(wide, {"mup_base_width": 0})
    np.testing.assert_allclose(4 * logits(wide, 100), logits(plain, 100 * 8 / 128**0.5), atol=2e-5)
    assert float(jnp.abs(4 * logits(wide, 100) - logits(plain, 100)).max()) > 1e-3


WIDTHS = (64, 128, 256, 512)


def changes(width: int, *, mup: bool, divided: bool, steps: int = 4) -> dict[str, float]:
    """How far a few Adam steps on one batch move the activations: the mean |after - before|."""
    config = ModelConfig(vocab_size=61, context_len=8, n_layers=2, n_heads=4, d_model=width, d_ff=4 * width, mup_base_width=64 * mup)
    model = gpt2.GPT2(config, stacked=False)
    tx = optim.optimizer(
        OptimConfig(peak_lr=3e-3, end_lr=3e-3, warmup_steps=0, weight_decay=0.0), steps, width_multiplier=config.width_multiplier if divided else 1.0
    )
    tokens_BW = jax.random.randint(jax.random.key(0), (4, 9), 0, 61)

    def loss(params):
        logits_BTV, kept = model.apply({"params": params}, tokens_BW[:, :-1], capture_intermediates=True, mutable=["intermediates"])
        last = kept["intermediates"]["block_1"]
        seen = {"attention": last["attention"]["__call__"][0], "mlp": last["mlp"]["__call__"][0], "logits": logits_BTV}
        seen["embeddings"] = params["w_token_VD"][tokens_BW[:, :-1]] + params["w_position_TD"]
        return objectives.cross_entropy(logits_BTV, tokens_BW[:, 1:]).mean(), seen

    @jax.jit
    def step(params, state):
        (_, seen), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, seen

    params = gpt2.init(model, jax.random.key(1))
    state = tx.init(params)
    history = []
    for _ in range(steps + 1):
        params, state, seen = step(params, state)
        history.append(seen)
    return {name: float(jnp.abs(history[-1][name] - history[0][name]).mean()) for name in history[0]}


@pytest.mark.slow
def test_coordinate_check():
    # Yang et al. 2022, appendix D.1: in muP a step moves every activation alike at every width, at one learning rate.
    growth = {}
    for label, mup, divided in (("muP", True, True), ("muP without the division of the step", True, False), ("standard", False, True)):
        by_width = [changes(width, mup=mup, divided=divided) for width in WIDTHS]
        growth[label] = {name: by_width[-1][name] / by_width[0][name] for name in by_width[0]}
        print(label, {name: f"{ratio:.2f}" for name, ratio in growth[label].items()})
        if label == "muP":
            for one in by_width[1:]:
                assert all(0.5 < one[name] / by_width[0][name] < 2 for name in one), (one, by_width[0])
    # Measured, 64 to 512 wide: 0.76 to 1.03 in muP; 36 and 20 times (attention, mlp) without the division; 41, 26 and 5 (logits) without muP.
    assert growth["muP without the division of the step"]["attention"] > 10 and growth["muP without the division of the step"]["mlp"] > 10
    assert growth["standard"]["attention"] > 10 and growth["standard"]["mlp"] > 10 and growth["standard"]["logits"] > 2.5
