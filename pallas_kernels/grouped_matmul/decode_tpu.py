"""Tiles of quantised weights as numbers, inside a TPU kernel.

FP4: a byte holds an even and an odd column. s ee m is placed as the E5M2 number s 000ee m0 in 32-bit words,
four bytes at a time; subnormals stay subnormals, so 2^14 makes up for the bias of all numbers, and the scale
takes it in. Every generation converts or multiplies E5M2. Even and odd columns stay apart: a decoded tile has
all even columns first, and so must the rows that it is multiplied with.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from pallas_kernels.low_precision import BLOCK, GROUP

GROUP_BYTES = GROUP // 2
E5M2_SHORTAGE = 14  # a number placed as above is 2^14 too small


def e2m1_as_e5m2(packed: UInt8[Array, "N L"]) -> tuple[Float[Array, "N L"], Float[Array, "N L"]]:
    """The even and the odd columns as E5M2, 2^14 too small; N is a multiple of 32."""
    words = pltpu.bitcast(packed, jnp.int32)
    even = ((words & 0x07070707) << 1) | ((words & 0x08080808) << 4)
    odd = ((words >> 3) & 0x0E0E0E0E) | (words & jnp.int32(-0x7F7F7F80))  # 0x80808080
    return pltpu.bitcast(even, jnp.float8_e5m2), pltpu.bitcast(odd, jnp.float8_e5m2)


def fp4_scale(codes: UInt8[Array, "N G"]) -> Float[Array, "N G"]:
    """2^(code - 127 + 14) in bfloat16, for codes up to 240."""
    bits = (codes.astype(jnp.int32) + E5M2_SHORTAGE) << 23
    return lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def spreading(num_groups: int) -> Float[Array, "G L"]:
    """0s and 1s: a row of G scales times this is the scale of every byte. The product is exact."""
    byte = jnp.arange(num_groups * GROUP_BYTES, dtype=jnp.int32)
    return (byte // GROUP_BYTES == jnp.arange(num_groups, dtype=jnp.int32)[:, None]).astype(jnp.bfloat16)


def decode_fp4(values, scale: jax.Array, spread, decoded, *, across: bool) -> None:
    """References: u8[N, L] and bfloat16[G, L] to [N, 2 L], even columns first.

    `scale` is bfloat16[N, G], or [G, N] if it lies across.
    """
    length = values.shape[1]
    chunk = next((n for n in (256, 128) if length % n == 0), length)

    def part(number, _):
        at = number * chunk
        if chunk != length:
            at = pl.multiple_of(at, chunk)
        bytes_ = pl.ds(at, chunk)
        factor = lax.dot_general(
            scale,
            spread[:, bytes_],
            (((0 if across else 1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        ).astype(decoded.dtype)
        for numbers, first in zip(e2m1_as_e5m2(values[:, bytes_]), (0, length), strict=True):
            decoded[:, pl.ds(first + at, chunk)] = numbers.astype(decoded.dtype) * factor

    lax.fori_loop(0, length // chunk, part, None)


def decode_fp8(values, scale_at, decoded) -> None:
    """References: E4M3 [N, K] to [N, K]; scale_at(r, g): the scalar of 128 rows and 128 columns."""
    rows, columns = values.shape

    def row_block(r, first, size):
        for g in range(0, columns, BLOCK):
            part = pl.ds(first, size), pl.ds(g, min(BLOCK, columns - g))
            # Through float32: not every generation multiplies in bfloat16 on the vector unit.
            numbers = values[part].astype(jnp.float32) * scale_at(r, g // BLOCK)
            decoded[part] = numbers.astype(decoded.dtype)

    if rows % BLOCK:
        for r in range(0, rows, BLOCK):
            row_block(r // BLOCK, r, min(BLOCK, rows - r))
        return
    lax.fori_loop(0, rows // BLOCK, lambda r, _: row_block(r, pl.multiple_of(r * BLOCK, BLOCK), BLOCK), None)
