"""A train step compiled ahead of time for a TPU that is not there, and the cycles that its compiler plans.

    PYTHONPATH=. python tests/tpu_aot.py v5e:2x4 --devices 1 --batch 8 --set model.matmul=int8

prints what one device is planned to do for GPT-2 124M in bfloat16, as JSON; libtpu is needed, a TPU is not.
"""

import argparse
import collections
import json
import math
import os
import re
from typing import Any, NamedTuple

THERE = {  # the environment in which libtpu compiles on any machine
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
INSTRUCTION = re.compile(r"(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")  # a layout has no space, so a type that is no tuple is a word
PRODUCTS = ("convolution", "dot")


class Instruction(NamedTuple):
    root: bool
    type: str
    op: str
    operands: list[str]
    text: str

    def attribute(self, key: str) -> str:
        """What stands behind `key` = in the text; "" where nothing does."""
        found = re.search(rf'\b{key}"?[=:]"?%?([\w.\-]+)', self.text)
        return found[1] if found else ""


def computations(hlo: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, name of the entry) of a compiled module's text."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            inside = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif inside is not None and (one := INSTRUCTION.match(re.sub(r"/\*index=\d+\*/", "", line.strip()))):
            root, name, kind, op, rest = one.groups()
            inside[name] = Instruction(bool(root), kind, op, re.findall(r"%([\w.\-]+)", rest.split("), ")[0]), line)
    return found, entry


def constant(computation: dict[str, Instruction], name: str) -> int | None:
    """The number that `name` is, behind copies; None where it is none."""
    one = computation.get(name)
    if one is None or one.op in ("copy", "bitcast", "convert"):
        return constant(computation, one.operands[0]) if one else None
    value = re.search(r"constant\((-?\d+)\)", one.text)
    return int(value[1]) if one.op == "constant" and value else None


def trips(every: dict[str, dict[str, Instruction]], around: dict[str, Instruction], loop: Instruction) -> int:
    """How often `loop`, of the computation `around`, goes round: from its condition (below a constant), step and start.

    Raises:
      ValueError: it does not count so.
    """
    condition, body = every[loop.attribute("condition")], every[loop.attribute("body")]
    test = next(one for one in condition.values() if one.root)
    counter, limit = condition.get(test.operands[0]), constant(condition, test.operands[1]) if len(test.operands) == 2 else None
    if test.op != "compare" or test.attribute("direction") != "LT" or counter is None or counter.op != "get-tuple-element" or limit is None:
        raise ValueError(f"a loop that is not counted: {test.text}")
    k, step = int(counter.attribute("index")), 0
    start = constant(around, around[loop.operands[0]].operands[k])
    name = next(one for one in body.values() if one.root).operands[k]
    while (one := body.get(name)) is not None and one.op in ("add", "copy", "bitcast"):
        added = [constant(body, operand) for operand in one.operands]
        step += sum(n for n in added if n is not None)
        name = next(operand for operand, n in zip(one.operands, added, strict=True) if n is None)
    if not step or start is None:
        raise ValueError(f"a loop from {start} in steps of {step}: {loop.text}")
    return max(math.ceil((limit - start) / step), 0)


def plan(hlo: str) -> dict[str, Any]:
    """What one device is planned to do, of the text of a compiled TPU module; what is in a loop counts as often as it goes round.

    "cycles": by phase: forward, backward (with what is computed again), rest; "products": those of instructions that multiply matrices,
    by the types of both; "unpriced": how many kernels and instructions between devices there are, which carry no cycles.
    """
    every, entry = computations(hlo)
    cycles, products, unpriced = collections.Counter(), collections.Counter(), collections.Counter()

    def types(around: dict[str, Instruction], one: Instruction) -> list[str]:
        """The types of what is multiplied in `one`, a fusion or a product itself: ["bf16 x bf16"]."""
        if one.op in PRODUCTS:
            return [" x ".join(around[name].type.split("[")[0] for name in one.operands)]
        inside = every.get(one.attribute("calls"), {}) if one.op == "fusion" else {}
        return [found for inner in inside.values() for found in types(inside, inner)]

    def visit(name: str, times: int) -> None:
        for one in every[name].values():
            if one.op == "while":
                visit(one.attribute("body"), times * trips(every, every[name], one))
            elif one.op in ("call", "async-start"):
                visit(one.attribute("to_apply") or one.attribute("calls"), times)
            elif one.attribute("custom_call_target") == "tpu_custom_call" or re.match(r"(all-|reduce-scatter|collective-)(?!.*done)", one.op):
                unpriced[one.op] += times
            elif (priced := one.attribute("estimated_cycles")).isdigit() and int(priced) < 2**62:  # beyond: unknown
                phase = "backward" if "transpose(" in one.text else "forward" if "jvp(" in one.text else "rest"
                cycles[phase] += times * int(priced)
                for kinds in types(every[name], one)[:1]:
                    products[kinds] += times * int(priced)

    visit(entry, 1)
    return {"cycles": dict(cycles), "products": dict(products), "unpriced": dict(unpriced)}


def compiled_step(topology: str, n_devices: int | None, batch_size: int, changes: dict[str, Any], options: dict[str, str]) -> Any:
    """The compiled train step of GPT-2 124M with `changes`, its state sharded over (the first `n_devices` of) a TPU topology."""
    import jax
    from jax.experimental import topologies

    from mlm_jax import sharding
    from mlm_jax.config import Config, MeshConfig, ModelConfig, override
    from mlm_jax.model import gpt2
    from mlm_jax.train import lower_step

    model = ModelConfig(vocab_size=50_257, vocab_multiple=128, compute_dtype="bfloat16", remat="full", attention="reference")
    config = override(Config(name="plan", model=model), changes)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:n_devices]
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    with jax.set_mesh(mesh):
        return lower_step(config, gpt2.GPT2(config.model), mesh, batch_size * mesh.size).compile(compiler_options=options or None)


def main() -> None:
    os.environ.update(THERE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("--devices", type=int, help="the first so many of the topology (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="windows for each device")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the compiler")
    args = parser.parse_args()
    from mlm_jax.config import parse_set

    step = compiled_step(args.topology, args.devices, args.batch, parse_set(args.set), dict(pair.split("=") for pair in args.option))
    print(json.dumps(plan(step.as_text()) | {"temporary_bytes": step.memory_analysis().temp_size_in_bytes}))


if __name__ == "__main__":
    main()
