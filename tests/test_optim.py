"""Optimizers on stacked layers, schedules, averages, the decay mask and muP, against arithmetic done here and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mlm_jax import checkpoint, objectives, optim, sharding
from mlm_jax.config import Config, InputError, MeshConfig, ModelConfig, OptimConfig, override
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


@pytest.mark.slow
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


SHAPES = {  # of two stacked layers, wide and tall; and what is not stacked
    "blocks": {"w_q_DNH": (2, 6, 2, 2), "w_out_NHD": (2, 2, 2, 6), "w_up_DF": (2, 6, 8), "w_down_FD": (2, 8, 6), "b_q_NH": (2, 2, 2)},
    "w_token_VD": (16, 6),
    "b_D": (6,),
}


def random_tree(seed: int, shapes=SHAPES, std: float = 1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(std * rng.standard_normal(shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def named(tree) -> dict[str, np.ndarray]:
    """Every layer's arrays by themselves, in float64: "w_q_DNH 0", "w_q_DNH 1", ..., "b_D"."""
    out = {f"{name} {layer}": x[layer] for name, x in tree["blocks"].items() for layer in range(len(x))}
    return {name: np.asarray(x, np.float64) for name, x in (out | {name: x for name, x in tree.items() if name != "blocks"}).items()}


def matrix(name: str, x: np.ndarray) -> np.ndarray | None:
    """Written down by hand, not derived: the inputs x outputs of each weight."""
    shape = {"w_q_DNH": (6, 4), "w_out_NHD": (4, 6), "w_up_DF": (6, 8), "w_down_FD": (8, 6), "w_token_VD": (16, 6)}.get(name.split()[0])
    return None if shape is None else x.reshape(shape)


CONSTANT = {"peak_lr": 0.1, "end_lr": 0.1, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.3, "clip_norm": 0.0}


def equals_reference(config: OptimConfig, reference, steps: int = 6, rtol: float = 1e-4) -> None:
    """Asserts that `steps` steps are those of `reference(name, memory, gradient, parameter, t)`: its step, before decay and learning rate."""
    tx = optim.optimizer(config, steps)
    params = random_tree(0)
    expected, memory, state = named(params), {}, tx.init(params)
    update = jax.jit(tx.update)
    for t in range(1, steps + 1):
        gradients = random_tree(t, std=10.0 ** (t % 3 - 1))
        for name, g in named(gradients).items():
            decay = config.weight_decay * expected[name] if name.startswith("w_") else 0.0
            expected[name] = expected[name] - config.peak_lr * (reference(name, memory.setdefault(name, {}), g, expected[name], t) + decay)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, x in named(params).items():
            np.testing.assert_allclose(x, expected[name], rtol=rtol, atol=rtol * np.abs(expected[name]).max(), err_msg=f"{name}, step {t}")


def adam_by_hand(b1=0.9, b2=0.95, eps=1e-8):
    def step(name, memory, g, x, t):
        memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g**2
        return memory["m"] / (1 - b1**t) / (np.sqrt(memory["v"] / (1 - b2**t)) + eps)

    return step


def lion_by_hand(b1=0.9, b2=0.95):
    # Chen et al. 2023, algorithm 2: the step is the sign of an interpolation by b1, the memory one by b2.
    def step(name, memory, g, x, t):
        m = memory.get("m", np.zeros_like(g))
        memory["m"] = b2 * m + (1 - b2) * g
        return np.sign(b1 * m + (1 - b1) * g)

    return step


def adafactor_by_hand(name, memory, g, x, t):
    # Shazeer & Stern 2018, algorithm 4 (matrices: sums, as there) and 5 (vectors), with the constants of algorithm 6.
    b2, g2 = 1 - t**-0.8, g**2 + 1e-30
    if (m := matrix(name, g2)) is not None:
        memory["R"] = b2 * memory.get("R", 0) + (1 - b2) * m.sum(1)
        memory["C"] = b2 * memory.get("C", 0) + (1 - b2) * m.sum(0)
        v = (np.outer(memory["R"], memory["C"]) / memory["R"].sum()).reshape(g.shape)
    else:
        v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g2
    u = g / np.sqrt(v)
    return u / max(1, np.sqrt(np.mean(u**2))) * max(1e-3, np.sqrt(np.mean(x**2)))


def newton_schulz_by_hand(g: np.ndarray) -> np.ndarray:
    # KellerJordan/Muon, muon.py, zeropower_via_newtonschulz5; here through the singular values, on which the polynomial acts.
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


def muon_by_hand(momentum=0.95):
    # KellerJordan/Muon, muon.py, muon_update: buffer.lerp_(g, 1 - momentum), then g.lerp(buffer, momentum). The embedding is not hidden: Adam.
    adam = adam_by_hand()

    def step(name, memory, g, x, t):
        if matrix(name, g) is None or name == "w_token_VD":
            return adam(name, memory, g, x, t)
        memory["b"] = momentum * memory.get("b", 0) + (1 - momentum) * g
        mixed = (1 - momentum) * g + momentum * memory["b"]
        return (0.2 * np.sqrt(max(matrix(name, g).shape)) * newton_schulz_by_hand(matrix(name, mixed))).reshape(g.shape)

    return step


BY_HAND = {"adamw": adam_by_hand(), "lion": lion_by_hand(), "adafactor": adafactor_by_hand, "muon": muon_by_hand()}


@pytest.mark.parametrize("name", BY_HAND)
def test_six_steps_on_stacked_layers_are_those_of_each_layer_by_hand(name):
    equals_reference(OptimConfig(name=name, **CONSTANT), BY_HAND[name])


def test_every_field_that_an_optimizer_reads_is_heeded():
    equals_reference(OptimConfig(name="adamw", b1=0.8, b2=0.9, eps=1e-2, **CONSTANT), adam_by_hand(0.8, 0.9, 1e-2))
    equals_reference(OptimConfig(name="lion", b1=0.8, b2=0.9, **CONSTANT), lion_by_hand(0.8, 0.9))
    equals_reference(OptimConfig(name="muon", muon_momentum=0.6, **CONSTANT), muon_by_hand(0.6))


@pytest.mark.parametrize("name", BY_HAND)
def test_every_optimizer_is_given_clipped_gradients_and_scaled_by_the_schedule(name):
    config = OptimConfig(name=name, **CONSTANT)
    plain, scheduled = (
        optim.optimizer(override(config, changes), 4) for changes in ({}, {"clip_norm": 1.0, "schedule": "linear", "end_lr": 0.0, "warmup_steps": 2})
    )
    params = random_tree(0)
    states = [plain.init(params), scheduled.init(params)]
    for t, lr in enumerate((0.05, 0.1, 0.05)):  # a line up to 0.1 in 2 steps and down to 0 in 2
        gradients = random_tree(t + 1, std=(10.0, 1e-3, 1.0)[t])
        norm = np.sqrt(sum((x**2).sum() for x in named(gradients).values()))
        clipped = jax.tree.map(lambda g, norm=norm: g / np.float32(max(norm, 1.0)), gradients)
        expected, states[0] = jax.jit(plain.update)(clipped, states[0], params)
        got, states[1] = jax.jit(scheduled.update)(gradients, states[1], params)
        jax.tree.map(lambda a, b, lr=lr: np.testing.assert_allclose(a, lr / 0.1 * b, rtol=1e-4, atol=1e-6), got, expected)


@pytest.mark.parity
def test_adamw_and_adafactor_are_those_of_pytorch():
    import torch

    made = {
        "adamw": lambda p, decay: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay),
        "adafactor": lambda p, decay: torch.optim.Adafactor(p, lr=0.1, weight_decay=decay),  # rho = min(lr, 1 / sqrt(t)) is lr for 100 steps
    }
    for kind, make in made.items():
        held = {}

        def step(name, memory, g, x, t, make=make, held=held):
            shaped = g if matrix(name, g) is None else matrix(name, g)
            if matrix(name, g) is None:
                shaped = shaped.ravel()
            if name not in held:
                p = torch.tensor(x.reshape(shaped.shape), dtype=torch.float64, requires_grad=True)
                held[name] = p, make([p], 0.3 if name.startswith("w_") else 0.0)
            p, optimizer = held[name]
            p.grad = torch.tensor(shaped)
            optimizer.step()
            decay = 0.3 * x if name.startswith("w_") else 0.0  # equals_reference adds it again
            return (x - p.detach().numpy().reshape(x.shape)) / 0.1 - decay

        equals_reference(OptimConfig(name=kind, **CONSTANT), step, steps=8)


@pytest.mark.parity
def test_muon_is_that_of_pytorch_up_to_its_bfloat16():
    import torch

    g = {t: random_tree(t, {"w_up_DF": (6, 8)})["w_up_DF"] for t in range(6)}
    tx = optim.optimizer(OptimConfig(name="muon", **CONSTANT), 5)
    params = {"w_up_DF": g[0]}
    state = tx.init(params)
    p = torch.tensor(np.asarray(g[0]), requires_grad=True)
    theirs = torch.optim.Muon([p], lr=0.1, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for t in range(1, 6):
        updates, state = tx.update({"w_up_DF": g[t]}, state, params)
        params = optax.apply_updates(params, updates)
        p.grad = torch.tensor(np.asarray(g[t]))
        theirs.step()
    moved = np.abs(p.detach().numpy() - np.asarray(g[0])).max()
    np.testing.assert_allclose(params["w_up_DF"], p.detach().numpy(), atol=0.02 * moved)


def test_the_axes_of_a_matrix_are_read_off_its_name():
    read = {name: optim.matrix_axes(name) for name in ("w_q_DNH", "w_k_DKH", "w_out_NHD", "w_up_DF", "w_down_FD", "w_token_VD", "w_value_VKH")}
    assert list(read.values()) == [("D", "NH"), ("D", "KH"), ("NH", "D"), ("D", "F"), ("F", "D"), ("V", "D"), ("V", "KH")]
    assert [optim.matrix_axes(name) for name in ("b_q_NH", "scale_D", "scale_x_", "w_mix_D", "w_mix_NH")] == [None] * 5
    with pytest.raises(ValueError, match="w_mix_DFD: D x F x D is no matrix"):
        optim.matrix_axes("w_mix_DFD")


TINY = ModelConfig(vocab_size=64, context_len=16, n_layers=3, n_heads=2, d_model=16, d_ff=32, activation="swiglu")


def test_muon_orthogonalises_every_hidden_weight_of_every_layer_and_nothing_else():
    params = jax.jit(lambda: gpt2.init(gpt2.GPT2(TINY), jax.random.key(0)))()
    # inputs x outputs by hand: D = 16, N H = 16, F = 32.
    shapes = {"w_q_DNH": (16, 16), "w_k_DKH": (16, 16), "w_v_DKH": (16, 16), "w_out_NHD": (16, 16)}
    shapes |= {"w_up_DF": (16, 32), "w_gate_DF": (16, 32), "w_down_FD": (32, 16)}

    def gradient(path, p):
        g = np.random.default_rng(p.size).standard_normal(p.shape)
        if shape := shapes.get(path[-1].key):  # the smallest singular value a quarter of the largest
            u, s, vt = np.linalg.svd(g.reshape(3, *shape), full_matrices=False)
            g = (u * np.linspace(1, 0.25, s.shape[-1]) @ vt).reshape(p.shape)
        return jnp.asarray(g, jnp.float32)

    gradients = jax.tree_util.tree_map_with_path(gradient, params)
    tx = optim.optimizer(OptimConfig(name="muon", **{**CONSTANT, "weight_decay": 0.0, "peak_lr": 1.0}), 9)
    updates = jax.jit(lambda: tx.update(gradients, tx.init(params), params)[0])()
    seen = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        if (name := path[-1].key) in shapes:
            seen.add(name)
            for layer in np.asarray(update).reshape(3, *shapes[name]):
                values = np.linalg.svd(layer / (0.2 * max(shapes[name]) ** 0.5), compute_uv=False)
                assert values.min() > 0.65 and values.max() < 1.25, (name, values)
        else:  # the first step of Adam is the sign
            np.testing.assert_allclose(np.abs(update), 1.0, rtol=1e-3, err_msg=name)
    assert seen == shapes.keys()


SOME_STATES = [("adafactor", "float32"), ("muon", "float32"), ("lion", "bfloat16")]
OTHER_STATES = [("adamw", "float32"), ("adamw", "bfloat16"), ("lion", "float32"), ("muon", "bfloat16")]


@pytest.mark.parametrize("name, dtype", SOME_STATES + [pytest.param(*both, marks=pytest.mark.slow) for both in OTHER_STATES])
def test_the_state_is_placed_by_its_names_and_eight_devices_step_as_one(name, dtype):
    tx = optim.optimizer(OptimConfig(name=name, moment_dtype=dtype, **CONSTANT), 9)
    params = random_tree(9)

    def run(place):
        state_shardings = place(jax.eval_shape(tx.init, params))
        now, state = jax.device_put(params, place(params)), jax.jit(tx.init, out_shardings=state_shardings)(params)
        jitted = jax.jit(step, out_shardings=(place(params), state_shardings))
        for t in range(3):
            now, state = jitted(now, state, jax.device_put(random_tree(t), place(params)))
        return now, state

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    alone, _ = run(lambda tree: None)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.sharding.set_mesh(mesh):
        split, state = run(lambda tree: sharding.shardings(mesh, tree))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), split, alone)

    specs = {jax.tree_util.keystr(path): (x.shape, x.sharding.spec, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    q = [value for key, value in specs.items() if "['w_q_DNH']" in key]
    whole, split_over = (2, 6, 2, 2), P(None, "fsdp", "tensor", None)
    expected = {
        "adamw": [(whole, split_over)] * 2,
        "lion": [(whole, split_over)],
        "muon": [(whole, split_over)],
        "adafactor": [((2, 2, 2), P(None, "tensor", None)), ((2, 6), P(None, "fsdp"))],
    }
    assert [value[:2] for value in q] == expected[name]
    assert {str(kept) for shape, _, kept in specs.values() if shape} == {dtype}


@pytest.mark.parametrize("name", ["muon", "adafactor"])  # a state in parts, and of other arrays than the parameters
def test_a_checkpoint_brings_the_state_back(name, tmp_path):
    tx, params = optim.optimizer(OptimConfig(name=name, **CONSTANT), 9), random_tree(0)
    state = jax.jit(lambda: tx.update(random_tree(1), tx.init(params), params)[1])()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def wanted(tree):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding.shardings(mesh, tree))

    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, params, {"opt_state": state})
    _, progress = checkpoint.restore(tmp_path / "1", wanted(params), {"opt_state": wanted(state)})
    assert jax.tree.structure(progress["opt_state"]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, progress["opt_state"], state)


def test_adafactor_remembers_rows_and_columns_alone():
    params = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(ModelConfig(vocab_size=50_257)), jax.random.key(0)))

    def size(tree) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    sizes = {name: size(jax.eval_shape(optim.optimizer(OptimConfig(name=name), 999).init, params)) for name in BY_HAND}
    n = size(params)
    assert sizes["adafactor"] < 0.005 * n and sizes["lion"] == n + 2 and sizes["adamw"] == 2 * n + 2
    assert n < sizes["muon"] < 1.4 * n  # two moments of the embeddings alone


def test_a_bfloat16_state_is_what_a_float32_step_leaves_rounded():
    config = OptimConfig(moment_dtype="bfloat16", **CONSTANT)
    tx = optim.optimizer(config, 9)
    params = {"w_up_DF": random_tree(0, {"w": (4, 4)})["w"]}
    state, m, v = tx.init(params), np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)

    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)

    for t in range(1, 7):
        g = random_tree(t, {"w": (4, 4)})["w"]
        m, v = np.float32(0.9) * m + np.float32(0.1) * g, np.float32(0.95) * v + np.float32(0.05) * g**2
        updates, state = tx.update({"w_up_DF": g}, state, params)
        expected = -0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.3 * params["w_up_DF"])
        np.testing.assert_allclose(updates["w_up_DF"], expected, rtol=1e-4, atol=1e-6)
        m, v = rounded(m), rounded(v)
        assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim} == {"bfloat16"}


def test_a_mean_of_eight_binary_digits_that_would_never_fall_is_refused():
    # By hand: a mean in bfloat16 with no gradient any more. At 0.996 it falls, at 0.9962 it is rounded back to what it was.
    def falls(decay, x=1.0 + 2**-7):
        return float(jnp.bfloat16(decay * x)) < x

    assert falls(0.996) and not falls(0.9962)
    for name, field in (("adamw", "b1"), ("adamw", "b2"), ("lion", "b2"), ("muon", "muon_momentum")):
        with pytest.raises(InputError, match=rf"optim\.{field} = 0.9962: .* never fall\. Give at most 0.996"):
            OptimConfig(moment_dtype="bfloat16", name=name, **{field: 0.9962})
        OptimConfig(moment_dtype="bfloat16", name=name, **{field: 0.996})
    OptimConfig(moment_dtype="bfloat16", name="lion", b1=0.999)
    with pytest.raises(InputError, match=r"optim\.moment_dtype = bfloat16: adafactor forgets ever more slowly"):
        OptimConfig(moment_dtype="bfloat16", name="adafactor")


KNOTS = {  # peak 1, end 0.2, 4 steps of warm-up, 20 in all: the rate of update n, from 0
    "linear": {4: 0.95, 11: 0.6, 19: 0.2, 40: 0.2},
    "wsd": {4: 1.0, 13: 1.0, 14: 1.0, 15: 0.84, 17: 0.52, 19: 0.2, 40: 0.2},  # a quarter of 20 steps: 0.16 less in each of the last 5
    "inverse_sqrt": {4: (4 / 5) ** 0.5, 15: 0.5, 19: (4 / 20) ** 0.5, 63: 0.25},
    "constant": {4: 1.0, 19: 1.0, 40: 1.0},
    "cosine": {11: 0.6, 19: 0.2, 40: 0.2},
}


@pytest.mark.parametrize("name", KNOTS)
def test_schedules_pass_through_their_knots(name):
    fraction = {"decay_fraction": 0.25} if name == "wsd" else {}
    config = OptimConfig(peak_lr=1.0, end_lr=0.2, warmup_steps=4, schedule=name, **fraction)
    expected = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0} | KNOTS[name]
    for lr in (optim.schedule(config, 20), jax.jit(optim.schedule(config, 20))):
        np.testing.assert_allclose([float(lr(n)) for n in expected], list(expected.values()), rtol=1e-5)
    start = float(optim.schedule(override(config, {"warmup_steps": 0}), 20)(0))
    assert 0.95 <= start <= 1.0  # without warm-up the first step is at or near the peak


def test_the_average_of_the_weights_counts_recent_steps_most_and_all_to_one():
    weights = [np.float32(w) for w in (3.0, 1.0, -2.0, 5.0)]
    average = {"w": jnp.float32(7.0)}  # the initial weight, which counts nothing
    for step, w in enumerate(weights, start=1):
        average = jax.jit(optim.ema, static_argnums=2)(average, {"w": w}, 0.9, jnp.int32(step))
        counts = 0.9 ** np.arange(step - 1, -1, -1)
        np.testing.assert_allclose(average["w"], np.dot(counts, weights[:step]) / counts.sum(), rtol=1e-5)


def test_the_average_is_exact_where_decay_is_near_one():
    average = {"w": jnp.float32(0.0)}
    update = jax.jit(optim.ema, static_argnums=2)
    for step in range(1, 201):
        average = update(average, {"w": jnp.float32(step)}, 0.99999, jnp.int32(step))
    counts = 0.99999 ** np.arange(199.0, -1, -1)
    np.testing.assert_allclose(average["w"], np.dot(counts, np.arange(1, 201)) / counts.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"name": "adamv"}, "optim.name = adamv: unknown. Did you mean 'adamw'? Choose from: adamw, adafactor, lion, muon."),
        ({"schedule": "cosin"}, "optim.schedule = cosin: unknown. Did you mean 'cosine'? Choose from: cosine, linear, wsd, inverse_sqrt, constant."),
        ({"moment_dtype": "bf16"}, "optim.moment_dtype = bf16: unknown. Did you mean 'bfloat16'? Choose from: float32, bfloat16."),
        ({"decay_fraction": 0.0, "schedule": "wsd"}, "optim.decay_fraction = 0.0: not a part. Give a value above 0, at most 1."),
        ({"decay_fraction": 0.1}, "optim.decay_fraction = 0.1: the schedule is cosine. Leave it at 0.2."),
        ({"name": "adafactor", "b2": 0.99}, "optim.b2 = 0.99: adafactor has no use for it. Leave it at 0.95."),
        ({"name": "lion", "eps": 1e-6}, "optim.eps = 1e-06: lion has no use for it. Leave it at 1e-08."),
        ({"muon_momentum": 0.9}, "optim.muon_momentum = 0.9: adamw has no use for it. Leave it at 0.95."),
        ({"ema_decay": 1.0}, "optim.ema_decay = 1.0: not a fraction. Give a value from 0 up to, not including, 1."),
    ],
)
def test_what_an_optimizer_or_schedule_does_not_know_is_refused(fields, line):
    with pytest.raises(InputError) as refused:
        OptimConfig(**fields)
    assert str(refused.value) == line


def test_a_decay_that_begins_within_the_warm_up_is_refused():
    fits = {"optim.schedule": "wsd", "optim.warmup_steps": 80, "train.steps": 100}
    assert override(Config(name="x"), fits).optim.decay_steps(100) == 20
    with pytest.raises(InputError) as refused:
        override(Config(name="x"), fits | {"optim.warmup_steps": 81})
    line = "optim.decay_fraction = 0.2: its 20 steps begin before the end of optim.warmup_steps = 81. "
    assert str(refused.value) == line + "Decay or warm up for fewer of train.steps, or train for more."


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_mup_with_another_optimizer_than_adamw_is_refused(name):
    line = (
        f"optim.name = {name}: muP's rule for a model 4 times as wide as its base is defined here for adamw alone. "
        "Set optim.name=adamw or model.mup_base_width=0."
    )
    with pytest.raises(InputError) as refused:
        optim.optimizer(OptimConfig(name=name), 9, width_multiplier=4.0)
    assert str(refused.value) == line
    with pytest.raises(InputError) as refused:
        override(Config(name="x"), {"optim.name": name, "model.mup_base_width": 192})
    assert str(refused.value) == line
    optim.optimizer(OptimConfig(name=name), 9, width_multiplier=1.0)  # the base itself


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

    params = jax.jit(lambda: gpt2.init(model, jax.random.key(1)))()
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
        widths = WIDTHS if label == "muP" else (WIDTHS[0], WIDTHS[-1])
        by_width = [changes(width, mup=mup, divided=divided) for width in widths]
        growth[label] = {name: by_width[-1][name] / by_width[0][name] for name in by_width[0]}
        print(label, {name: f"{ratio:.2f}" for name, ratio in growth[label].items()})
        if label == "muP":
            for one in by_width[1:]:
                assert all(0.5 < one[name] / by_width[0][name] < 2 for name in one), (one, by_width[0])
    # Measured, 64 to 512 wide: 0.76 to 1.03 in muP; 36 and 20 times (attention, mlp) without the division; 41, 26 and 5 (logits) without muP.
    assert growth["muP without the division of the step"]["attention"] > 10 and growth["muP without the division of the step"]["mlp"] > 10
    assert growth["standard"]["attention"] > 10 and growth["standard"]["mlp"] > 10 and growth["standard"]["logits"] > 2.5
