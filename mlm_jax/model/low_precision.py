"""Products with weights in 8 bits while training, through qwix: forward and backward, on units that do twice the work of bfloat16's.

Rounding has its cost, and at GPT-2's width the step is planned to become slower: README.md has the cycles.

Each operand is rounded as it is, at every step: divided by the largest entry along what a product sums over (one scale for each token, one
for each output channel), then to the nearest int8, or to the nearest float8. The products of the blocks are so; the scores of attention, the
embedding and the head are not, as in MaxText, whose rules for qwix name the layers of the decoder and `dot_general`, which its scores do not use.

Source: AI-Hypercomputer/maxtext, src/MaxText/layers/quantizations.py, get_quantization_rule and get_fp8_full_qwix_rule.
"""

import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlm_jax.config import InputError
from mlm_jax.sharding import constrain

# What is rounded on the way forward and what on the way back: gradients need range more than digits (Micikevicius et al. 2022, section 3.1).
DTYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
SUMMANDS = 2**17  # an int32 holds the sum of so many products of int8


def library(matmul: str) -> types.ModuleType:
    """The module qwix.

    Raises:
      InputError: it is not installed.
    """
    try:
        import qwix
    except ModuleNotFoundError as e:
        remedy = 'Install it with pip install -e ".[low-precision]", or set model.matmul = full'
        raise InputError("model.matmul", matmul, f"{e.name} is not installed", remedy) from e
    return qwix


def rounded(matmul: str, x: Array, letters: str, summed: str, dtype: Any) -> Any:
    """A qwix.QArray, qvalue * scale: `x` rounded to `dtype`; the scale, float32, has length 1 along the axes `summed`."""
    channels = [axis for axis, letter in enumerate(letters) if letter not in summed]
    return library(matmul).quantize(x.astype(jnp.float32), dtype, channelwise_axes=channels)  # in bfloat16 the quotient would be rounded twice


def einsum(letters: str, x: Float[Array, "..."], w: Float[Array, "..."], matmul: str) -> Float[Array, "..."]:
    """`jnp.einsum` of activations and a weight, both rounded as `matmul` says, in the dtype of `x`; so are its gradients.

    With r the rounding, y = r(x) r(w), dx = r(dy s_w) r(w) / s_w and dw = r(x) / s_x r(s_x dy): a rounding passes its gradient on as it is
    (Bengio et al. 2013), and a scale that lies along the axes that a gradient sums over is multiplied into dy first, so that r(x) and r(w)
    serve again. The largest entry is that of the whole array, on however many devices: a mesh changes nothing but the order of sums.

    Raises:
      InputError: qwix is not installed.
    """
    return checkpoint_name(_einsum(letters, matmul, x, w.astype(jnp.float32)), "product")  # what `remat` = dots keeps


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(letters: str, matmul: str, x: Array, w: Array) -> Array:
    return _forward(letters, matmul, x, w)[0]


def _forward(letters: str, matmul: str, x: Array, w: Array) -> tuple[Array, tuple[Any, Any]]:
    left, right, _ = letters.replace("->", ",").split(",")
    dtype, summed = DTYPES[matmul][0], "".join(letter for letter in left if letter in right)
    r_x, r_w = rounded(matmul, x, left, summed, dtype), rounded(matmul, w, right, summed, dtype)
    r_w = r_w.replace(qvalue=constrain(r_w.qvalue, right))  # rounded where it lies, so that 8 bits are gathered
    return library(matmul).einsum(letters, r_x, r_w).astype(x.dtype), (r_x, r_w)


def _backward(letters: str, matmul: str, kept: tuple[Any, Any], dy: Array) -> tuple[Array, Array]:
    left, right, out = letters.replace("->", ",").split(",")
    (r_x, r_w), einsum, dtype = kept, library(matmul).einsum, DTYPES[matmul][1]
    s_x, s_w = (r.scale.squeeze([axis for axis, letter in enumerate(name) if letter not in out]) for r, name in ((r_x, left), (r_w, right)))
    rows = out[: s_x.ndim]  # of tokens; the rest are output channels
    to_x, to_w = dy.astype(jnp.float32) * s_w, dy.astype(jnp.float32) * jnp.expand_dims(s_x, range(s_x.ndim, dy.ndim))
    dx = einsum(f"{out},{right}->{left}", rounded(matmul, to_x, out, out[s_x.ndim :], dtype), r_w.qvalue)

    # More rows than an int32 can sum are summed in parts (Z).
    n_rows = math.prod(s_x.shape)
    parts = next(n for n in range(1, n_rows + 1) if s_x.shape[0] % n == 0 and (n_rows <= n * SUMMANDS or n == s_x.shape[0]))
    x_Z, to_w_Z = (a.reshape(parts, -1, *a.shape[1:]) for a in (r_x.qvalue, to_w))
    dw_Z = einsum(f"Z{left},Z{out}->Z{right}", x_Z, rounded(matmul, to_w_Z, f"Z{out}", rows, dtype))
    return dx.astype(dy.dtype), dw_Z.sum(0)


_einsum.defvjp(_forward, _backward)
