"""RMS normalisation with a float32 statistic and one cast at the end."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rms_norm(
    x: Float[Array, "... width"], weight: Float32[Array, "width"] | None, eps: float
) -> Float[Array, "... width"]:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (report, section 2.1).

    Args:
        x: activations in the compute dtype.
        weight: f32[width], or None for the unweighted form (query heads, mHC).
        eps: dimensionless, `rms_norm_eps`.

    Returns:
        Same shape and dtype as `x`; everything in between is float32.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight
    return y.astype(x.dtype)
