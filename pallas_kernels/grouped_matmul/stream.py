"""A row times one matrix of a stack, read where it lies: the decode path.

XLA:CPU cannot feed a dynamic slice to a matmul without copying the slice first, and for one row that copy
costs as much as the product. An elementwise loop reads the slice in place. Here the product is such a
loop, LANES columns at a time,

    partial[n, j] = sum_c w[n, c * LANES + j] * x[c * LANES + j]

written out term by term (a sum over c would be a scalar reduction; a term is a vector multiply and add).
The LANES partial sums are added at the end by a product with ones.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

LANES = 16  # two AVX2 vectors, one of AVX-512
TERMS_PER_LOOP = 8  # beyond 15 readers of a value XLA stops fusing it: the whole stack would be converted
MAX_TERMS = 128  # bounds the size of the program at great widths


def can_stream(width: int, *dtypes: jax.typing.DTypeLike) -> bool:
    """Whether rows of `width` numbers can be read this way; all dtypes must be the same one."""
    return width % LANES == 0 and len(set(dtypes)) == 1 and dtypes[0] in (jnp.float32, jnp.bfloat16)


def stream_product(
    stack: Float[Array, "S N K"], index: Int32[Array, ""], x: Float32[Array, " K"]
) -> Float32[Array, " N"]:
    """stack[index] @ x in float32, without a copy of stack[index]."""
    _, num, width = stack.shape
    lanes = LANES
    while width // lanes > MAX_TERMS and width % (2 * lanes) == 0:
        lanes *= 2
    partial = jnp.zeros((num, lanes), jnp.float32)
    for first in range(0, width, TERMS_PER_LOOP * lanes):
        # A barrier per loop: values on both sides stay separate, so each has few readers. It holds `x`,
        # so that no slice or conversion of the stack can be moved out of the caller's loops.
        here, index, x, partial = lax.optimization_barrier((stack, index, x, partial))
        if here.dtype == jnp.bfloat16:
            here = lax.bitcast_convert_type(here, jnp.uint16)
        for start in range(first, min(width, first + TERMS_PER_LOOP * lanes), lanes):
            columns = lax.dynamic_slice(here, (index, 0, start), (1, num, lanes))[0]
            if columns.dtype == jnp.uint16:  # bfloat16 is the upper half of a float32
                columns = lax.bitcast_convert_type(columns.astype(jnp.uint32) << 16, jnp.float32)
            partial += columns * x[start : start + lanes]
    return partial @ jnp.ones(lanes)
