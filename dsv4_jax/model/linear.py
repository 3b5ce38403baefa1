"""The two ways this model multiplies by a weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def project(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum with float32 accumulation and one cast back to the dtype of `x`.

    `preferred_element_type` is stated because a bf16 x bf16 -> bf16 dot runs at float32 speed on CPUs.
    """
    y = jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def project_float32(
    equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]
) -> Float32[Array, "..."]:
    """einsum whose operands, products and result are float32 on every backend (router, mHC, head)."""
    return jnp.einsum(
        equation,
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
