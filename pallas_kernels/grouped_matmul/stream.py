"""A row times one matrix of a stack, read where it lies: the decode path.

XLA:CPU cannot feed a dynamic slice to a matmul without copying the slice first, and for one row that copy
costs as much as the product. An elementwise loop reads the slice in place. Here the product is such a
loop, LANES columns at a time,

    partial[n, j] = sum_c w[n, c * LANES + j] * x[c * LANES + j]

written out term by term (a sum over c would be a scalar reduction; a term is a vector multiply and add).
The LANES partial sums are added at the end by a product with ones. Every format adds in the same order, so
quantised matrices give the bits that their decoded numbers give.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from pallas_kernels.arithmetic import int32s
from pallas_kernels.formats import e2m1, e4m3, e8m0
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK
from pallas_kernels.grouped_matmul.stored import Stack
from pallas_kernels.precision import product_precision

LANES = 16  # two AVX2 vectors, one of AVX-512
TERMS_PER_LOOP = 8  # beyond 15 readers of a value XLA stops fusing it: the whole stack would be converted
MAX_TERMS = 128  # bounds the size of the program at great widths


def can_stream(stack: Stack, dtype: jax.typing.DTypeLike) -> bool:
    """Whether `stream_product` takes rows of this dtype; plain weights must have the same one."""
    same = stack.format != "plain" or stack.values.dtype == dtype
    return stack.shape[-1] % LANES == 0 and same and dtype in (jnp.float32, jnp.bfloat16)


def stream_product(
    stack: Stack, index: Int32[Array, ""], x: Float32[Array, " K"], max_terms: int = MAX_TERMS
) -> Float32[Array, " N"]:
    """stack[index] @ x in float32, its rows in one axis, without a copy of stack[index].

    Fewer terms make a smaller program, and more partial sums, which cost memory traffic.
    """
    width = stack.shape[-1]
    lanes = LANES
    while width // lanes > max_terms and width % (2 * lanes) == 0:
        lanes *= 2
    product = {"plain": _plain, "fp8": _fp8, "mxfp4": _mxfp4}[stack.format]
    return _sums(product(stack, index, x, lanes), jnp.ones(lanes, jnp.float32))


def _loops(width: int, lanes: int):
    """The first columns of the terms of every loop."""
    per_loop = TERMS_PER_LOOP * lanes
    return [range(first, min(width, first + per_loop), lanes) for first in range(0, width, per_loop)]


# In each of these a barrier per loop keeps the values on both sides separate, so each has few readers. It
# holds `x`, so that no slice or conversion of the stack can be moved out of the caller's loops. The bits of a
# stack are reinterpreted behind the barrier and before the slice: earlier the stack would be copied, and
# later the slice of a type that the processor does not have would be converted to another one and back.


def _plain(stack: Stack, index, x, lanes):
    num, values = math.prod(stack.shape[1:-1]), stack.values
    values = values.reshape(len(values), num, -1)
    partial = jnp.zeros((num, lanes), jnp.float32)
    for loop in _loops(stack.shape[-1], lanes):
        here, index, x, partial = lax.optimization_barrier((values, index, x, partial))
        if here.dtype == jnp.bfloat16:
            here = lax.bitcast_convert_type(here, jnp.uint16)
        for start in loop:
            columns = lax.dynamic_slice(here, int32s(index, 0, start), (1, num, lanes))[0]
            if columns.dtype == jnp.uint16:  # bfloat16 is the upper half of a float32
                columns = lax.bitcast_convert_type(columns.astype(jnp.uint32) << 16, jnp.float32)
            partial += columns * x[start : start + lanes]
    return partial


def _fp8(stack: Stack, index, x, lanes):
    """Scales go into `x`, of which every row block then has its own; a power of two changes no digit."""
    *which, rows, width = stack.shape[1:]
    tall = math.gcd(rows, FP8_BLOCK)  # rows that have one scale, whatever the number of rows
    num_blocks = math.prod(which) * rows // tall
    values = stack.values.reshape(-1, num_blocks, tall, width)
    scale = e8m0.normal_value(lax.dynamic_index_in_dim(stack.scale, index, keepdims=False))
    scale = jnp.repeat(scale, FP8_BLOCK // tall, axis=-2)[..., : rows // tall, :].reshape(num_blocks, -1)
    x = jnp.repeat(scale, FP8_BLOCK, axis=1)[:, :width] * x * e4m3.OF_HALF
    partial = jnp.zeros((num_blocks, tall, lanes), jnp.float32)
    for loop in _loops(width, lanes):
        here, index, x, partial = lax.optimization_barrier((values, index, x, partial))
        here = lax.bitcast_convert_type(here, jnp.uint8)
        for start in loop:
            columns = lax.dynamic_slice(here, int32s(index, 0, 0, start), (1, num_blocks, tall, lanes))[0]
            columns = e4m3.halves(columns).astype(jnp.float32)
            partial += columns * x[:, None, start : start + lanes]
    return partial.reshape(-1, lanes)


def _mxfp4(stack: Stack, index, x, lanes):
    """Even and odd columns have their own sums: a loop that interleaves them is not vectorised."""
    num, half = math.prod(stack.shape[1:-1]), lanes // 2
    values, scale = (a.reshape(len(a), num, -1) for a in stack)
    groups = max(1, lanes // FP4_GROUP)
    x = x.reshape(-1, 2).T * e2m1.OF_PLACED
    partial = [jnp.zeros((num, half), jnp.float32)] * 2
    for loop in _loops(stack.shape[-1], lanes):
        here, scales, index, x, partial = lax.optimization_barrier((values, scale, index, x, partial))
        for start in loop:
            packed = lax.dynamic_slice(here, int32s(index, 0, start // 2), (1, num, half))[0]
            scaling = lax.dynamic_slice(scales, int32s(index, 0, start // FP4_GROUP), (1, num, groups))[0]
            scaling = e8m0.normal_value(scaling)
            if groups > 1:
                scaling = jnp.repeat(scaling, FP4_GROUP // 2, axis=1)
            partial = [
                sums + numbers.astype(jnp.float32) * scaling * factor[start // 2 : start // 2 + half]
                for sums, numbers, factor in zip(partial, e2m1.halves(packed), x, strict=True)
            ]
    places = jnp.eye(lanes, dtype=jnp.float32)
    return _sums(partial[0], places[0::2]) + _sums(partial[1], places[1::2])


def _sums(partial, places):
    return jnp.matmul(partial, places, precision=product_precision(partial.dtype))
