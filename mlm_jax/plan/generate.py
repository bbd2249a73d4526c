"""The plan of generating text on TPUs that are not there: the prefill and the decoding loop of `mlm_jax.generate`, compiled for them and read.

As many rows as `sample.num`, each with a prompt of its own that with `sample.max_tokens` more fills the context: no text takes more. The weights
are laid out over the mesh as a run has them when it writes its samples.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlm_jax import sharding
from mlm_jax.config import Config, InputError
from mlm_jax.decode import loop
from mlm_jax.decode.sampling import Seen
from mlm_jax.model import gpt2
from mlm_jax.plan import hlo, tpu
from mlm_jax.plan.describe import exchanges, gib, mega, table
from mlm_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one of the two programs needs on one device, and how long it takes."""

    name: str  # prefill or decode
    rows: int
    positions: int  # of each row that go through the model: all of a prompt, or one for each token but the first
    parameters: int  # bytes, a dict for each block, which is quicker to decode with
    loaded: int  # bytes of the blocks stacked, as they are loaded: who generates holds both
    cache: int  # bytes of keys and values, those of the prompts included
    rest: int  # bytes of all else
    usable: int  # bytes that the compiler has
    cycles: dict[str, int]  # by part
    exchanged: list[tpu.Exchanged]
    compute_s: float | None  # None: the clock of the chip is not known
    flops_s: float  # 2 FLOPs for each parameter and token, at the peak of the devices
    read_s: float  # what reading weights and cache takes, once for a prefill, once for each token of a decode: weights in the type of products

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.loaded + self.cache + self.rest

    @property
    def communication_s(self) -> float:
        """All exchanges, one after the other."""
        return sum(one.seconds for one in self.exchanged)

    @property
    def seconds(self) -> float:
        """The estimate: the work, or reading, whichever takes longer, and then the exchanges."""
        return max(self.compute_s or self.flops_s, self.read_s) + self.communication_s

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together: tokens of prompts that are read, or tokens that are written."""
        return self.rows * self.positions / self.seconds

    def to_json(self) -> dict[str, Any]:
        """All of it, as one JSON object."""
        found = dataclasses.asdict(self) | {"exchanged": [one._asdict() for one in self.exchanged]}
        return found | {name: getattr(self, name) for name in ("total", "communication_s", "seconds", "tokens_per_s")}


def check(config: Config) -> None:
    """Raises InputError where what `config.sample` asks for is not planned: beams, more tokens than the model can embed, or nothing to decode."""
    c, limit = config.sample, config.model.context_len
    if not 2 <= c.max_tokens < limit:
        reason = f"leaves {'no room for a prompt in' if c.max_tokens > 1 else 'nothing to decode after the prefill, of'} model.context_len = {limit}"
        raise InputError("sample.max_tokens", c.max_tokens, reason, f"Set it to 2 to {limit - 1}")
    if c.beams > 1:
        raise InputError("sample.beams", c.beams, "beam search is not planned", "Leave it at 1")


def plan(config: Config, build: tpu.Build, topology: Topology) -> list[Stage]:
    """The plans of the prefill and of the decoding loop; a minute or two for GPT-2, whose blocks are compiled one by one.

    Raises:
      InputError: as `check`; a mesh that does not fit the topology; libtpu is not installed.
      DoesNotFit: it needs more memory than a device has.
    """
    check(config)
    config = tpu.with_slices(tpu.with_vocabulary(config), topology)
    c, limit = config.sample, config.model.context_len
    B, T = c.num, limit - c.max_tokens
    mesh, model = sharding.make_mesh(config.mesh, topology.devices()), build(config.model).clone(stacked=False)
    with jax.sharding.set_mesh(mesh):
        stacked = _placed(jax.eval_shape(lambda: gpt2.init(build(config.model), jax.random.key(0))), mesh)
        params = _placed(jax.eval_shape(gpt2.unstack, stacked), mesh)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def whole(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

        prompt_BT, padding_B = whole((jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)))
        held, loaded, n_params = tpu.held(params), tpu.held(stacked["blocks"]), gpt2.n_params(params)
        first = tpu.compiled_for(topology, loop.prefill.lower(model, params, prompt_BT, padding_B, cache_len=limit), held + loaded)
        logits_BV, cache = _as_made(first, jax.eval_shape(lambda *a: loop.prefill(model, *a, cache_len=limit), params, prompt_BT, padding_B))
        how: dict[str, Any] = {"sampling": c.sampling, "eot_id": config.model.vocab_size - 1}
        state = whole(jax.eval_shape(lambda: _new(c, B, T, config.model.padded_vocab_size)))
        begun = loop.begin.lower(state, logits_BV, **how)
        state = _as_made(begun.compile(), begun.out_info)
        one = whole(jax.ShapeDtypeStruct((), jnp.int32))
        then = tpu.compiled_for(
            topology, loop.advance.lower(model, params, cache, state, one, padding_B, one, **how), held + loaded + tpu.held(cache)
        )
    sizes = {"parameters": held, "loaded": loaded, "cache": tpu.held(cache), "usable": int(topology.chip.usable_bytes)}
    weights = held * jnp.dtype(config.model.compute_dtype).itemsize // 4  # the decoding loop keeps a copy of them in that type
    rounds = c.max_tokens - 1  # of the loop: the prefill gives the first token
    return [
        _stage("prefill", hlo.Program(first.as_text()), first.memory_analysis(), mesh, topology, (B, T), n_params, sizes, weights),
        _stage(
            "decode",
            hlo.Program(then.as_text(), uncounted=rounds),
            then.memory_analysis(),
            mesh,
            topology,
            (B, rounds),
            n_params,
            sizes,
            rounds * (weights + sizes["cache"]),
        ),
    ]


def _new(c: Any, B: int, T: int, V: int) -> loop.State:
    """A state of `B` rows before their first token, as loop.Decoding begins with it."""
    room = loop.bucket(c.max_tokens)
    seen = Seen.start(c.sampling, jnp.zeros((B, T), jnp.int32), jnp.zeros(B, jnp.int32), V)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(c.seed), jnp.arange(B))
    return loop.State(jnp.int32(0), jnp.zeros((B, room), jnp.int32), jnp.zeros((B, room), jnp.float32), jnp.zeros(B, bool), seen, keys_B)


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with the shardings that the names of parameters say."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding.shardings(mesh, tree))


def _as_made(compiled: Any, tree: Any) -> Any:
    """Shapes with the shardings in which a compiled program gives them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, compiled.output_shardings)


def _stage(
    name: str,
    program: hlo.Program,
    stats: Any,
    mesh: jax.sharding.Mesh,
    topology: Topology,
    shape: tuple[int, int],
    n_params: int,
    sizes: dict[str, int],
    read: int,
) -> Stage:
    """What a compiled program says, which takes `shape` rows and positions through the model and has to read `read` bytes."""
    chip = topology.chip
    cycles: collections.Counter[str] = collections.Counter()
    for (_, part), n in program.cycles().items():
        cycles[part] += n
    needed = sizes["loaded"] + stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    if needed > sizes["usable"]:
        raise tpu.DoesNotFit(needed, sizes["usable"], [f"{array} {path} {line}" for _, array, path, line in program.arrays()])
    return Stage(
        name=name,
        rows=shape[0],
        positions=shape[1],
        rest=max(needed - sizes["parameters"] - sizes["loaded"] - sizes["cache"], 0),
        cycles=dict(cycles.most_common()),
        exchanged=[one._replace(phase=name) for one in tpu.exchanged(program, mesh, topology)],  # there is no way back
        compute_s=sum(cycles.values()) / chip.clock_hz if chip.clock_hz else None,
        flops_s=2 * n_params * shape[0] * shape[1] / (chip.peak_flops * mesh.size),
        read_s=read / chip.hbm_bytes_per_s,
        **sizes,
    )


def describe(stages: Sequence[Stage], topology: Topology) -> str:
    """The page, of the prefill and of one token of all rows."""
    first, then = stages
    n = then.positions
    parts = list(dict.fromkeys([*then.cycles, *first.cycles]))
    cycles = [(part, mega(first.cycles.get(part, 0)), mega(then.cycles.get(part, 0) / n)) for part in parts]
    cycles.append(("all", mega(sum(first.cycles.values())), mega(sum(then.cycles.values()) / n)))
    times = [
        ("planned cycles", [one.compute_s for one in stages]),
        ("FLOPs at peak", [one.flops_s for one in stages]),
        ("reading weights, and keys and values, once", [one.read_s for one in stages]),
        ("exchanges, by bytes over links", [one.communication_s for one in stages]),
        ("estimate: the longest of these but exchanges, and then these", [one.seconds for one in stages]),
    ]
    lines = [
        f"Generating on {topology.name}: {first.rows} rows (sample.num), prompts of {first.positions} tokens and {n + 1} more (sample.max_tokens)",
        "",
        *table(
            ("GiB a device", "prefill", "decode"),
            [
                ("parameters", *(gib(one.parameters) for one in stages)),
                ("blocks stacked, as they were loaded", *(gib(one.loaded) for one in stages)),
                ("keys and values", *(gib(one.cache) for one in stages)),
                ("all else", *(gib(one.rest) for one in stages)),
                (f"all, of {gib(first.usable)}", *(gib(one.total) for one in stages)),
            ],
        ),
        "",
        *table(("planned cycles, in millions", "prefill", "a token"), cycles),
        "",
        *table(
            ("ms", "prefill", "a token"),
            [(name, *(f"{s / k * 1e3:.2f}" if s else "" for s, k in zip(of, (1, n), strict=True))) for name, of in times],
        ),
        f"{first.tokens_per_s:,.0f} tokens/s of prompts, {then.tokens_per_s:,.0f} tokens/s written by all rows together",
        "",
        *exchanges("in the prefill", first.exchanged),
        "",
        *exchanges(f"in {n} rounds of the decoding loop", then.exchanged),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"
