"""What a step costs is counted as by hand, and the estimate made of it puts steps into the order in which they are measured."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments import bench_plan
from mlm_jax.config import Config, ModelConfig, override
from mlm_jax.model import gpt2
from mlm_jax.plan import counted
from mlm_jax.plan.counted import Counted, Machine, Product
from tests import compilation

ROOT = Path(__file__).parents[2]
M, K, N = 8, 16, 4


def ones(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def count(f, *arguments):
    return counted.count(jax.make_jaxpr(f)(*arguments))


def float_bytes(*sizes):
    return 4.0 * sum(sizes)


def test_a_product_is_two_flops_for_each_triple_and_moves_operands_and_result():
    got = count(lambda a, b: a @ b, ones(M, K, dtype=jnp.bfloat16), ones(K, N, dtype=jnp.bfloat16))
    assert got.flops == {"bfloat16": 2 * M * N * K}
    assert got.bytes == got.boundary_bytes == 2 * (M * K + K * N + M * N)
    assert (got.pass_bytes, got.operations, got.unpriced) == (0, 0, ())
    batched = count(lambda a, b: jnp.einsum("zmk,znk->zmn", a, b), ones(3, M, K), ones(3, N, K))
    assert batched.products == {Product("float32", 3, M, N, K, float_bytes(3 * M * K, 3 * K * N, 3 * M * N)): 1}
    assert count(lambda a, b: jnp.einsum("mk,kn->mn", a, b), ones(M, K, dtype=jnp.bfloat16), ones(K, N)).flops == {"float32": 2 * M * N * K}


def test_a_convolution_is_the_product_of_its_windows_with_its_kernel():
    # 2 images of 3 channels and 10 x 10 pixels, 5 kernels of 3 x 3: 2 x 5 x 8 x 8 results of 27 products each.
    got = count(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"), ones(2, 3, 10, 10), ones(5, 3, 3, 3))
    assert got.flops == {"float32": 2 * (2 * 5 * 8 * 8) * 27}


def test_loops_count_all_their_turns():
    def layers(x, w_LKK):
        return jax.lax.scan(lambda x, w_KK: (x @ w_KK, None), x, w_LKK)[0]

    got = count(layers, ones(M, K), ones(6, K, K))
    assert got.flops == {"float32": 6 * 2 * M * K * K}
    assert got.bytes == 6 * float_bytes(M * K, K * K, M * K) + 6 * 2 * float_bytes(K * K)  # each matrix is copied out of the stack
    nested = count(lambda x, w: jax.lax.scan(lambda x, _: (layers(x, w), None), x, length=5)[0], ones(M, K), ones(6, K, K))
    assert nested.flops == {"float32": 5 * 6 * 2 * M * K * K}


def test_a_gradient_is_counted_with_what_it_needs_and_nothing_else():
    def loss(w, x):
        return jnp.square(x @ w).sum()

    # Forward, and the gradient of w; the one of x is not asked for.
    assert count(jax.grad(loss), ones(K, N), ones(M, K)).flops == {"float32": 2 * 2 * M * N * K}
    assert count(jax.grad(loss, argnums=(0, 1)), ones(K, N), ones(M, K)).flops == {"float32": 3 * 2 * M * N * K}
    assert count(lambda w, x: (x @ w, x + 1)[1], ones(K, N), ones(M, K)).flops == {}


def test_rematerialisation_doubles_the_products_of_the_forward_pass():
    def loss(w_LKK, x, remat):
        layer = lambda x, w_KK: (jnp.sin(jnp.sin(x @ w_KK) @ w_KK), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w_LKK)[0].sum()

    one = 2 * M * K * K
    plain, again = (sum(count(jax.grad(functools.partial(loss, remat=remat)), ones(6, K, K), ones(M, K)).flops.values()) for remat in (False, True))
    assert plain == 6 * (2 + 4) * one and again == 6 * (2 + 2 + 4) * one


def test_elementwise_operations_are_one_pass_between_what_is_stored():
    size = float_bytes(M * K)
    got = count(lambda x, y: jnp.tanh(x * 2 + y).T - 1, ones(M, K), ones(M, K))
    assert got.bytes == 3 * size and got.operations == 4 * M * K
    relu = count(lambda x: jax.nn.relu(x) + 1, ones(M, K))  # its gradient is its own
    assert relu.bytes == 2 * size
    # A softmax reads its input for the maximum, for the sum and for the result, which it writes; and row by row writes and reads two.
    softmax = count(lambda x: jax.nn.softmax(x, axis=-1), ones(M, K))
    assert 4 * size <= softmax.bytes <= 4 * size + 6 * float_bytes(M)
    # What a product takes is written for it and read by it.
    assert count(lambda x, w: jnp.tanh(x) @ w, ones(M, K), ones(K, N)).bytes == float_bytes(M * K, M * K, M * K, K * N, M * N)


def test_what_several_passes_need_is_stored_where_that_moves_less():
    def twice(*xs):
        total = sum(xs)
        return total.sum(), (total * total).sum()

    size = float_bytes(M * K)
    one, four = (count(twice, *[ones(M, K)] * n).bytes - float_bytes(2) for n in (1, 4))
    assert one == 2 * size  # read twice
    assert four == 4 * size + size + 2 * size  # the sum is written once and read twice; again and again would be eight


def test_gathers_and_updates_move_what_they_touch():
    table, rows = ones(1000, K), ones(M, dtype=jnp.int32)
    assert count(lambda w, i: w.at[i].get(mode="promise_in_bounds"), table, rows).bytes < float_bytes(4 * M * K)
    update = count(lambda w, x: jax.lax.dynamic_update_slice(w, x, (0, 0)), table, ones(M, K))
    assert update.bytes == 2 * float_bytes(M * K)
    assert count(lambda w: w[:M] @ w[M : M + K], table).bytes == float_bytes(M * K, K * K, M * K)


def test_a_conditional_counts_its_dearest_branch():
    got = count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x), ones(K, K))
    assert got.flops == {"float32": 2 * 2 * K**3} and got.unpriced == ()


def test_what_cannot_be_counted_is_named():
    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    got = count(until, ones(K, K))
    assert got.flops == {"float32": 2 * K**3} and got.unpriced == ("a while loop, counted as if it went round once",)

    drawn = count(lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), ones(M, K))
    assert drawn.unpriced == ("the computation of random numbers",) and drawn.pass_bytes == drawn.boundary_bytes

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    got = count(lambda x: pl.pallas_call(kernel, out_shape=x, name="square")(x), ones(K, K))
    assert got.flops == {} and got.unpriced == ("pallas_call square",) and got.bytes == 2 * float_bytes(K * K)


def test_a_shard_map_counts_what_all_devices_do():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    whole = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count(whole, ones(M, K), ones(K, N)).flops == {"float32": 2 * M * N * K}
    halves = jax.shard_map(lambda x: x / 2, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert count(halves, ones(M, K)).bytes == 2 * float_bytes(M * K)
    summed = jax.shard_map(lambda x: jax.lax.psum(x.sum(), "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    assert [name for name in count(summed, ones(M, K)).unpriced if name.startswith("psum")]


SMALL = override(bench_plan.BASE, {"model.d_model": 64, "model.d_ff": 256, "model.context_len": 64, "model.vocab_size": 512})


@functools.cache
def step(**changes) -> Counted:
    """The work of the step of SMALL with changes: model__n_layers is model.n_layers."""
    return bench_plan.count(changed(changes))


def changed(changes: dict) -> Config:
    return override(SMALL, {name.replace("__", "."): value for name, value in changes.items()})


def flops(work: Counted) -> float:
    return sum(work.flops.values())


def by_formula(config: Config) -> float:
    """FLOPs of a step: 6 for each token and weight of a product, and 12 L T D for each token; embeddings are looked up."""
    c = config.model
    weights = c.n_layers * (4 * c.d_model**2 + 2 * c.d_model * c.d_ff) + c.vocab_size * c.d_model
    return config.train.batch_size * c.context_len * (6 * weights + 12 * c.n_layers * c.context_len * c.d_model)


@pytest.mark.parametrize("changes", [{}, {"model__n_layers": 2, "model__unroll_layers": True}, {"train__micro_batches": 2}])
def test_the_step_of_gpt2_has_the_flops_of_the_formula(changes):
    work = step(**changes)
    assert flops(work) == pytest.approx(by_formula(changed(changes)), rel=0.01)
    assert work.unpriced == () and set(work.flops) == {"float32"}


def test_the_step_in_bfloat16_has_its_products_there_but_for_gradients_of_logits_and_scores():
    c, tokens = SMALL.model, SMALL.train.batch_size * SMALL.model.context_len
    in_float32 = 2 * tokens * 2 * c.vocab_size * c.d_model + 2 * tokens * 2 * c.n_layers * c.context_len * c.d_model
    assert step(model__compute_dtype="bfloat16").flops == {"bfloat16": flops(step()) - in_float32, "float32": in_float32}


def test_what_a_change_costs_has_its_direction_and_size():
    plain, shallow, double = step(), step(model__n_layers=2), step(train__batch_size=8)
    head = by_formula(override(SMALL, {"model.n_layers": 1})) * 2 - by_formula(override(SMALL, {"model.n_layers": 2}))
    assert flops(plain) - head == pytest.approx(2 * (flops(shallow) - head))
    assert flops(double) == pytest.approx(2 * flops(plain))
    assert 1.2 * shallow.bytes < plain.bytes < 2 * shallow.bytes
    assert 1.5 * plain.bytes < double.bytes < 2 * plain.bytes  # the parameters and their moments stay as large
    # The forward products are 1/3 of all; the last of the MLP and those of the head are not needed again.
    assert 1.15 < flops(step(model__remat="full")) / flops(plain) < 4 / 3
    assert flops(step(train__loss_chunks=4)) == pytest.approx(flops(plain)), "no logits are made twice"
    params = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(SMALL.model), jax.random.key(0)))
    assert plain.boundary_bytes == pytest.approx(2 * 3 * 4 * gpt2.n_params(params), rel=0.02)  # read and written, with two moments


def test_the_estimate_is_a_roofline_for_each_product_and_then_the_passes():
    machine = Machine({"float32": 100.0, "bfloat16": 200.0}, 10.0)
    long, wide = Product("float32", 1, 10, 10, 10, 40.0), Product("bfloat16", 1, 10, 10, 1, 100.0)
    work = Counted({long: 2.0, wide: 1.0}, 0.0, 50.0, 30.0, ())
    got = counted.estimate(work, machine)
    assert got.products_s == 2 * 20.0 + 10.0  # 2,000 FLOPs at 100 a second, twice; 100 bytes at 10, not 200 FLOPs at 200
    assert got.passes_s == 5.0 and got.step_s == 55.0
    assert got.lower_s == 2 * 20.0 + 1.0
    assert counted.estimate(work._replace(boundary_bytes=4000.0), machine).lower_s == 400.0
    assert counted.estimate(work, machine, devices=5) == tuple(seconds / 5 for seconds in got)
    with pytest.raises(KeyError, match="bfloat16"):
        counted.estimate(work, Machine({"float32": 100.0}, 10.0))


def test_a_machine_has_a_rate_for_every_dtype_that_is_asked_for():
    machine = counted.measure_machine(("float32", "int8"), megabytes=1, least_s=0.0, rounds=1)
    assert set(machine.flops_per_s) == {"float32", "int8"}
    assert all(1e6 < rate < 1e16 for rate in (*machine.flops_per_s.values(), machine.bytes_per_s))


@pytest.mark.parametrize(("at_most_s", "taken"), [(1000.0, 3), (15.0, 2), (0.5, 1)])
def test_a_step_is_measured_after_a_first_one_and_never_much_longer_than_allowed(monkeypatch, at_most_s, taken):
    times = iter([100.0, 9.0, 8.0, 10.0])
    monkeypatch.setattr(counted, "stepper", lambda *_: lambda: next(times))
    config = Config(name="test", model=ModelConfig(vocab_size=8))
    got = counted.measure_step(config, gpt2.GPT2, steps=3, at_most_s=at_most_s)
    assert got == {3: 9.0, 2: 8.5, 1: 9.0}[taken]


@pytest.mark.slow
def test_the_step_that_is_measured_is_one_of_training():
    tiny = {"model.n_layers": 1, "model.d_model": 32, "model.d_ff": 64, "model.context_len": 16, "train.batch_size": 8, "mesh.data": 8}
    assert 0 < counted.measure_step(override(SMALL, tiny), gpt2.GPT2, steps=2) < 60


@pytest.mark.slow
def test_estimates_put_ten_steps_into_the_order_in_which_they_are_measured():
    # A process of its own: on one device, compiled as users do.
    environment = compilation.as_users(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(ROOT / "experiments/bench_plan.py"), "--rounds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert len(re.findall(r"^\| .* \| \d+ \(\d+ to \d+\) \| [\d.]+ \|$", done.stdout, re.MULTILINE)) == 10
    last = re.search(r"^rank correlation ([\d.-]+), the slowest step takes ([\d.]+) times the quickest$", done.stdout, re.MULTILINE)
    assert last and float(last[1]) >= 0.8 and float(last[2]) >= 5
