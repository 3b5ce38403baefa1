"""What `block_matmul` and `block_cast` mean. Nothing in this file is fast."""

import jax
import jax.numpy as jnp

from pallas_kernels.low_precision import BLOCK, e8m0_value
from pallas_kernels.precision import einsum_float32

E4M3_MAX = 448.0
SMALLEST = 1e-4


def decoded(weight: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """W[o, i] = weight[o, i] * 2^(scale[o div 128, i div 128] - 127), exact in bfloat16."""
    rows, columns = weight.shape
    factor = jnp.repeat(jnp.repeat(e8m0_value(scale), BLOCK, axis=0), BLOCK, axis=1)[:rows, :columns]
    return (weight.astype(jnp.float32) * factor).astype(dtype)


def block_matmul_reference(x: jax.Array, weight: jax.Array, scale: jax.Array, groups: int = 1) -> jax.Array:
    """The definition, for one matrix; the contract is in `op.block_matmul`."""
    matrices = decoded(weight, scale, x.dtype).reshape(groups, -1, weight.shape[1])
    y = einsum_float32("tgi,goi->tgo", x.reshape(len(x), groups, -1), matrices)
    return y.reshape(len(x), -1).astype(x.dtype)


def block_cast_reference(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The definition; the contract is in `op.block_cast`."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, BLOCK)
    ratio = jnp.maximum(jnp.abs(groups).max(axis=-1), SMALLEST) / E4M3_MAX
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    codes = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).astype(jnp.uint8)
    values = jnp.clip(groups / e8m0_value(codes)[..., None], -E4M3_MAX, E4M3_MAX)
    return values.astype(jnp.float8_e4m3fn).reshape(x.shape), codes
