"""A step counted from its jaxpr, timed by what this machine reaches in products and in memory, and beside it the step measured.

For a CPU or a GPU at hand, whose compilers say nothing of time: the estimate can be judged by the measurement.

What moves through memory follows a model of how compilers fuse. A stored value is an argument or a constant, what a product, a reduction, a gather or
a scatter gives, what a loop or a shard_map takes and gives, or whatever another of these but a reduction takes. What lies between stored values, one
elementwise operation after the other, is one pass: it reads each stored value that it depends on once, and writes one result. A value in between that
several passes depend on is stored too where that moves fewer bytes than computing it in each of them. A loop over a stack copies a turn's part out of
it, or into it. Reshaping and transposing move nothing, caches do not exist.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from mlm_jax import objectives, sharding
from mlm_jax.config import Config, ModelConfig
from mlm_jax.model import gpt2
from mlm_jax.train import first_state, lower_step

# Primitives by what they are in the model; all others whose shapes are those of an elementwise operation are one.
CALLS = {"jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"}
VIEWS = {"reshape", "transpose", "squeeze", "copy", "name", "device_put", "pvary", "stop_gradient", "sharding_constraint", "optimization_barrier"}
WINDOWS = {"slice", "dynamic_slice", "split"}  # reads of a part
FILLS = {"broadcast_in_dim", "iota"}  # computed where they are used
PLACED = {"dynamic_update_slice", "scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"}  # written over the operand
JOINED = {"gather", "concatenate", "pad", "rev"}
REDUCED = {"reduce", "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"}
SWEPT = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "top_k", "approx_top_k"}  # as reductions are, of results as large
COLLECTIVES = {"psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all", "ppermute"}
KEYS = {"random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_clone"}  # of random numbers: few bytes


class Product(NamedTuple):
    """One shape of matrix product: `batch` times (rows, inner) by (inner, columns)."""

    dtype: str  # of the operands, of the larger where they differ
    batch: int
    rows: int
    columns: int
    inner: int
    bytes: float  # of both operands and of the result

    @property
    def flops(self) -> float:
        """A multiplication and an addition count two."""
        return 2.0 * self.batch * self.rows * self.columns * self.inner


class Counted(NamedTuple):
    """The work of one call, that of all devices together."""

    products: dict[Product, float]  # how often each
    operations: float  # elementwise: one per element of a result, of a reduction one per element that it takes
    pass_bytes: float  # through memory, for all but the products
    boundary_bytes: float  # arguments and results: these move whatever is fused
    unpriced: tuple[str, ...]  # what is not in the other figures, or not in full

    @property
    def bytes(self) -> float:
        """All that moves through memory: what products read and write, and the passes."""
        return self.pass_bytes + sum(times * product.bytes for product, times in self.products.items())

    @property
    def flops(self) -> dict[str, float]:
        """The FLOPs of products, by the dtype of their operands."""
        found: dict[str, float] = {}
        for product, times in self.products.items():
            found[product.dtype] = found.get(product.dtype, 0.0) + times * product.flops
        return found


class _Value:
    """A value of the jaxpr, as often as its loop body is executed."""

    def __init__(self, size: float, times: float, inputs: Sequence["_Value"] = (), *, stored: bool = False) -> None:
        """`size` in bytes. It is computed in a pass from `inputs`, unless it is `stored` by what gives it."""
        self.size, self.times, self.inputs = size, times, tuple(dict.fromkeys(inputs))
        self.given, self.stored, self.uses = stored, stored, 0
        self.reads: dict[_Value, None] = {self: None} if stored else {}  # the stored values that a pass has to read for it


class _Walk:
    """Goes through a jaxpr and adds up."""

    def __init__(self) -> None:
        self.products: dict[Product, float] = {}
        self.unpriced: dict[str, None] = {}
        self.operations = 0.0
        self.moved = 0.0  # bytes that do not depend on what is stored in the end
        self.values: list[_Value] = []
        self.passes: list[tuple[_Value, float]] = []  # reductions: what they take, and how often

    def new(self, size: float, times: float, inputs: Sequence[_Value] = (), *, stored: bool = False) -> _Value:
        value = _Value(size, times, inputs, stored=stored)
        for x in value.inputs:
            x.uses += 1
        self.values.append(value)
        return value

    def body(self, jaxpr: Any, inputs: Sequence[_Value], times: float) -> list[_Value]:
        """Adds what `jaxpr` does `times` times; returns its results."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var in jaxpr.constvars:
            known[var] = self.new(_size(var), times, stored=True)
        for eqn in jaxpr.eqns:
            results = self.equation(eqn, self.looked_up(eqn.invars, known, times), times)
            known |= zip(eqn.outvars, results, strict=True)
        return self.looked_up(jaxpr.outvars, known, times)

    def looked_up(self, atoms: Sequence[Any], known: Mapping[Any, _Value], times: float) -> list[_Value]:
        """What variables stand for; a literal moves nothing."""
        return [self.new(0.0, times) if isinstance(atom, core.Literal) else known[atom] for atom in atoms]

    def loop(self, jaxpr: Any, inputs: Sequence[_Value], times: float) -> None:
        """Adds what the body of a loop or of a shard_map does: it finds what it takes in memory, and leaves what it gives there."""
        jaxpr = _open(jaxpr)
        self.store(inputs)
        self.store(self.body(jaxpr, self.stored(list(map(_size, jaxpr.invars)), times), times))

    def store(self, values: Iterable[_Value]) -> None:
        for value in values:
            value.stored = True
            value.uses += 1

    def stored(self, sizes: Sequence[float], times: float) -> list[_Value]:
        """New values that are in memory once they are there at all."""
        return [self.new(size, times, stored=True) for size in sizes]

    def passed(self, sizes: Sequence[float], times: float, inputs: Sequence[_Value]) -> list[_Value]:
        """New values that a pass computes."""
        return [self.new(size, times, inputs) for size in sizes]

    def equation(self, eqn: Any, inputs: Sequence[_Value], times: float) -> list[_Value]:
        """Adds what one equation does; returns its results."""
        name, params = eqn.primitive.name, eqn.params
        sizes = [_size(var) for var in eqn.outvars]
        if name in CALLS:
            return self.body(_open(params["jaxpr" if "jaxpr" in params else "call_jaxpr"]), inputs, times)
        if name == "shard_map":
            self.loop(params["jaxpr"], inputs, times * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]))
            return self.stored(sizes, times)
        if name == "scan":
            body = _open(params["jaxpr"])
            self.loop(body, inputs, times * params["length"])
            pairs = (*zip(eqn.invars, body.invars, strict=True), *zip(eqn.outvars, body.outvars, strict=True))
            self.moved += 2 * times * sum(_size(whole) for whole, part in pairs if whole.aval.shape != part.aval.shape)
            return self.stored(sizes, times)
        if name == "while":
            self.unpriced["a while loop, counted as if it went round once"] = None
            body = _open(params["body_jaxpr"])
            self.loop(body, inputs[len(inputs) - len(body.invars) :], times)
            return self.stored(sizes, times)
        if name == "cond":
            self.dearest(params["branches"], inputs[1:], times)
            return self.stored(sizes, times)
        if name in ("dot_general", "conv_general_dilated"):
            product = _product(eqn)
            self.products[product] = self.products.get(product, 0.0) + times
            self.store(inputs)
            return self.stored(sizes, times)
        if name in VIEWS:
            return list(inputs)
        if name in WINDOWS:
            self.store(inputs[:1])
            return self.stored(sizes, times)
        if name in FILLS | KEYS:
            return self.passed(sizes, times, inputs)
        if name in PLACED:
            self.store(inputs)
            update = inputs[1 if name == "dynamic_update_slice" else 2]
            self.moved += times * update.size * (3 if name.startswith("scatter-") else 2)  # scatter-add also reads what was there
            return self.stored(sizes, times)
        if name in JOINED:
            self.store(inputs)
            self.moved += times * 2 * sum(sizes)
            return self.stored(sizes, times)
        if name in REDUCED | SWEPT:
            self.operations += times * max(math.prod(atom.aval.shape) for atom in eqn.invars)
            self.passes += [(self.new(0.0, times, inputs), times)]
            self.moved += times * sum(sizes)
            return self.stored(sizes, times)
        if name == "random_bits":  # as large as what they are for, and of a hundred operations each
            self.unpriced["the computation of random numbers"] = None
            return self.passed(sizes, times, inputs)
        if not _is_elementwise(eqn):
            self.unpriced[f"{name} {params['name']}" if isinstance(params.get("name"), str) else name] = None
            self.store(inputs)
            self.moved += times * (sum(x.size for x in inputs) + sum(sizes))
            return self.stored(sizes, times)
        self.operations += times * math.prod(eqn.outvars[0].aval.shape)
        return self.passed(sizes, times, inputs)

    def dearest(self, branches: Sequence[Any], inputs: Sequence[_Value], times: float) -> None:
        """Adds what the branch does that has most FLOPs in products, or of equals moves most bytes."""

        def cost(branch: Any) -> tuple[float, float]:
            counted = count(branch)
            return sum(counted.flops.values()), counted.bytes

        self.loop(max(branches, key=cost), inputs, times)

    def pass_bytes(self) -> float:
        """What moves, once all is walked through."""
        moved = self.moved
        for value in self.values:  # in the order in which they are computed
            if value.given:
                continue
            reads = dict.fromkeys(read for x in value.inputs for read in x.reads)
            again = sum(read.size for read in reads)
            stores = value.stored or (value.uses > 1 and value.size * (1 + value.uses) + again < value.uses * again)
            value.reads = {value: None} if stores else reads
            if stores:
                moved += value.times * (again + value.size)
        return moved + sum(times * sum(read.size for read in taken.reads) for taken, times in self.passes)


def count(jaxpr: Any) -> Counted:
    """What a call of the closed `jaxpr` does: of a scan all turns, of a conditional the dearest branch, of a shard_map what all devices do.

    What is computed and not used is left out, as compilers leave it out.
    """
    needed, _ = partial_eval.dce_jaxpr(_open(jaxpr), [True] * len(_open(jaxpr).outvars), instantiate=True)
    walk = _Walk()
    inputs = [walk.new(_size(var), 1.0, stored=True) for var in needed.invars]
    results = walk.body(needed, inputs, 1.0)
    walk.store(results)
    boundary = sum(map(_size, (*needed.invars, *needed.outvars)))
    return Counted(walk.products, walk.operations, walk.pass_bytes(), float(boundary), tuple(walk.unpriced))


def _open(jaxpr: Any) -> Any:
    """A jaxpr without the constants that a closed one brings."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _size(atom: Any) -> float:
    """Bytes of a value; a random key and whatever else has no bytes is 0."""
    return float(math.prod(atom.aval.shape) * getattr(getattr(atom.aval, "dtype", None), "itemsize", 0)) if hasattr(atom.aval, "shape") else 0.0


def _bodies(params: Mapping[str, Any]) -> Iterable[Any]:
    """The jaxprs among the parameters of an equation."""
    return core.jaxprs_in_params(dict(params))


def _is_elementwise(eqn: Any) -> bool:
    """Each element of the result, or results of one shape, depends on one element of each operand, as far as shapes tell."""
    shapes = [atom.aval.shape for atom in (*eqn.invars, *eqn.outvars)]
    results = {var.aval.shape for var in eqn.outvars}
    try:
        fits = results == {np.broadcast_shapes(*shapes)}
    except ValueError:
        return False
    return fits and eqn.primitive.name not in COLLECTIVES and not list(_bodies(eqn.params))


def _product(eqn: Any) -> Product:
    """The shape of a dot_general, or of a convolution as the product that it is."""
    left, right, out = (atom.aval for atom in (*eqn.invars[:2], eqn.outvars[0]))
    dtype, size = str(max(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)), sum(map(_size, (*eqn.invars, *eqn.outvars)))
    if eqn.primitive.name == "dot_general":
        (summed, _), (batched, _) = eqn.params["dimension_numbers"]
        inner, batch = (math.prod(left.shape[i] for i in axes) for axes in (summed, batched))
        return Product(dtype, batch, left.size // (inner * batch), right.size // (inner * batch), inner, size)
    channels = right.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return Product(dtype, 1, out.size // channels, channels, right.size // channels, size)


class Machine(NamedTuple):
    """What one device reaches."""

    flops_per_s: dict[str, float]  # in a large product, by the dtype of its operands
    bytes_per_s: float  # read and written in a pass over a large array


def measure_machine(dtypes: Iterable[str] = ("float32", "bfloat16"), *, megabytes: int = 256, least_s: float = 0.01, rounds: int = 5) -> Machine:
    """What the first device reaches: products of square matrices, doubled in size until one takes `least_s` seconds, and a pass over an array of
    `megabytes` that writes over it; the best of `rounds`, as what else the machine does can only slow them."""

    def seconds(call: Callable[[Any], Any], x: Any) -> float:
        found = []
        for _ in range(1 + rounds):  # the first compiles
            started = time.perf_counter()
            x = jax.block_until_ready(call(x))
            found.append(time.perf_counter() - started)
        return min(found[1:])

    def flops_per_s(dtype: str, side: int = 512) -> float:
        kind = jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else None  # what sums of integers need
        x = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
        product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=kind))
        found = seconds(lambda _: product(x, x), None)
        return 2 * side**3 / found if found >= least_s else flops_per_s(dtype, 2 * side)

    x = jnp.zeros(megabytes * 250_000, jnp.float32)
    bytes_per_s = 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1, donate_argnums=0), x)
    return Machine({dtype: flops_per_s(dtype) for dtype in dtypes}, bytes_per_s)


class Estimated(NamedTuple):
    """The seconds of a call."""

    lower_s: float  # no call is faster at the rates of the machine
    products_s: float
    passes_s: float

    @property
    def step_s(self) -> float:
        """The estimate: products and passes one after the other."""
        return self.products_s + self.passes_s


def estimate(counted: Counted, machine: Machine, devices: int = 1) -> Estimated:
    """What `counted` takes on `devices` such machines that share it evenly; communication, and what is unpriced, takes no time.

    A product takes as long as its FLOPs or as its bytes, whichever is longer; a pass as long as its bytes. At least it takes as long as
    all products, or as reading the arguments and writing the results.

    Raises:
      KeyError: the machine has no rate for the operands of a product.

    Source: Williams et al. 2009, Roofline, for each product.
    """
    rate, bandwidth = {dtype: devices * machine.flops_per_s[dtype] for dtype in counted.flops}, devices * machine.bytes_per_s
    least = sum(flops / rate[dtype] for dtype, flops in counted.flops.items())
    products = sum(times * max(p.flops / rate[p.dtype], p.bytes / bandwidth) for p, times in counted.products.items())
    return Estimated(max(least, counted.boundary_bytes / bandwidth), products, counted.pass_bytes / bandwidth)


def stepper(config: Config, build: Callable[[ModelConfig], gpt2.Model], documents: objectives.Documents | None = None) -> Callable[[], float]:
    """Compiles the train step of `config` for the devices at hand; what is returned takes one step on random tokens and returns its seconds."""
    model, mesh = build(config.model), sharding.make_mesh(config.mesh)
    shape = config.train.batch_size, config.model.context_len + 1
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    with jax.sharding.set_mesh(mesh):
        step = lower_step(config, model, mesh, shape[0], documents).compile()
        state = first_state(config, model, mesh)
        tokens_BW = sharding.put_rows(lambda start, stop: tokens[start:stop], shape, np.int32, mesh)

    def take() -> float:
        nonlocal state
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, tokens_BW))
        return time.perf_counter() - started

    return take


def measure_step(
    config: Config,
    build: Callable[[ModelConfig], gpt2.Model],
    documents: objectives.Documents | None = None,
    *,
    steps: int = 5,
    at_most_s: float = 30.0,
) -> float:
    """Seconds of a train step on the devices at hand: the median of `steps` after a first one, of fewer where these take `at_most_s` together."""
    take, found = stepper(config, build, documents), []
    take()
    while len(found) < steps and sum(found) < at_most_s:
        found.append(take())
    return statistics.median(found)
