"""E2M1 (FP4): a sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Two in a byte.

Byte k of a row holds number 2k in its low four bits and 2k + 1 in its high ones. Loops place the numbers in
float16, kernels in E5M2: s ee m becomes s 000ee m000000000 or s 000ee m0. Subnormals stay subnormals, so
one power of two makes up for the different bias of all numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

MAX = 6.0
"""The largest number."""

SMALLEST_MAX = 6 * 2.0**-126
"""The largest magnitude of a group counts as no smaller when its scale is chosen, a normal number."""

PLACED_SHORTAGE = 14
"""A number placed in float16 or in E5M2 is 2^14 too small: log2 of what it must be multiplied with."""
OF_PLACED = 2.0**PLACED_SHORTAGE

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
"""f32[16]: the number behind each code, for numpy."""
PAIRS = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], axis=1).view(np.uint64)[:, 0]
"""u64[256]: both numbers of a byte as the bits of two float32 numbers, the one in the low four bits first."""


def value(code: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The number behind each 4-bit code."""
    bits = code.astype(jnp.int32)
    exponent, fraction = (bits >> 1) & 3, bits & 1
    # A normal number's float32 bits: exponent 1 is 2^0. Exponent 0 holds 0 and 0.5.
    normal = jax.lax.bitcast_convert_type(((exponent + 126) << 23) | (fraction << 22), jnp.float32)
    size = jnp.where(exponent == 0, 0.5 * fraction.astype(jnp.float32), normal)
    return jnp.where(bits & 8, -size, size)


def code(x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Sign and magnitude bits (0 .. 15) of the nearest E2M1 number, ties to even, saturating at 6."""
    size = jnp.minimum(jnp.abs(x), MAX)
    # The grid is 0, 0.5 .. 2 in halves, 2 .. 4 in ones, 4 .. 6 in twos; codes count its points.
    code = jnp.where(
        size < 2, jnp.round(size * 2), jnp.where(size < 4, jnp.round(size) + 2, jnp.round(size / 2) + 4)
    )
    return code.astype(jnp.uint8) | (jnp.signbit(x).astype(jnp.uint8) << 3)


def pack(codes: UInt8[Array, "*rows C"]) -> UInt8[Array, "*rows C/2"]:
    """Two codes a byte."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: UInt8[Array, "*rows C/2"]) -> UInt8[Array, "*rows C"]:
    """The inverse of `pack`."""
    both = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def halves(
    packed: UInt8[Array, "*rows half"],
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """The even and the odd numbers as float16 numbers that are OF_PLACED too small."""
    bits = packed.astype(jnp.uint16)
    even, odd = ((bits & 0x08) << 12) | ((bits & 0x07) << 9), ((bits & 0x80) << 8) | ((bits & 0x70) << 5)
    return lax.bitcast_convert_type(even, jnp.float16), lax.bitcast_convert_type(odd, jnp.float16)


def interleaved_halves(packed: UInt8[Array, "*groups half 1"]) -> Float[Array, "*groups half 2"]:
    """As `halves`, the even and the odd number of a byte side by side.

    One elementwise loop over the result: XLA:CPU takes ten times as long over a stack of two halves.
    """
    shifts = jnp.array([0, 4], jnp.uint8)
    bits = (packed >> shifts).astype(jnp.uint16)
    return lax.bitcast_convert_type(((bits & 8) << 12) | ((bits & 7) << 9), jnp.float16)


def e5m2_words(words: Int32[Array, "*shape"]) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    """Words of four bytes as words of four E5M2 numbers each, OF_PLACED too small: the even and the odd ones.

    Every generation of TPUs converts or multiplies E5M2.
    """
    even = ((words & 0x07070707) << 1) | ((words & 0x08080808) << 4)
    odd = ((words >> 3) & 0x0E0E0E0E) | (words & jnp.int32(-0x7F7F7F80))  # 0x80808080
    return even, odd


def e5m2(packed: UInt8[Array, "N L"]) -> tuple[Float[Array, "N L"], Float[Array, "N L"]]:
    """Inside a TPU kernel: the even and the odd numbers as E5M2, OF_PLACED too small; N a multiple of 32."""
    even, odd = e5m2_words(pltpu.bitcast(packed, jnp.int32))
    return pltpu.bitcast(even, jnp.float8_e5m2), pltpu.bitcast(odd, jnp.float8_e5m2)
