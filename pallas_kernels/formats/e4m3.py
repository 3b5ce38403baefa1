"""E4M3 (FP8): a sign, four bits of exponent with bias 7, three of mantissa; 0x7F and 0xFF are NaN.

The numbers of a byte are placed in float16: s eeee mmm becomes s 0eeee mmm0000000. Subnormals stay
subnormals, so one power of two makes up for the different bias of all numbers; conversion from float16 is
exact, and fast where the processor has it.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt8

MAX = 448.0
"""The largest number."""

SMALLEST_MAX = 1e-4
"""The largest magnitude of a group counts as no smaller when its scale is chosen: at least 2^-22."""

OF_HALF = 2.0**8
"""What the float16 number with the bits of an E4M3 number must be multiplied with."""

VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""f32[256]: the number behind each byte, for numpy."""


def halves(code: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float16 numbers that are OF_HALF too small; the two NaN codes become 480."""
    bits = code.astype(jnp.uint16)
    return lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)


def value(code: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The number behind each byte, NaN included: in integer arithmetic, several times as fast as a cast."""
    numbers = halves(code).astype(jnp.float32) * OF_HALF
    return jnp.where(code & 0x7F == 0x7F, jnp.nan, numbers)


def value_of(elements: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """float8_e4m3fn in float32, by way of their bits, so that numbers rounded to FP8 stay rounded.

    On a GPU XLA takes a cast to FP8 and one back for no cast at all (seen on an H200, jax 0.11.2).
    """
    return value(jax.lax.bitcast_convert_type(elements, jnp.uint8))


def value_in_word(code: Int32[Array, "*n"]) -> Float[Array, "*n"]:
    """The number in the lowest byte of a word, in operations every TPU has; the codes of NaN give 480.

    A subnormal is built between 2^-6 and 2^-5, where its bits weigh what they should, and moved down.
    """
    magnitude = code & 0x7F
    is_normal = magnitude >= 8
    bits = (magnitude << 20) + jnp.where(is_normal, jnp.int32(120 << 23), jnp.int32(121 << 23))
    size = jax.lax.bitcast_convert_type(bits, jnp.float32) - jnp.where(
        is_normal, jnp.float32(0), jnp.float32(2.0**-6)
    )
    signed = jax.lax.bitcast_convert_type(size, jnp.int32) | ((code & 0x80) << 24)
    return jax.lax.bitcast_convert_type(signed, jnp.float32)


def rounded(x: Float32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest float8_e4m3fn numbers, ties to even, saturating at +-MAX."""
    # The cast itself does not saturate: beyond 464 it gives NaN.
    return jnp.clip(x, -MAX, MAX).astype(jnp.float8_e4m3fn)
