"""How parameters are made: every array carries the logical names of its dims for the mesh rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def matrix(
    rngs: nnx.Rngs, dims: dict[str, int], dtype: np.dtype, stddev: float
) -> nnx.Param:
    """A weight drawn from normal(0, stddev).

    Args:
        rngs: source of the draw.
        dims: ordered logical dim name -> size; output dims first, as in checkpoints.
        dtype: of the stored parameter.
        stddev: dimensionless.
    """
    value = _normal(rngs.params(), tuple(dims.values()), dtype, stddev)
    return nnx.Param(value, dims=tuple(dims))


# Compiled once a shape: one program that draws a whole model takes minutes to compile.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, stddev: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * stddev).astype(dtype)


def constant(dims: dict[str, int], value: float) -> nnx.Param:
    """A float32 parameter (norm weight, bias, sink, scale) filled with `value`."""
    return nnx.Param(jnp.full(tuple(dims.values()), value, jnp.float32), dims=tuple(dims))
