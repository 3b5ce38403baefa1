"""FP8 and bfloat16 numbers as unsigned integers with the same bits.

XLA:CPU has no slices and no updates of such types: it converts a whole stack to a wider type and back for
each of them. Of integers it has both. On a TPU a change of type would be a pass over the stack.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt16

NUMBERS_OF_BITS = {jnp.dtype("uint8"): jnp.float8_e4m3fn, jnp.dtype("uint16"): jnp.bfloat16}
BITS_OF_NUMBERS = {jnp.dtype(numbers): bits for bits, numbers in NUMBERS_OF_BITS.items()}


def bits(tree: Any) -> Any:
    """The same tree with unsigned integers in place of FP8 and bfloat16 numbers; other arrays as they are."""
    return jax.tree.map(lambda leaf: as_stored(leaf, BITS_OF_NUMBERS.get(leaf.dtype, leaf.dtype)), tree)


def as_stored(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x for an array of this dtype: numbers for unsigned integers are rounded to theirs and become bits."""
    if jnp.issubdtype(dtype, jnp.unsignedinteger) and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x.astype(NUMBERS_OF_BITS[jnp.dtype(dtype)]), dtype)
    return x.astype(dtype)


def bfloat16_value(bits: UInt16[Array, "*s"]) -> Float32[Array, "*s"]:
    """A bfloat16 number is the upper half of a float32."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
