"""Products of a few rows with one matrix of a stack, read in place: the decode path.

XLA:CPU cannot feed a dynamic slice to its matmul libraries without copying the slice first, and at one
or two rows that copy costs as much as the product. An elementwise loop can read the slice where it
lies. Here the product is such a loop: LANES columns at a time,

    partial[n, r, j] = sum_c w[n, c * LANES + j] * x[r, c * LANES + j]

written out term by term (a sum over c would be a scalar reduction; this is one vector multiply-add a
term), and the LANES partial sums are added at the end by a product with ones.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

LANES = 16  # two AVX2 vectors, one of AVX-512
TERMS_PER_LOOP = 8  # XLA stops fusing (and copies the whole stack) when a value has more than 15 readers
MAX_TERMS = 128  # bounds the size of the program at great widths


def can_stream(width: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether rows of `width` numbers of `dtype` can be read this way."""
    return width % LANES == 0 and dtype in (jnp.float32, jnp.bfloat16)


def stream_product(
    stack: Float[Array, "S N K"], index: Int32[Array, ""], x: Float32[Array, "rows K"]
) -> Float32[Array, "N rows"]:
    """stack[index] @ x.T in float32, without a copy of stack[index]. Call it inside a loop over `index`."""
    _, num, width = stack.shape
    lanes = LANES
    while width // lanes > MAX_TERMS and width % (2 * lanes) == 0:
        lanes *= 2
    partial = jnp.zeros((num, x.shape[0], lanes), jnp.float32)
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
            partial += columns[:, None, :] * x[None, :, start : start + lanes]
    rows = lax.dot_general(
        partial.reshape(-1, lanes), jnp.ones(lanes), (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return rows.reshape(num, x.shape[0])
