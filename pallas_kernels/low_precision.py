"""What the bytes of quantised numbers mean. Elements are E4M3 (8 bits) or E2M1 (4), scales E8M0 (8).

An E8M0 byte b means 2^(b - 127). Of two E2M1 numbers in a byte the even one has the low four bits. Products
of elements and scales are exact in bfloat16 as long as they are normal numbers.

Both element formats are made into float16 by placing their bits: s eeee mmm becomes s 0eeee mmm0000000 and
s ee m becomes s 000ee m000000000. Subnormals stay subnormals, so one power of two makes up for the different
exponent bias of all numbers; conversion from float16 is exact, and fast where the processor has it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Integer, UInt8

GROUP = 32
"""Numbers of a row that share one scale: E2M1."""
BLOCK = 128
"""Rows and columns of a matrix that share one scale: E4M3."""

E4M3_OF_HALF = 2.0**8
"""What a float16 number with the bits of an E4M3 number is short of."""
E2M1_OF_HALF = 2.0**14
"""What a float16 number with the bits of an E2M1 number is short of."""


def e8m0_value(code: Integer[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2^(code - 127) for codes 1 .. 254; 0 gives 0 and 255 infinity, neither of which weights use."""
    return lax.bitcast_convert_type(code.astype(jnp.int32) << 23, jnp.float32)


def e4m3_halves(values: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float16 numbers that are E4M3_OF_HALF too small; the two NaN codes become 480."""
    bits = values.astype(jnp.uint16)
    return lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)


def e2m1_halves(
    packed: UInt8[Array, "*rows half"],
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """The even and the odd numbers as float16 numbers that are E2M1_OF_HALF too small."""
    bits = packed.astype(jnp.uint16)
    even, odd = ((bits & 0x08) << 12) | ((bits & 0x07) << 9), ((bits & 0x80) << 8) | ((bits & 0x70) << 5)
    return lax.bitcast_convert_type(even, jnp.float16), lax.bitcast_convert_type(odd, jnp.float16)


def decode_mxfp4(
    packed: UInt8[Array, "*rows half"], scale: UInt8[Array, "*rows groups"]
) -> Float32[Array, "*rows K"]:
    """E2M1 numbers times the scale of their 32."""
    # One elementwise loop over the result: XLA:CPU takes ten times as long over a stack of two halves.
    shifts = jnp.array([0, 4], jnp.uint8)
    bits = (packed.reshape(*scale.shape, GROUP // 2, 1) >> shifts).astype(jnp.uint16)
    halves = lax.bitcast_convert_type(((bits & 8) << 12) | ((bits & 7) << 9), jnp.float16)
    scaled = halves.astype(jnp.float32) * E2M1_OF_HALF * e8m0_value(scale)[..., None, None]
    return scaled.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def decode_fp8_blocks(
    values: UInt8[Array, "*stack N K"], scale: UInt8[Array, "*stack row_blocks column_blocks"]
) -> Float32[Array, "*stack N K"]:
    """Bytes of E4M3 numbers times the scale of their block of 128 x 128; the last blocks may be partial."""
    rows, columns = values.shape[-2:]
    scales = jnp.repeat(jnp.repeat(e8m0_value(scale), BLOCK, axis=-2), BLOCK, axis=-1)[..., :rows, :columns]
    return e4m3_halves(values).astype(jnp.float32) * E4M3_OF_HALF * scales


def e2m1_codes(packed: UInt8[Array, "*rows half"]) -> UInt8[Array, "*rows K"]:
    """The four bits of every number."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def e2m1_value(codes: jax.Array) -> Float32[Array, "*shape"]:
    """The definition: sign bit, and eight magnitudes."""
    magnitudes = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.float32)[codes & 7]
    return jnp.where(codes >= 8, -magnitudes, magnitudes)
