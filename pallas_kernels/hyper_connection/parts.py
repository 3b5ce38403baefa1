"""float32 numbers as three bfloat16 parts: one product with them stacked is an exact float32 product."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arithmetic import round_up
from pallas_kernels.hyper_connection.tuning import PARTS, SUBLANES


def split(value: jax.Array) -> list[jax.Array]:
    """float32 `value` as the sum of three float32 numbers that bfloat16 holds exactly.

    By masking bits: a compiler may drop a rounding to bfloat16 and back, but no mask.
    """
    parts = []
    for _ in range(PARTS):
        bits = lax.bitcast_convert_type(value, jnp.uint32) & jnp.uint32(0xFFFF0000)
        parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        value = value - parts[-1]
    return parts


def stack(parts: list[jax.Array], height: int) -> jax.Array:
    """Below one another, each padded to whole registers, the whole to `height` rows."""
    rows = []
    for part in parts:
        num_rows, width = part.shape
        rows += [part, jnp.zeros((round_up(num_rows, SUBLANES) - num_rows, width), part.dtype)]
    rows.append(jnp.zeros((height - sum(row.shape[0] for row in rows), width), part.dtype))
    return jnp.concatenate([row for row in rows if row.shape[0]], axis=0)


def sum_parts(stacked: jax.Array, num_rows: int) -> jax.Array:
    """Of `stack`ed parts, smallest first."""
    height = round_up(num_rows, SUBLANES)
    first, second, third = (stacked[i * height : i * height + num_rows] for i in range(PARTS))
    return third + second + first
