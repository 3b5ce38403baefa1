"""Integer arithmetic used by every kernel family; this is the only copy."""

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Int32


def cdiv(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator) of non-negative integers."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return cdiv(value, multiple) * multiple


# `//` and `%` of arrays are several operations each, for the sake of negative numbers. The divisor's type is
# stated because Python's integers are 64 bits wide where JAX is told to allow that, and `lax` mixes no types.


def quotient(numerator: jax.Array, denominator: int) -> Int32[Array, "..."]:
    """numerator / denominator rounded towards 0, one operation: i32[...] by a positive constant."""
    return lax.div(numerator, np.int32(denominator))


def remainder(numerator: jax.Array, denominator: int) -> Int32[Array, "..."]:
    """What `quotient` leaves, with the sign of the numerator, one operation: i32[...]."""
    return lax.rem(numerator, np.int32(denominator))


def int32s(*indices: int | jax.Array) -> tuple[np.int32 | jax.Array, ...]:
    """Start indices of a slice, or bounds of a loop, in one type: Python's integers among i32[]."""
    return tuple(np.int32(index) if isinstance(index, int) else index for index in indices)
