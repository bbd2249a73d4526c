"""Weights in 8 bits for evaluation and decoding: a quarter of the memory of float32, and of what a decoded token has to read.

Weights are rounded, one scale for each output channel; activations are not. In bfloat16, which holds 8-bit integers exactly, a product
reads the integers as they are. In float32 each activation is written with two digits to the base 128, so that products are those of the
rounded weights to 14 bits and run on the integer units of the machine.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlm_jax import sharding
from mlm_jax.model import low_precision

LARGEST = 127
BASE = 128  # of the digits of an activation: the higher in -127..127, the lower in -64..63

# The axes that a weight's product sums over; the others are output channels. Weights with other names stay as they are.
SUMMED = {
    "w_token_VD": "D",
    "w_head_VD": "D",
    "w_q_DNH": "D",
    "w_k_DKH": "D",
    "w_v_DKH": "D",
    "w_out_NHD": "NH",
    "w_up_DF": "D",
    "w_gate_DF": "D",
    "w_down_FD": "F",
}


@struct.dataclass
class Int8:
    """A weight as `values * scale`; the scale has length 1 along the axes that a product sums over."""

    values: Any  # int8
    scale: Any  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The weight as an ordinary array."""
        return (self.values * self.scale).astype(dtype)

    def __getitem__(self, rows: Array) -> Float[Array, "..."]:
        """Rows of an embedding, float32."""
        return self.values[rows] * self.scale[rows]


def quantize(w: Float[Array, "..."], axes: tuple[int, ...]) -> Int8:
    """The nearest Int8 to `w`, with one scale for each channel, its largest entry over 127; a product sums over `axes`.

    Source: Wu et al. 2020, Integer Quantization for Deep Learning Inference, section 3 (symmetric, per channel, max calibration).
    """
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(axes, keepdims=True) / LARGEST
    return Int8(jnp.round(w / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)


def int8(params: Any) -> Any:
    """The parameters with the weights of embedding, head, projections and MLP in 8 bits; norms, biases and positions stay float32.

    For whatever takes the parameters of a GPT2: `model.apply`, `mlm_jax.generate`. They have no gradient.
    """

    def of(path: tuple, leaf: Array) -> Array | Int8:
        name = path[-1].key
        if name not in SUMMED:
            return leaf
        letters = name.rsplit("_", 1)[-1]
        return quantize(leaf, tuple(letters.index(letter) - len(letters) for letter in SUMMED[name]))  # from the right: L may lead

    return jax.jit(lambda params: jax.tree_util.tree_map_with_path(of, params))(params)


def einsum(
    letters: str, x: Float[Array, "..."], w: Array | Int8 | sharding.Gathered, *, dtype: Any = None, matmul: str = "full"
) -> Float[Array, "..."]:
    """`jnp.einsum` of activations and a weight, computed in the dtype of `x` and returned in it, or in `dtype`.

    `matmul` is that of the configuration: how a weight that is no Int8 yet is multiplied.

    Raises:
      InputError: `matmul` needs a library that is not installed.
    """
    (left, right), out = letters.split("->")[0].split(","), letters.split("->")[1]
    if not isinstance(w, Int8):
        if "H" in right:
            return _of_heads(letters, x, w, dtype=dtype, matmul=matmul)
        if not isinstance(w, sharding.Gathered):
            if matmul != "full":
                return low_precision.einsum(letters, x, w, matmul)
            w = w.astype(x.dtype)
            w = sharding.gather(w, right) if sharding.gathers(x.shape[0]) else w
        if isinstance(w, sharding.Gathered):
            x_Z = x.reshape(len(w.w_Z), -1, *x.shape[1:])
            y_Z = jnp.einsum(f"Z{left},Z{right}->Z{out}", x_Z, w.w_Z.astype(x.dtype), preferred_element_type=dtype)
            return checkpoint_name(y_Z.reshape(-1, *y_Z.shape[2:]), "product")
        if not (out.startswith("BT") and jax.sharding.get_abstract_mesh().size == 1):
            return checkpoint_name(jnp.einsum(letters, x, w, preferred_element_type=dtype), "product")
        # Nothing splits B or T, so they can be one axis, Z. Over two a gradient's sum has XLA transpose copies of its operands on a CPU.
        t = left.index("T")
        x, left = jnp.moveaxis(x, t, 1), left.replace("T", "")[1:]
        y = jnp.einsum(f"Z{left},{right}->Z{out[2:]}", x.reshape(-1, *x.shape[2:]), w, preferred_element_type=dtype)
        return checkpoint_name(y.reshape(*x.shape[:2], *y.shape[1:]), "product")
    x_summed = tuple(left.index(letter) for letter in left if letter in right)
    w_summed = tuple(right.index(letter) for letter in right if letter in left)
    scale = w.scale.squeeze(w_summed)
    if x.dtype == jnp.bfloat16:
        return (jnp.einsum(letters, x, w.values.astype(x.dtype), preferred_element_type=jnp.float32) * scale).astype(dtype or x.dtype)
    x_dtype, x = x.dtype, x.astype(jnp.float32)
    largest = jnp.abs(x).max(x_summed, keepdims=True)
    unit = jnp.where(largest == 0, 1, largest) / (LARGEST * BASE)
    whole = jnp.round(x / unit)
    high = jnp.round(whole / BASE)
    digits = jnp.stack([high, whole - BASE * high]).astype(jnp.int8)
    # An int32 holds the sum of 131,072 products. Both digits are rows of one product: a single row takes XLA's slow path on a CPU.
    sums = jnp.einsum(f"Z{left},{right}->Z{out}", digits, w.values, preferred_element_type=jnp.int32).astype(jnp.float32)
    unit = unit.squeeze(x_summed)
    return ((BASE * sums[0] + sums[1]) * jnp.expand_dims(unit, range(unit.ndim, unit.ndim + scale.ndim)) * scale).astype(dtype or x_dtype)


def _of_heads(letters: str, x: Float[Array, "..."], w: Any, **how: Any) -> Float[Array, "..."]:
    """`einsum` to heads or from them, all heads as one axis: a product with one of 64 alone fills half of the width of a TPU's matrix unit."""
    if letters.endswith("H"):
        y = einsum(letters.replace("H", ""), x, w.reshape(w.shape[0], -1), **how)
        return y.reshape(*y.shape[:-1], *w.shape[1:])
    x = x.swapaxes(1, 2)  # BNTH to BTNH
    return einsum(letters.replace("BNTH", "BTN").replace("H", ""), x.reshape(*x.shape[:2], -1), w.reshape(-1, w.shape[-1]), **how)
