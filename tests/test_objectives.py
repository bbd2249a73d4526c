"""What is predicted, and at what cost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm_jax import objectives, sharding
from mlm_jax.config import Config, DataConfig, InputError, MeshConfig, ModelConfig, TrainConfig, override
from mlm_jax.model import attention, gpt2
from mlm_jax.model.int8 import einsum
from mlm_jax.train import init_state, lower_step, make_train_step


def test_each_target_is_the_token_after_its_input():
    examples = objectives.causal(jnp.array([[5, 6, 7, 8]]))
    assert examples.inputs_BT.tolist() == [[5, 6, 7]] and examples.targets_BT.tolist() == [[6, 7, 8]] and examples.weights_BT.tolist() == [[1, 1, 1]]


def test_a_token_given_as_its_complement_is_seen_and_not_learned():
    examples = objectives.causal(jnp.array([[5, ~6, 0, ~0, 8]]))
    assert examples.inputs_BT.tolist() == [[5, 6, 0, 0]] and examples.targets_BT.tolist() == [[6, 0, 0, 8]]
    assert examples.weights_BT.tolist() == [[0, 1, 0, 1]] and examples.weights_BT.dtype == jnp.float32


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


@pytest.mark.parametrize("z_loss, label_smoothing", [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.01, 0.1)])
def test_z_loss_and_label_smoothing_are_those_of_a_hand_computation_and_leave_padding_out(z_loss, label_smoothing):
    settings = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    real = np.random.default_rng(0).normal(size=(2, 3, 7)) * 3
    targets = np.array([[0, 3, 6], [1, 1, 2]])
    log_z = np.log(np.exp(real).sum(-1, keepdims=True))
    share = (1 - label_smoothing) * np.eye(7)[targets] + label_smoothing / 7
    expected = -(share * (real - log_z)).sum(-1) + z_loss * log_z[..., 0] ** 2
    gradient = np.exp(real - log_z) * (1 + 2 * z_loss * log_z) - share

    padded = jnp.pad(jnp.float32(real), ((0, 0), (0, 0), (0, 3)), constant_values=-jnp.inf)
    got = objectives.losses(padded, jnp.asarray(targets), **settings)
    np.testing.assert_allclose(got.objective_BT, expected, rtol=1e-5)
    np.testing.assert_allclose(got.nats_BT, -np.take_along_axis(real - log_z, targets[..., None], -1)[..., 0], rtol=1e-5)
    grad = jax.grad(lambda x: objectives.losses(x, jnp.asarray(targets), **settings).objective_BT.sum())(padded)
    np.testing.assert_allclose(grad[..., :7], gradient, atol=1e-6)
    assert (grad[..., 7:] == 0).all()


MODEL = ModelConfig(vocab_size=61, vocab_multiple=16, context_len=16, n_layers=1, n_heads=2, d_model=16, d_ff=16)
BOTH = TrainConfig(z_loss=0.01, label_smoothing=0.1)


def tokens(B: int, T: int, V: int = 61) -> jax.Array:
    return jax.random.randint(jax.random.key(7), (B, T + 1), 0, V)


@functools.cache  # two tests need the plain one
def step_of(model: gpt2.GPT2, config: TrainConfig):
    """A jitted (params, tokens_BW, weights_BT) -> ((mean objective, sums), gradients)."""

    def loss(params, tokens_BW, weights_BT):
        examples = objectives.causal(tokens_BW)._replace(weights_BT=weights_BT)
        got = objectives.model_losses(model, params, examples, config)
        return got.objective / weights_BT.sum(), got

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def close(got, expected, relative):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        if "b_k_KH" not in jax.tree_util.keystr(path):  # its true gradient is zero
            np.testing.assert_allclose(x, y, atol=relative * float(jnp.abs(y).max()), rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("changes", [{}, {"tied_head": False, "logit_softcap": 3.0, "mup_base_width": 8}])
def test_chunks_change_neither_the_losses_nor_their_gradient(changes):
    model = gpt2.GPT2(override(MODEL, changes))
    inputs = jax.jit(lambda: gpt2.init(model, jax.random.key(0)))(), tokens(4, 16), jnp.linspace(0, 1, 64).reshape(4, 16)
    expected = step_of(model, BOTH)(*inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    close(step_of(model, override(BOTH, {"loss_chunks": 4}))(*inputs), expected, 2e-6)


def test_eight_chunks_need_less_memory_than_the_logits():
    config = override(MODEL, {"vocab_size": 4000, "vocab_multiple": 128, "context_len": 64})
    model = gpt2.GPT2(config)
    params, tokens_BW = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0))), tokens(8, 64)
    temp = {
        chunks: step_of(model, TrainConfig(loss_chunks=chunks))
        .lower(params, tokens_BW, jnp.ones((8, 64)))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for chunks in (1, 8)
    }
    logits = 8 * 64 * config.padded_vocab_size * 4
    print(f"logits {logits:,} bytes; temporary memory with 1 chunk {temp[1]:,}, with 8 {temp[8]:,}")
    assert temp[8] < logits < temp[1]


def collectives(hlo: str) -> list[tuple[bool, str, int]]:
    """(in the body of a loop, kind, largest number of elements) of each collective in compiled HLO."""
    bodies, found, inside = set(re.findall(r"body=%?([\w.\-]+)", hlo)), [], ""
    for line in hlo.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = start[1]
        if op := re.search(r" = (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(", line):
            sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in re.findall(r"\[([\d,]*)\]", op[1])]
            found.append((inside in bodies, op[2], max(sizes)))
    return found


MESHES = [{"fsdp": 8, "data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_eight_devices_sum_the_gradient_of_the_table_once_and_get_what_one_gets(sizes):
    V, D, (B, T) = 256, 32, (8, 16)
    keys = jax.random.split(jax.random.key(0))
    w_VD, x_BTD, targets_BT = jax.random.normal(keys[0], (V, D)), jax.random.normal(keys[1], (B, T, D)), tokens(B, T - 1)

    def loss(w_VD, x_BTD, targets_BT, chunks=4):
        head = lambda w, x: einsum("BTD,VD->BTV", x, w)  # noqa: E731
        weights_BT = jnp.linspace(0, 1, B * T).reshape(B, T)
        if chunks == 1:
            got = objectives.weighted(objectives.losses(head(w_VD, x_BTD), targets_BT, z_loss=0.01, label_smoothing=0.1), weights_BT)
        else:
            examples = objectives.Examples(targets_BT, targets_BT, weights_BT)
            got = objectives.chunked_losses(head, w_VD, x_BTD, examples, chunks=chunks, z_loss=0.01, label_smoothing=0.1)
        return 3 * got.objective / (B * T), got

    expected = jax.jit(jax.value_and_grad(lambda *a: loss(*a, chunks=1), (0, 1), has_aux=True))(w_VD, x_BTD, targets_BT)
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    with jax.sharding.set_mesh(mesh):
        put = lambda x, letters: jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.spec(letters)))  # noqa: E731
        inputs = put(w_VD, "VD"), put(x_BTD, "BT."), put(targets_BT, "BT")
        layout = jax.tree.map(lambda x: x.sharding, inputs[:2])
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), out_shardings=(None, layout)).lower(*inputs).compile()
        got = compiled(*inputs)
    close(got, expected, 2e-6)
    found = collectives(compiled.as_text())
    table = V * D // sizes.get("tensor", 1) // 8  # a part of its gradient, as reduce-scatter leaves it
    in_loop = [op for op in found if op[0]]
    assert in_loop == [] if "tensor" not in sizes else all(size < table for _, _, size in in_loop), in_loop
    assert any(size >= table for inside, _, size in found if not inside), "the table is gathered and its gradient summed outside of the loop"


def test_chunks_that_do_not_divide_the_positions_are_refused():
    with pytest.raises(InputError) as refused:
        objectives.chunked_losses(lambda w, x: x @ w.T, jnp.ones((5, 2)), jnp.ones((1, 16, 2)), objectives.causal(tokens(1, 16)), chunks=3)
    assert str(refused.value) == "train.loss_chunks = 3: does not divide the 16 positions of a device. Choose from: 1, 2, 4, 8, 16."


def test_training_reports_the_cross_entropy_whatever_it_makes_small():
    model, tx = gpt2.GPT2(MODEL), optax.sgd(0.1)
    state = jax.jit(lambda: init_state(model, tx, 0))()
    (objective, sums), gradient = step_of(model, BOTH)(state.params, tokens(4, 16), jnp.ones((4, 16)))
    _, measured = jax.jit(make_train_step(model, tx, BOTH))(state, tokens(4, 16))
    assert float(measured["loss"]) == pytest.approx(float(sums.nats) / 64, rel=1e-6) != pytest.approx(float(objective), rel=1e-2)
    assert float(measured["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)


# ---- documents ----

EOT = 0
BOTH_RESET = objectives.Documents(EOT, attention=True, positions=True)
READER = ModelConfig(vocab_size=61, context_len=16, n_layers=2, n_heads=2, d_model=16, d_ff=32, init_std=0.3, tied_head=False)
# Three documents, the first without its beginning; each token stands in one of them alone.
PIECES = [[5, 6, 7, 8], [EOT, 20, 21, 22, 23, 24, 25], [EOT, 40, 41, 42, 43]]
ROW = np.concatenate(PIECES)[None]


@functools.cache
def params_of(config):
    shapes = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))
    return jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_of(config, documents, tokens_BT, params):
    call = documents.call(tokens_BT) if documents else {}
    return gpt2.GPT2(config).apply({"params": params}, tokens_BT, **call)


def test_documents_are_counted_from_each_end_of_text_and_from_the_start_of_the_row():
    rows = np.random.default_rng(0).integers(0, 4, (7, 16))
    segments, positions = np.zeros_like(rows), np.zeros_like(rows)
    for row in range(7):
        for t in range(16):
            begins = rows[row, t] == EOT
            segments[row, t] = (segments[row, t - 1] if t else 0) + begins
            positions[row, t] = 0 if begins or t == 0 else positions[row, t - 1] + 1
    got = BOTH_RESET.call(jnp.asarray(rows))
    np.testing.assert_array_equal(got["segments_BT"], segments)
    np.testing.assert_array_equal(got["positions_BT"], positions)
    assert set(BOTH_RESET._replace(attention=False).call(jnp.asarray(rows))) == {"positions_BT"}
    assert set(BOTH_RESET._replace(positions=False).call(jnp.asarray(rows))) == {"segments_BT"}


SLOW = [("blocked", "none", True), ("reference", "full", False), ("xla", "dots", True), ("blocked", "attention", False)]
SEEN = [
    ("reference", "none", False),
    ("blocked", "none", False),
    ("xla", "full", True),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
]


@pytest.mark.parametrize(("implementation", "remat", "positions"), SEEN)
def test_no_token_of_another_document_changes_a_logit_or_gets_a_gradient(implementation, remat, positions, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 8)  # two blocks
    config = override(READER, {"attention": implementation, "remat": remat})
    told = BOTH_RESET._replace(positions=positions)
    first, last = 4, 11  # the document in the middle

    @functools.partial(jax.jit, static_argnames="documents")
    def read(params, tokens_BT, documents):
        call = documents.call(tokens_BT) if documents else {}

        def middle(params):
            logits = gpt2.GPT2(config).apply({"params": params}, tokens_BT, **call)[:, first:last]
            return (logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)).sum(), logits

        (_, logits), gradient = jax.value_and_grad(middle, has_aux=True)(params)
        return logits, jnp.abs(gradient["w_token_VD"]).sum(-1)

    params, row = params_of(config), jnp.asarray(ROW)
    others, before = row.at[:, :first].add(4).at[:, last + 1 :].add(4), jnp.array([5, 6, 7, 8])
    logits, gradient = read(params, row, told)
    np.testing.assert_array_equal(read(params, others, told)[0], logits)
    own = np.zeros(61, bool)
    own[[EOT, *range(20, 26)]] = True
    assert (gradient[own] > 0).all() and (gradient[~own] == 0).all()
    logits, gradient = read(params, row, None)
    assert (read(params, others, None)[0] != logits).any() and (gradient[before] > 0).all()


@pytest.mark.parametrize("changes", [{}, {"position": "rotary"}], ids=str)
def test_each_document_alone_has_the_logits_that_it_has_in_a_row(changes):
    config = override(READER, changes)
    params = params_of(config)
    alone = np.concatenate([logits_of(config, None, np.array([piece]), params) for piece in PIECES], axis=1)
    np.testing.assert_allclose(logits_of(config, BOTH_RESET, ROW, params), alone, atol=1e-5)
    for other in (None, BOTH_RESET._replace(attention=False), BOTH_RESET._replace(positions=False)) if not changes else ():
        assert np.abs(logits_of(config, other, ROW, params) - alone).max() > 1e-2


STEPS = {
    "blocked": ({"attention": "blocked"}, {}, {}),
    "xla, remat": ({"attention": "xla", "remat": "full"}, {}, {}),
    "micro-batches": ({}, {"micro_batches": 2}, {}),
    "chunks": ({"remat": "dots"}, {"loss_chunks": 4}, {}),
    "data and fsdp": ({}, {}, {"data": 2, "fsdp": 4}),
    "context": ({}, {}, {"data": 2, "context": 4}),
    "tensor and context": ({"attention": "xla"}, {"micro_batches": 2, "loss_chunks": 2}, {"data": 2, "tensor": 2, "context": 2}),
}


@functools.cache
def one_step(name=""):
    """(loss, parameters) after a step on rows with documents, prompts and padding."""
    model_changes, train_changes, mesh_sizes = STEPS.get(name, ({"attention": "reference"}, {}, {}))
    config, train = override(READER, {"vocab_size": 64} | model_changes), override(TrainConfig(), train_changes)
    rows = np.random.default_rng(1).integers(1, 64, (8, 17))
    rows[np.random.default_rng(2).random((8, 17)) < 0.2] = EOT
    rows[np.random.default_rng(3).random((8, 17)) < 0.3] ^= -1
    model, tx = gpt2.GPT2(config), optax.sgd(0.5)
    step = make_train_step(model, tx, train, documents=BOTH_RESET)
    state = init_state(model, tx, 0)._replace(params=params_of(config))
    if not mesh_sizes:
        state, figures = jax.jit(step)(state, jnp.asarray(rows, jnp.int32))
        return float(figures["loss"]), jax.device_get(state.params)
    mesh = sharding.make_mesh(MeshConfig(**mesh_sizes))
    with jax.sharding.set_mesh(mesh):
        state = jax.device_put(state, sharding.shardings(mesh, state))
        tokens_BW = sharding.put_rows(lambda start, stop: rows[start:stop], rows.shape, jnp.int32, mesh)
        state, figures = jax.jit(step)(state, tokens_BW)
    return float(figures["loss"]), jax.device_get(state.params)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("blocked", "tensor and context"))) for name in STEPS])
def test_a_step_with_documents_is_the_same_on_every_mesh_and_by_every_implementation(name):
    (loss, params), (expected_loss, expected) = one_step(name), one_step()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, expected)


def test_where_nothing_is_asked_for_the_step_computes_nothing_of_documents():
    assert objectives.documents_of(DataConfig(), 256) is None
    assert objectives.documents_of(DataConfig(reset_positions=True), 256) == objectives.Documents(256, attention=False, positions=True)
    config = Config(name="test", model=override(READER, {"vocab_size": 64}), train=TrainConfig(batch_size=8), mesh=MeshConfig(data=8))
    mesh = sharding.make_mesh(config.mesh)
    with jax.sharding.set_mesh(mesh):
        plain, told = (lower_step(config, gpt2.GPT2(config.model), mesh, 8, documents).as_text() for documents in (None, BOTH_RESET))
    assert "cumsum" in told and "cummax" in told and "cumsum" not in plain and "cummax" not in plain
