"""Products with weights in plain XLA, laid out so that no backend copies a weight for them."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.grouped_matmul.stored import Stack
from pallas_kernels.grouped_matmul.stream import LANES, stream_product
from pallas_kernels.precision import product_precision

STREAMED_TERMS = 8
"""Of a bfloat16 product with one row on a CPU. 32 take twice as long to compile, for little speed if any."""


def matmul_xla(
    x: Float[Array, "*tokens I"], weight: Float[Array, "*out I"], precision: jax.lax.Precision
) -> Float32[Array, "..."]:
    """x weight^T over the last axis of both, f32[*tokens, *out]: float32 sums, no rounding at the end.

    `preferred_element_type` is stated because a bf16 x bf16 -> bf16 dot runs at float32 speed on CPUs.

    Args:
        x: [*tokens, I] bfloat16 or float32.
        weight: [*out, I]; converted to the dtype of `x`.
        precision: of the products (`precision.product_precision`).
    """
    # One row axis, one column axis, one summed axis, the last of both: a product with more of any kind is
    # rewritten by XLA:CPU with a transposed copy of the weight, at every call.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    columns = weight.reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
    dot = functools.partial(_dot, precision=precision)
    if len(rows) == 1 and columns.dtype == jnp.bfloat16 and columns.shape[1] % LANES == 0:
        y = jax.lax.platform_dependent(rows, columns, cpu=_streamed, default=dot)
    else:
        y = dot(rows, columns)
    return y.reshape(*x.shape[:-1], *weight.shape[:-1])


def grouped_matmul_xla(
    x: Float[Array, "*tokens G I"], weight: Float[Array, "G O I"]
) -> Float[Array, "*tokens G O"]:
    """Each group's channels times that group's matrix: float32 sums, rounded once to the dtype of `x`.

    Args:
        x: [*tokens, G, I] bfloat16 or float32.
        weight: [G, O, I] in the dtype of `x`.
    """
    rows = x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)  # [G, tokens, I]
    y = jax.lax.dot_general(
        rows,
        weight,
        (((2,), (2,)), ((0,), (0,))),
        precision=product_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y.swapaxes(0, 1).astype(x.dtype).reshape(*x.shape[:-1], -1)


def _dot(rows, columns, precision):
    return jax.lax.dot_general(
        rows,
        columns.astype(rows.dtype),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _streamed(rows, columns):
    """One row on a CPU: its bfloat16 products take longer than float32 ones, a loop over the bytes less."""
    row = rows[0].astype(jnp.float32)
    return stream_product(Stack(columns[None]), jnp.int32(0), row, STREAMED_TERMS)[None]
