"""Every switch of the model that is not GPT-2: off it changes nothing, on it computes its paper's formula, decodes, has gradients and trains."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import parallel_block, residual_scalars, value_embeddings
from mlm_jax import experiment, sharding
from mlm_jax.config import ModelConfig, override
from mlm_jax.metrics import read_metrics
from mlm_jax.model import gpt2
from mlm_jax.objectives import cross_entropy
from mlm_jax.runs import Run
from mlm_jax.sharding import axes_of

ROOT = Path(__file__).parents[2]
BASE = ModelConfig(vocab_size=61, context_len=12, n_layers=2, n_heads=4, d_model=24, d_ff=40)  # a head is 6 wide

# What GPT-2 has, written out; a new field of ModelConfig belongs here and in SWITCHES, or among the plain ones.
OFF = {
    "vocab_multiple": 1,
    "n_kv_heads": 0,
    "position": "learned",
    "rotary_base": 10_000.0,
    "norm": "layer",
    "activation": "gelu_tanh",
    "biases": True,
    "tied_head": True,
    "qk_norm": False,
    "logit_softcap": 0.0,
    "mup_base_width": 0,
}
SHAPE = {"vocab_size", "context_len", "n_layers", "n_heads", "d_model", "d_ff"}
NUMERICS = {"dropout", "norm_eps", "init_std", "compute_dtype", "attention", "matmul", "unroll_layers", "remat"}  # no other model; tests of their own

SWITCHES = {
    "rotary": {"position": "rotary"},
    "rotary_base": {"position": "rotary", "rotary_base": 100.0},
    "no_position": {"position": "none"},
    "rms": {"norm": "rms"},
    "gelu_erf": {"activation": "gelu_erf"},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "grouped_query": {"n_kv_heads": 2},
    "multi_query": {"n_kv_heads": 1},
    "qk_norm": {"qk_norm": True},
    "softcap": {"logit_softcap": 3.0},
    "untied_head": {"tied_head": False},
    "no_biases": {"biases": False},
    "mup": {"mup_base_width": 6},
    "padded_vocab": {"vocab_multiple": 16},
}
STRUCTURES = {"parallel_block": parallel_block.MODEL, "value_embeddings": value_embeddings.MODEL, "residual_scalars": residual_scalars.MODEL}
MODERN = {"position": "rotary", "norm": "rms", "activation": "swiglu", "n_kv_heads": 2, "qk_norm": True, "biases": False, "tied_head": False}
COMBINATIONS = {
    "modern": MODERN | {"logit_softcap": 3.0},
    "contrary": {"position": "none", "activation": "relu2", "n_kv_heads": 1, "tied_head": False, "mup_base_width": 6, "vocab_multiple": 16},
}
CONFIGS = {"gpt2": {}} | SWITCHES | {name: {} for name in STRUCTURES} | COMBINATIONS
every_switch = pytest.mark.parametrize("name", CONFIGS)


def make(name: str, **changes) -> gpt2.GPT2:
    return STRUCTURES.get(name, gpt2.GPT2)(override(BASE, CONFIGS[name] | changes))


def shapes_of(model: gpt2.GPT2):
    return jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))


@functools.cache
def random_params(model: gpt2.GPT2):
    """Stacked. Nothing is 0 or 1, so that nothing hides: gains and learned scalars near 1, all else far from 0, the vocabulary's padding too."""
    draw = np.random.default_rng(0)

    def of(path, leaf):
        z = draw.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.3 * z if path[-1].key.startswith("scale_") else 0.25 * z, jnp.float32)

    return jax.tree_util.tree_map_with_path(of, shapes_of(model.clone(stacked=True)))


@functools.cache
def initial(model: gpt2.GPT2):
    return jax.jit(lambda: gpt2.init(model, jax.random.key(0)))()


def text(B: int, T: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, BASE.vocab_size, (B, T)), jnp.int32)


def apply(model: gpt2.GPT2, params, tokens_BT, **options):
    """What the model gives, from stacked parameters. Layer by layer it is not compiled as a whole: then the cases share what was compiled."""
    return model.apply({"params": params if model.stacked else gpt2.unstack(params)}, tokens_BT, **options)


@functools.cache
def logits(model: gpt2.GPT2) -> np.ndarray:
    """Of `text(2, 12)`, with random parameters."""
    run = functools.partial(apply, model)
    return np.asarray((jax.jit(run) if model.stacked else run)(random_params(model), text(2, 12)))


@functools.cache
def loss_and_gradients(model: gpt2.GPT2):
    """((loss, logits), gradients) of the 12 predictions in each of two rows."""

    def loss(params, tokens_BW):
        logits_BTV = apply(model, params, tokens_BW[:, :-1])
        return cross_entropy(logits_BTV, tokens_BW[:, 1:]).mean(), logits_BTV

    run = jax.value_and_grad(loss, has_aux=True)
    return (jax.jit(run) if model.stacked else run)(random_params(model), text(2, 13))


def assert_bit_for_bit(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- off: GPT-2 ----


def test_every_field_of_the_model_is_plain_or_a_switch_with_tests():
    assert {field.name for field in dataclasses.fields(ModelConfig)} == SHAPE | NUMERICS | set(OFF)
    assert set().union(*SWITCHES.values()) == set(OFF)
    for name, changes in SWITCHES.items():
        assert all(changes[field] != OFF[field] for field in changes), name


def test_the_parameters_of_the_default_are_gpt2s_and_no_others():
    L, D, F, N, H, V, T = 2, 24, 40, 4, 6, 61, 12
    expected = {
        "w_token_VD": (V, D),
        "w_position_TD": (T, D),
        "blocks/norm_1/scale_D": (L, D),
        "blocks/norm_1/b_D": (L, D),
        "blocks/attention/w_q_DNH": (L, D, N, H),
        "blocks/attention/b_q_NH": (L, N, H),
        "blocks/attention/w_k_DKH": (L, D, N, H),
        "blocks/attention/b_k_KH": (L, N, H),
        "blocks/attention/w_v_DKH": (L, D, N, H),
        "blocks/attention/b_v_KH": (L, N, H),
        "blocks/attention/w_out_NHD": (L, N, H, D),
        "blocks/attention/b_out_D": (L, D),
        "blocks/norm_2/scale_D": (L, D),
        "blocks/norm_2/b_D": (L, D),
        "blocks/mlp/w_up_DF": (L, D, F),
        "blocks/mlp/b_up_F": (L, F),
        "blocks/mlp/w_down_FD": (L, F, D),
        "blocks/mlp/b_down_D": (L, D),
        "norm_f/scale_D": (D,),
        "norm_f/b_D": (D,),
    }
    leaves = jax.tree_util.tree_leaves_with_path(shapes_of(gpt2.GPT2(BASE)))
    assert {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves} == expected


IDENTITIES = {
    "every switch spelled out": OFF,
    "as many key heads as heads": {"n_kv_heads": 4},
    "a vocabulary that is a multiple already": {"vocab_multiple": 61},
    "the base of a rotation that is off": {"rotary_base": 100.0},
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_switch_that_is_off_or_without_effect_is_gpt2_bit_for_bit(name):
    plain, model = gpt2.GPT2(BASE), gpt2.GPT2(override(BASE, IDENTITIES[name]))
    assert_bit_for_bit(initial(model), initial(plain))
    assert_bit_for_bit(loss_and_gradients(model.clone(stacked=False)), loss_and_gradients(plain.clone(stacked=False)))


def test_mup_at_its_base_width_is_gpt2_bit_for_bit():
    # With heads of 64, where its 8 / H is 1 / sqrt(H).
    plain = gpt2.GPT2(override(BASE, {"d_model": 128, "n_heads": 2}))
    model = gpt2.GPT2(override(plain.config, {"mup_base_width": 128}))
    assert_bit_for_bit(initial(model), initial(plain))
    assert_bit_for_bit(loss_and_gradients(model), loss_and_gradients(plain))


def test_grouped_heads_are_heads_whose_keys_and_values_are_copies():
    grouped, full = make("grouped_query"), make("gpt2")
    params = random_params(grouped)
    attention = {
        name: jnp.repeat(x, 2, axis=1 + axes_of(name).index("K")) if "K" in axes_of(name) else x for name, x in params["blocks"]["attention"].items()
    }
    copied = params | {"blocks": params["blocks"] | {"attention": attention}}
    got = jax.jit(lambda p: full.apply({"params": p}, text(2, 12)))(copied)
    np.testing.assert_allclose(got, logits(grouped), atol=1e-5)


def test_rows_that_pad_the_vocabulary_change_no_other_logit():
    padded, plain = make("padded_vocab"), make("gpt2")
    params = random_params(padded)
    got = jax.jit(lambda p: plain.apply({"params": p}, text(2, 12)))(params | {"w_token_VD": params["w_token_VD"][:61]})
    np.testing.assert_allclose(logits(padded)[..., :61], got, atol=1e-6)


@pytest.mark.parametrize("name", ["value_embeddings", "residual_scalars"])
def test_an_experiment_with_learned_scalars_starts_as_the_baseline_bit_for_bit(name):
    model, baseline = make(name), make("gpt2")
    new = {"w_value_VKH", "scale_v_", "scale_ve_", "scale_x_", "scale_x0_"}
    drawn, plain = ({jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(initial(m))} for m in (model, baseline))
    assert_bit_for_bit({path: x for path, x in drawn.items() if not any(name in path for name in new)}, plain)
    first, expected = (apply(m.clone(stacked=False), initial(m), text(2, 12)) for m in (model, baseline))
    assert_bit_for_bit(first, expected)


# ---- on: the formulas of the papers, in plain numpy ----


def plain_logits(name: str, c: ModelConfig, params, tokens_T: np.ndarray) -> np.ndarray:
    """Logits of one text in float64: one head, one query and one layer at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    T, N, K, H = len(tokens_T), c.n_heads, c.n_kv_heads or c.n_heads, c.d_model // c.n_heads

    def normed(x, w):  # Ba et al. 2016, equations 3 and 4; Zhang & Sennrich 2019, equation 4
        if c.norm == "layer":
            y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["scale_D"]
        else:
            y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["scale_D"]
        return y + w["b_D"] if c.biases and c.norm == "layer" else y

    def bias(w, key):
        return w[key] if c.biases else 0.0

    def attended(h, w):
        mixed = np.zeros((T, N, H))
        for n in range(N):
            group = n // (N // K)  # Ainslie et al. 2023, figure 2
            q = h @ w["w_q_DNH"][:, n] + (w["b_q_NH"][n] if c.biases else 0)
            k = h @ w["w_k_DKH"][:, group] + (w["b_k_KH"][group] if c.biases else 0)
            v = h @ w["w_v_DKH"][:, group] + (w["b_v_KH"][group] if c.biases else 0)
            if c.qk_norm:
                q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-5) * w["scale_q_H"]
                k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-5) * w["scale_k_H"]
            if c.position == "rotary":  # Su et al. 2021, section 3.2: a pair is a complex number, the position its phase
                turn = np.exp(1j * np.outer(np.arange(T), [c.rotary_base ** (-2 * i / H) for i in range(H // 2)]))
                q, k = ((x[:, : H // 2] + 1j * x[:, H // 2 :]) * turn for x in (q, k))
                q, k = (np.concatenate([x.real, x.imag], axis=-1) for x in (q, k))
            if name == "value_embeddings":
                v = w["value"]["scale_v_"] * v + w["value"]["scale_ve_"] * w["value"]["w_value_VKH"][tokens_T, group]
            for t in range(T):
                scores = np.array([q[t] @ k[s] for s in range(t + 1)])
                weights = np.exp(scores * 8 / H if c.mup_base_width else scores / math.sqrt(H))  # Yang et al. 2022, definition 4.1
                mixed[t, n] = (weights / weights.sum()) @ v[: t + 1]
        return sum(mixed[:, n] @ w["w_out_NHD"][n] for n in range(N)) + bias(w, "b_out_D")

    def fed_forward(h, w):
        u = h @ w["w_up_DF"] + bias(w, "b_up_F")
        if c.activation == "gelu_tanh":  # Hendrycks & Gimpel 2016, section 2
            a = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        elif c.activation == "gelu_erf":
            a = u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))
        elif c.activation == "relu2":  # So et al. 2021, section 4
            a = np.maximum(u, 0) ** 2
        else:  # Shazeer 2020, equation 6
            gate = h @ w["w_gate_DF"]
            a = gate / (1 + np.exp(-gate)) * u
        return a @ w["w_down_FD"] + bias(w, "b_down_D")

    x0 = x = p["w_token_VD"][tokens_T] + (p["w_position_TD"][:T] if c.position == "learned" else 0)
    for layer in range(c.n_layers):
        w = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
        if name == "residual_scalars":
            x = w["scale_x_"] * x + w["scale_x0_"] * x0
        if name == "parallel_block":
            h = normed(x, w["norm_1"])
            x = x + attended(h, w["attention"]) + fed_forward(h, w["mlp"])
        else:
            x = x + attended(normed(x, w["norm_1"]), w["attention"])
            x = x + fed_forward(normed(x, w["norm_2"]), w["mlp"])
    out = normed(x, p["norm_f"]) @ p["w_token_VD" if c.tied_head else "w_head_VD"].T
    if c.mup_base_width:  # Yang et al. 2022, table 8: the output multiplier is 1 / m
        out = out * c.mup_base_width / c.d_model
    if c.logit_softcap:  # Gemma Team 2024, section 2
        out = c.logit_softcap * np.tanh(out / c.logit_softcap)
    out[:, c.vocab_size :] = -np.inf
    return out


@every_switch
def test_logits_equal_a_plain_computation(name):
    model = make(name)
    got, tokens_BT = logits(model), text(2, 12)
    for row in range(2):
        np.testing.assert_allclose(got[row], plain_logits(name, model.config, random_params(model), np.asarray(tokens_BT[row])), atol=2e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt2"])
def test_a_switch_changes_the_logits(name):
    plain, model = make("gpt2"), make(name)
    params, own = random_params(plain), random_params(model)
    if jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params):  # else it has other parameters, and `test_logits_equal...` tells
        assert np.abs(logits(model) - logits(plain)).max() > 1e-3


# ---- on: generation, padding, gradients, bfloat16 ----


@functools.cache
def decoded(model: gpt2.GPT2, garbage: int):
    """(full, shifted) logits, through a cache: of a text, and of its first 9 tokens after 3 positions of padding that hold `garbage`."""
    row_T = text(2, 12)[0]
    tokens_BT = jnp.stack([row_T, jnp.concatenate([jnp.full(3, garbage, jnp.int32), row_T[:9]])])
    flat, params, padding_B = model.clone(stacked=False), gpt2.unstack(random_params(model)), jnp.array([0, 3], jnp.int32)
    out, cache = [], {}
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):  # a prompt, single tokens, a chunk
        where = {"start": jnp.int32(start)} if start else {"cache_len": 12}
        part_BTV, cache = flat.apply({"params": params, **cache}, tokens_BT[:, start:stop], padding_B=padding_B, mutable=["cache"], **where)
        out.append(part_BTV)
    return np.asarray(jnp.concatenate(out, axis=1))


@every_switch
def test_the_cache_gives_the_logits_of_the_full_forward(name):
    model = make(name)
    np.testing.assert_allclose(decoded(model, 7)[0], logits(model)[0], atol=1e-5)


@every_switch
def test_left_padding_is_invisible(name):
    model = make(name)
    np.testing.assert_allclose(decoded(model, 7)[1, 3:], logits(model)[0, :9], atol=1e-5)


@every_switch
def test_the_padding_of_the_vocabulary_is_never_predicted_and_gets_no_gradient(name):
    model = make(name, vocab_multiple=16).clone(stacked=False)
    (loss, got), gradients = loss_and_gradients(model)
    assert got.shape[-1] == 64 and (got[..., 61:] == -jnp.inf).all() and jnp.isfinite(got[..., :61]).all() and jnp.isfinite(loss)
    tables = {key: gradients[key] for key in ("w_token_VD", "w_head_VD") if key in gradients}
    assert ("w_head_VD" in tables) == (not model.config.tied_head)
    for key, gradient in tables.items():
        assert (gradient[61:] == 0).all(), key
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def has_no_effect(config: ModelConfig, name: str) -> bool:
    """A bias of the keys adds the same to all scores of a query, which a softmax does not see; unless rotation or a norm comes between."""
    return name == "b_k_KH" and config.position != "rotary" and not config.qk_norm


@every_switch
def test_gradients_reach_every_parameter_of_every_layer(name):
    model = make(name, vocab_multiple=16).clone(stacked=False)
    _, gradients = loss_and_gradients(model)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        for layer in range(2) if path[0].key == "blocks" else [slice(None)]:
            largest = float(jnp.abs(gradient[layer]).max())
            assert largest < 1e-7 if has_no_effect(model.config, path[-1].key) else largest > 1e-5, (jax.tree_util.keystr(path), layer, largest)


@every_switch
def test_bfloat16_gives_finite_float32_logits_near_those_of_float32(name):
    model = make(name)
    half = make(name, compute_dtype="bfloat16").clone(stacked=False)
    assert {x.dtype for x in jax.tree.leaves(shapes_of(half))} == {jnp.dtype("float32")}
    got, full = logits(half)[..., :61], logits(model)[..., :61]
    assert got.dtype == np.float32 and np.isfinite(got).all()
    assert 1e-4 < np.abs(got - full).max() < 0.05 * np.abs(full).max()


# ---- on: training ----

# Half of the rows, context, layers and width, a quarter of the vocabulary, and one device of the eight, which share the cores of this machine.
FIFTY = {"train.steps": 50, "train.batch_size": 4, "optim.warmup_steps": 10, "sample.max_tokens": 8}
FIFTY |= {"model.context_len": 64, "model.n_layers": 2, "model.d_model": 128, "model.d_ff": 512, "data.bpe_vocab_size": 512}
FIFTY |= {"train.eval_every": 0, "train.eval_windows": 8, "train.save_every": 0}
TRAINED = CONFIGS | {"padded_vocab": {"vocab_multiple": 100}}  # of 512 tokens
TRAINED |= {name: CONFIGS[name] | {"mup_base_width": 32} for name in ("mup", "contrary")}  # of a width of 128
FALL = 0.7  # nats per token, from the first loss to the mean of the last five


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """(name, changes) -> the losses of 50 steps of a small experiments/tiny.py, or of the experiment of that name, with fields of its
    model changed."""
    shards = tmp_path_factory.mktemp("shards") / "tokens"  # prepared by the first run that needs them

    def losses(name: str, changes) -> list[float]:
        folder = tmp_path_factory.mktemp("run") / "run"
        loaded = experiment.load(str(ROOT / "experiments" / f"{name if name in STRUCTURES else 'tiny'}.py"))
        changes = {f"model.{field}": value for field, value in changes.items()}
        run = Run(loaded.with_changes(FIFTY | changes | {"data.tokens": str(shards)}), folder, say=lambda line: None)
        run.prepare()
        run.train()
        return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
        yield losses


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_on_real_text_bring_the_loss_down(name, curve):
    losses = curve(name, TRAINED[name])
    print(f"{name}: {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert len(losses) == 50 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < losses[0] - FALL
