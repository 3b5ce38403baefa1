"""E8M0: a byte b that means the power of two 2^(b - 127); 255 is not a number (OCP Microscaling, 5.4.1).

Code 0 is 2^-127, which float32 holds as a subnormal number: that is what `value` and the table for numpy
give. XLA takes subnormal operands for zero on a CPU, and so does a TPU: a product with that scale is 0 there,
while numpy, which decodes tensors of files, multiplies exactly. `normal_value` gives 0 for code 0 from the
start, so products are the same with it as with `value`. No scale that we write is so small (2^-126 or more
for FP4, 2^-22 for FP8).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Integer, UInt8

BIAS = 127
NAN = 0xFF

VALUES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))
"""f32[256]: the number behind each byte, for numpy."""


def value(code: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2^(code - 127) in float32. Code 255 gives NaN; code 0 is the subnormal 2^-127."""
    code = code.astype(jnp.int32)
    bits = jnp.where(code == 0, 1 << 22, code << 23)
    bits = jnp.where(code == NAN, 0x7FC00000, bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def normal_value(code: Integer[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """As `value` for codes 1 .. 254, by one shift, for loops and kernels; 0 gives 0 and 255 infinity."""
    return lax.bitcast_convert_type(code.astype(jnp.int32) << 23, jnp.float32)


def code_above(ratio: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The byte of 2^ceil(log2 ratio), for positive normal float32 `ratio` of at most 2^127.

    Found from the bits, so exactly; a cast to an E8M0 type would round to nearest.
    """
    bits = jax.lax.bitcast_convert_type(ratio.astype(jnp.float32), jnp.int32)
    # The biased exponent, one more if anything follows the leading bit.
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).astype(jnp.uint8)


def values_on_host(scale: np.ndarray) -> np.ndarray:
    """Scales of a file as float32: E8M0 bytes decoded, float32 taken as it is.

    Args:
        scale: float8_e8m0fnu, uint8 or float32, any shape.
    """
    return scale if scale.dtype == np.float32 else VALUES[scale.view(np.uint8)]
