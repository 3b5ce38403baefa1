"""Float32 products, of which there is one implementation, and the shape of a weight's sum over two axes.

All other products with weights are `Operations.linear` and `Operations.grouped_linear`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.block_matmul import matmul_xla
from pallas_kernels.formats.weights import Weight


def project_float32(x: Float[Array, "*tokens D"], weight: Float[Array, "*out D"]) -> Float32[Array, "..."]:
    """x weight^T over the last axes, [*tokens, *out]: float32 on every backend (router, mHC, head)."""
    return matmul_xla(x.astype(jnp.float32), weight, jax.lax.Precision.HIGHEST)


def flat(x: Weight) -> Weight:
    """The last two axes as one, for a product that sums over both."""
    return x.reshape(*x.shape[:-2], -1)
