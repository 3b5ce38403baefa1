"""Tiles of quantised weights as numbers, inside a TPU kernel.

FP4: a byte holds an even and an odd column, which are placed as E5M2 (`formats.e2m1.e5m2`); the scale takes
in what such numbers lack. Even and odd columns stay apart: a decoded tile has all even columns first, and so
must the rows that it is multiplied with.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats import e2m1, e8m0
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK

GROUP_BYTES = FP4_GROUP // 2


def fp4_scale(codes: UInt8[Array, "N G"]) -> Float[Array, "N G"]:
    """2^(code - 127 + 14) in bfloat16, for codes up to 240."""
    return e8m0.normal_value(codes.astype(jnp.int32) + e2m1.PLACED_SHORTAGE).astype(jnp.bfloat16)


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
        for numbers, first in zip(e2m1.e5m2(values[:, bytes_]), (0, length), strict=True):
            decoded[:, pl.ds(first + at, chunk)] = numbers.astype(decoded.dtype) * factor

    lax.fori_loop(0, length // chunk, part, None)


def decode_fp8(values, scale_at, decoded) -> None:
    """References: E4M3 [N, K] to [N, K]; scale_at(r, g): the scalar of 128 rows and 128 columns."""
    rows, columns = values.shape

    def row_block(r, first, size):
        for g in range(0, columns, FP8_BLOCK):
            part = pl.ds(first, size), pl.ds(g, min(FP8_BLOCK, columns - g))
            # Through float32: not every generation multiplies in bfloat16 on the vector unit.
            numbers = values[part].astype(jnp.float32) * scale_at(r, g // FP8_BLOCK)
            decoded[part] = numbers.astype(decoded.dtype)

    if rows % FP8_BLOCK:
        for r in range(0, rows, FP8_BLOCK):
            row_block(r // FP8_BLOCK, r, min(FP8_BLOCK, rows - r))
        return
    lax.fori_loop(
        0,
        rows // FP8_BLOCK,
        lambda r, _: row_block(r, pl.multiple_of(r * FP8_BLOCK, FP8_BLOCK), FP8_BLOCK),
        None,
    )
