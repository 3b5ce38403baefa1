"""How exactly two matrices are multiplied; this is the only copy of the rule."""

import jax
import jax.numpy as jnp
from jax import lax


def product_precision(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """Float32 operands are multiplied as float32; products of narrower ones are exact without help.

    An accelerator left to itself rounds float32 operands on their way into the matrix unit: a TPU to
    bfloat16, a GPU to TF32 (10 bits). A CPU never does, so no test on one can miss this argument.

    Args:
        dtype: of the operands, in which they were given: bfloat16 numbers that are held in float32 count as
            bfloat16, because rounding them to either type changes nothing.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def einsum_float32(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, products and sums as exact as float32: f32[...]."""
    precision = product_precision(left.dtype)
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=jnp.float32)
