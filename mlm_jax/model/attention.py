"""Attention: the reference that every faster kernel must equal, and the one function that chooses between them."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mlm_jax.config import InputError
from mlm_jax.sharding import constrain, mesh_axes, spec

LANES = 128  # width of a TPU's vector unit: its kernels work on blocks of a multiple of it
MAX_BLOCK = 1024  # the splash kernel at this size leaves least to do around it, of 128 to 1024
QUERIES = 256  # in a block of `blocked`: of 1,024 positions it then computes 10 sixteenths of the square, in products that are still large
_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


@struct.dataclass
class Visibility:
    """Which keys each query may see: those of its own segment and, where causal, none that come after it."""

    causal: bool = struct.field(pytree_node=False, default=True)
    start: Int[Array, ""] | None = None  # where the first query stands among the keys; None: queries and keys are the same positions
    q_segments_BT: Int[Array, "B T"] | None = None
    k_segments_BS: Int[Array, "B S"] | None = None

    @property
    def segments(self) -> tuple[Int[Array, "B T"], Int[Array, "B S"]] | None:
        """The segments of the queries and of the keys; None: all is one segment."""
        return None if self.q_segments_BT is None or self.k_segments_BS is None else (self.q_segments_BT, self.k_segments_BS)

    def mask(self, T: int, S: int) -> Bool[Array, "_ T S"] | None:
        """True where a query sees a key; the first axis is 1 where all rows of the batch are alike. None: every query sees every key."""
        parts = []
        if self.causal:
            t_T = jnp.arange(T) + (0 if self.start is None else self.start)
            parts.append((jnp.arange(S)[None, :] <= t_T[:, None])[None])
        if self.segments is not None:
            q_segments_BT, k_segments_BS = self.segments
            parts.append(q_segments_BT[:, :, None] == k_segments_BS[:, None, :])
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


def attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    *,
    implementation: str = "auto",
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax attention: each query's mean of the values it sees, weighted by exp(scale q k); scale is 1 / sqrt(H) unless given.

    N / K neighbouring query heads share a key and value head. `dropout` zeroes that share of the probabilities where a key is given.

    `implementation` is reference; blocked, which leaves out keys that no query of a block sees; xla or cudnn, JAX's own; splash or flash,
    Pallas kernels for TPUs; or auto, the fastest that can do the call. A call that continues a cache is no work for a kernel: it goes to the
    reference, whichever of them is named.

    Raises:
      InputError: the implementation cannot do the call.
    """
    scale = float(q_BNTH.shape[-1] ** -0.5 if scale is None else scale)
    dropped = dropout_key is not None and dropout > 0
    if visibility.start is not None and implementation != "xla":
        implementation = "reference"
    elif implementation == "auto":
        names = ("splash", "cudnn", "reference" if hardware()[0] == "gpu" else "blocked", "reference")
        implementation = next(name for name in names if not obstacle(name, q_BNTH, k_BKSH, visibility, dropped))
    if refusal := obstacle(implementation, q_BNTH, k_BKSH, visibility, dropped):
        raise InputError("model.attention", implementation, *refusal)
    if positions_split():
        q_BNTH, k_BKSH, v_BKSH, visibility = gather_keys(q_BNTH, k_BKSH, v_BKSH, visibility)
    if implementation in ("xla", "cudnn"):
        return from_jax(q_BNTH, k_BKSH, v_BKSH, visibility, scale=scale, implementation=implementation)
    if implementation in ("splash", "flash"):
        return on_each_device(splash if implementation == "splash" else flash, q_BNTH, k_BKSH, v_BKSH, visibility, scale=scale)
    if implementation == "blocked":
        return blocked(q_BNTH, k_BKSH, v_BKSH, visibility, scale=scale)
    return reference(q_BNTH, k_BKSH, v_BKSH, visibility, scale=scale, dropout=dropout, dropout_key=dropout_key)


def obstacle(implementation: str, q_BNTH: Array, k_BKSH: Array, visibility: Visibility, dropped: bool) -> tuple[str, str] | None:
    """Why `implementation` cannot do the call, and what to do about it; None where it can."""
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    if implementation == "reference":
        return None
    if dropped:
        return "it drops no attention probabilities", "Set model.dropout = 0, or model.attention = auto"
    if implementation == "xla":
        return None
    auto = "model.attention = auto"
    platform, capability = hardware()
    if implementation != "blocked" and platform != ("gpu" if implementation == "cudnn" else "tpu"):
        return f"it runs on {'an NVIDIA GPU' if implementation == 'cudnn' else 'a TPU'}, this is a {platform.upper()}", f"Set {auto}"
    if T != S:
        return f"it compares positions with themselves, here are {T} queries and {S} keys", f"Set {auto}"
    if (parts := positions_split()) > 1:
        return f"it needs all positions on one device, the mesh splits them in {parts}", f"Set mesh.context = 1, or {auto}"
    if implementation == "blocked":
        return None
    if implementation == "cudnn":
        widest = 256 if capability >= 9 else 128
        if capability < 8:
            return f"it needs an NVIDIA GPU of compute capability 8.0, here is {capability}", f"Set {auto}"
        if q_BNTH.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it computes in 16 bits, not in {q_BNTH.dtype}", f"Set model.compute_dtype = bfloat16, or {auto}"
        if H % 8 or widest < H:
            return f"a head must be a multiple of 8 and at most {widest} wide, it is {H}", f"Change model.n_heads, or set {auto}"
        if visibility.segments is not None:
            # JAX makes a mask a bias, and cuDNN has the gradient of a bias for one row and all heads only.
            return "it takes no segments", f"Set {auto}"
        return None
    if T % LANES:
        return f"{T} positions are not a multiple of {LANES}", f"Change the length, or set {auto}"
    if H > LANES and H % LANES:
        return f"a head wider than {LANES} must be a multiple of it, it is {H}", f"Change model.n_heads, or set {auto}"
    mesh = mesh_in_use()
    for letter, size in {"B": B, "N": N, "K": K}.items():
        parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in mesh_axes(letter)[0])
        if size % parts:
            return f"{parts} parts of the mesh do not divide {letter} = {size}", f"Change the mesh, or set {auto}"
    return None


def hardware() -> tuple[str, float]:
    """The platform the call is for, "tpu", "gpu" or "cpu", and the compute capability of an NVIDIA GPU, 0 for all else.

    The devices of the mesh in use decide, so that compiling for a machine that is not there finds its kernels; without a mesh, those at hand.
    """
    if _INTERPRETED.get():
        return "tpu", 0.0
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # an AMD GPU's is a name
    return getattr(device, "platform", device), float(capability) if capability[:1].isdigit() else 0.0


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it the TPU kernels run on every machine, as the array operations that they stand for; for tests."""
    from jax.experimental.pallas import tpu as pltpu

    token = _INTERPRETED.set(True)
    try:
        # True is Pallas's plain interpreter. InterpretParams would simulate a TPU's memory too, and fails on splash under vmap.
        with pltpu.force_tpu_interpret_mode(True):  # pyright: ignore[reportArgumentType]
            yield
    finally:
        _INTERPRETED.reset(token)


def mesh_in_use() -> jax.sharding.AbstractMesh | None:
    """The mesh over which arrays are split; None without one, and within a shard_map, where each device sees its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def positions_split() -> int:
    """How many parts the mesh in use makes of the positions; 0 where it leaves them whole."""
    mesh = mesh_in_use()
    return 0 if mesh is None or mesh.shape.get("context", 1) == 1 else mesh.shape["context"]


def gather_keys(
    q_BNTH: Float[Array, "B N T H"], k_BKSH: Float[Array, "B K S H"], v_BKSH: Float[Array, "B K S H"], visibility: Visibility
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"], Visibility]:
    """The same, laid out for context parallelism: each device has its part of the queries, and gathers the keys and values of all positions.

    Scores are then split as the queries are. The mask counts positions from the start of the text, whichever part a device has. All
    scores are computed, also those that the mask hides, so that every part is the same work.

    Source: Dubey et al. 2024, section 3.3.2.
    """
    if visibility.start is None:  # so that it is they, not what they are computed from, that are gathered
        k_BKSH, v_BKSH = constrain(k_BKSH, "BKT."), constrain(v_BKSH, "BKT.")
    if visibility.segments is not None:
        q_segments_BT, k_segments_BS = visibility.segments
        visibility = dataclasses.replace(visibility, q_segments_BT=constrain(q_segments_BT, "BT"), k_segments_BS=constrain(k_segments_BS, "BS"))
    return constrain(q_BNTH, "BNT."), constrain(k_BKSH, "BKS."), constrain(v_BKSH, "BKS."), visibility


def on_each_device(
    kernel: Callable[..., Array],
    q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    *,
    scale: float,
) -> Float[Array, "B N T H"]:
    """`kernel` on the rows and heads of each device of the mesh in use: the compiler does not split a Pallas kernel by itself."""
    kernel = functools.partial(kernel, scale=scale)
    if mesh_in_use() is not None:
        heads = spec("BN.."), spec("BK.."), spec("BK..")
        kernel = jax.shard_map(kernel, in_specs=(*heads, spec("B.")), out_specs=spec("BN.."), check_vma=False)
    return kernel(q_BNTH, k_BKSH, v_BKSH, visibility)


def block_size(T: int) -> int:
    """Positions in a block: the largest multiple of 128 that divides `T` and is at most MAX_BLOCK."""
    return max(block for block in range(LANES, MAX_BLOCK + 1, LANES) if T % block == 0)


def from_jax(
    q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    *,
    scale: float,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B N T H"]:
    """`attention` by `jax.nn.dot_product_attention`, which has a causal triangle of its own; what else is invisible goes in as a mask."""
    triangle = visibility.causal and visibility.start is None
    mask_BTS = dataclasses.replace(visibility, causal=visibility.causal and not triangle).mask(q_BNTH.shape[2], k_BKSH.shape[2])
    q_BTNH, k_BSKH, v_BSKH = (x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
    mask = None if mask_BTS is None else mask_BTS[:, None]
    mixed_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, is_causal=triangle, implementation=implementation)
    return mixed_BTNH.swapaxes(1, 2)


def splash(
    q_BNTH: Float[Array, "B N T H"], k_BKSH: Float[Array, "B K T H"], v_BKSH: Float[Array, "B K T H"], visibility: Visibility, *, scale: float
) -> Float[Array, "B N T H"]:
    """`attention` by the splash kernel of Pallas, for TPUs; it reads each key head for all its query heads, without a copy."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    N, T = q_BNTH.shape[1:3]
    block = block_size(T)
    # The fused backward pass computes the scores once instead of twice, but writes the queries' gradient once per block of keys.
    dq_block = None if block == T else block
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=dq_block,
        block_kv_dq=dq_block,
        use_fused_bwd_kernel=dq_block is None,
    )
    mask = (masks.CausalMask if visibility.causal else masks.FullMask)((T, T))
    kernel: Any = kernels.make_splash_mha(mask=masks.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1)
    segments = None if visibility.segments is None else kernels.SegmentIds(*visibility.segments)
    return jax.vmap(kernel)(q_BNTH * scale, k_BKSH, v_BKSH, segments)


def flash(
    q_BNTH: Float[Array, "B N T H"], k_BKSH: Float[Array, "B K T H"], v_BKSH: Float[Array, "B K T H"], visibility: Visibility, *, scale: float
) -> Float[Array, "B N T H"]:
    """`attention` by the flash kernel of Pallas, for TPUs: the elder one, which needs a copy of the keys for each query head."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels

    N, T = q_BNTH.shape[1:3]
    k_BNTH, v_BNTH = (jnp.repeat(x_BKTH, N // x_BKTH.shape[1], axis=1) for x_BKTH in (k_BKSH, v_BKSH))
    names = [field.name for field in dataclasses.fields(kernels.BlockSizes) if field.name != "block_b"]
    sizes = kernels.BlockSizes(block_b=1, **dict.fromkeys(names, block_size(T)))
    segments = None if visibility.segments is None else kernels.SegmentIds(*visibility.segments)
    return kernels.flash_attention(q_BNTH, k_BNTH, v_BNTH, segment_ids=segments, causal=visibility.causal, sm_scale=scale, block_sizes=sizes)


def reference(
    q_BNTH: Float[Array, "B N T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B N T H"]:
    """`attention`, written out: scores and softmax in float32, the normaliser per query row over visible keys only.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (shared key and value heads).
    """
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    # Heads come before positions, so that on a CPU the products need no transposed copy of a long cache.
    q_BKGTH = (q_BNTH * scale).reshape(B, K, N // K, T, H)
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    mask_BTS = visibility.mask(T, S)
    if mask_BTS is not None:
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if dropout_key is not None and dropout > 0:
        keep_BKGTS = jax.random.bernoulli(dropout_key, 1 - dropout, probs_BKGTS.shape)
        probs_BKGTS = jnp.where(keep_BKGTS, probs_BKGTS / (1 - dropout), 0)
    return jnp.einsum("BKGTS,BKSH->BKGTH", probs_BKGTS.astype(v_BKSH.dtype), v_BKSH).reshape(B, N, T, H)


def blocked(
    q_BNTH: Float[Array, "B N T H"], k_BKSH: Float[Array, "B K T H"], v_BKSH: Float[Array, "B K T H"], visibility: Visibility, *, scale: float
) -> Float[Array, "B N T H"]:
    """`attention` by the reference, one block of queries after the other, where causal each with the keys up to its last query alone."""
    T, mixed = q_BNTH.shape[2], []
    for first in range(0, T, QUERIES):
        queries = slice(first, first + QUERIES)
        keys = slice(first + QUERIES if visibility.causal else T)
        segments = visibility.segments and (visibility.segments[0][:, queries], visibility.segments[1][:, keys])
        seen = Visibility(visibility.causal, jnp.int32(first), *(segments or ()))
        mixed.append(reference(q_BNTH[:, :, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys], seen, scale=scale))
    return jnp.concatenate(mixed, axis=2)
