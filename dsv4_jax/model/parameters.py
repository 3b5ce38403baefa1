"""How parameters are declared: shape, dtype, logical dim names for the mesh rules, and initial value.

A module holds zeros of the right shape; `initial.initial_parameters` draws values and checkpoints bring
their own. So building a module costs nothing under `nnx.eval_shape`, which is how every model is built.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def matrix(dims: dict[str, int], dtype: np.dtype, stddev: float) -> nnx.Param:
    """A weight whose initial values are normal(0, stddev).

    Args:
        dims: ordered logical dim name -> size; output dims first, as in checkpoints.
        dtype: of the stored parameter.
        stddev: dimensionless.
    """
    return nnx.Param(jnp.zeros(tuple(dims.values()), dtype), dims=tuple(dims), stddev=stddev)


def constant(dims: dict[str, int], value: float) -> nnx.Param:
    """A float32 parameter (norm weight, bias, sink, scale) whose initial value is `value`."""
    zeros = jnp.zeros(tuple(dims.values()), jnp.float32)
    return nnx.Param(zeros, dims=tuple(dims), fill=value)


def expert_table(dims: dict[str, int], num_experts: int) -> nnx.Param:
    """An int32 table of expert ids whose initial rows are distinct and balanced over the experts."""
    zeros = jnp.zeros(tuple(dims.values()), jnp.int32)
    return nnx.Param(zeros, dims=tuple(dims), num_experts=num_experts)
