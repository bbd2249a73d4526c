"""The plan of a train step on the machine at hand: counted from what is traced, over measured rates, beside a step that is taken."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mlm_jax import metrics, objectives, observe, sharding
from mlm_jax.config import Config, InputError, ModelConfig
from mlm_jax.metrics import duration
from mlm_jax.model import gpt2
from mlm_jax.plan import counted
from mlm_jax.plan.describe import table
from mlm_jax.plan.tpu import with_vocabulary
from mlm_jax.train import abstract_state, check_batches, trace_step

PLATFORMS = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step needs of all devices together, how long it should take, and how long it took."""

    name: str
    devices: str
    batch_size: int
    tokens: int  # of a step
    steps: int
    n_params: int
    need: str  # memory of a device, in words
    flops: dict[str, float]  # of products, by the type of what is multiplied
    bytes: float
    unpriced: tuple[str, ...]
    flops_per_s: dict[str, float]  # of one device, measured
    bytes_per_s: float
    lower_s: float
    step_s: float
    measured_s: float
    model_flops: float

    def to_json(self) -> dict[str, Any]:
        """All of it, as one JSON object."""
        return dataclasses.asdict(self)


def plan(config: Config, build: Callable[[ModelConfig], gpt2.Model], platform: str) -> Plan:
    """The plan of the step of `config` on all devices of this machine; some steps are taken, of random tokens.

    Raises:
      InputError: there is no such device here, or the mesh or the batch does not fit.
    """
    if jax.devices()[0].platform != platform:
        raise InputError(
            "--topology", platform, f"the devices of this machine are of kind {jax.devices()[0].platform}", "Name that, or the slice of TPUs"
        )
    config = with_vocabulary(config)
    mesh, model = sharding.make_mesh(config.mesh), build(config.model)
    check_batches(mesh, config)
    documents = objectives.documents_of(config.data, config.model.vocab_size - 1)
    with jax.sharding.set_mesh(mesh):
        traced = trace_step(config, model, mesh, config.train.batch_size, documents)
        found = counted.count(traced.jaxpr)
        need = observe.need(traced.lower().compile())
        n_params = gpt2.n_params(abstract_state(config, model, mesh).params)
    machine = counted.measure_machine(found.flops)
    estimated = counted.estimate(found, machine, mesh.size)
    tokens = config.train.batch_size * config.model.context_len
    return Plan(
        name=config.name,
        devices=f"{mesh.size} x {jax.devices()[0].device_kind}",
        batch_size=config.train.batch_size,
        tokens=tokens,
        steps=config.train.steps,
        n_params=n_params,
        need=need,
        flops=dict(found.flops),
        bytes=found.bytes,
        unpriced=found.unpriced,
        flops_per_s=dict(machine.flops_per_s),
        bytes_per_s=machine.bytes_per_s,
        lower_s=estimated.lower_s,
        step_s=estimated.step_s,
        measured_s=counted.measure_step(config, build, documents),
        model_flops=metrics.flops_per_token(config.model, n_params) * tokens,
    )


def describe(plan: Plan) -> str:
    """The page."""
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in plan.flops_per_s.items())
    products = ", ".join(f"{flops / 1e9:,.1f} GFLOP in {dtype}" for dtype, flops in plan.flops.items())
    rows = [("at least", plan.lower_s), ("estimate", plan.step_s), ("measured", plan.measured_s)]
    lines = [
        f"{plan.name}, {plan.n_params:,} parameters, on {plan.devices}",
        f"{plan.batch_size} x {plan.tokens // plan.batch_size} tokens a step; it needs {plan.need}",
        f"Counted: products {products}; {plan.bytes / 1e9:,.2f} GB to and from memory",
        f"Measured of a device: {rates}; {plan.bytes_per_s / 1e9:,.1f} GB/s",
        *(f"not counted: {name}" for name in plan.unpriced),
        "",
        *table(
            ("", "ms", "tokens/s", "GFLOP/s of the model"),
            [(name, f"{s * 1e3:,.1f}", f"{plan.tokens / s:,.0f}", f"{plan.model_flops / s / 1e9:,.0f}") for name, s in rows],
        ),
        "",
        f"{plan.steps:,} steps, {plan.steps * plan.tokens / 1e6:,.1f} million tokens: {duration(plan.measured_s * plan.steps)} as measured",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"
