"""The two ways this model multiplies by a weight, in whatever format the weight is held.

`model/operations.py` chooses between the functions for decoded and for stored weights; modules call its
`linear` and `grouped_linear`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.block_matmul import block_matmul, grouped_matmul_xla, matmul_xla
from pallas_kernels.formats.weights import Weight, format_of, plain
from pallas_kernels.precision import product_precision


def project(x: Float[Array, "*tokens D"], weight: Weight) -> Float[Array, "..."]:
    """x weight^T over the last axis of both, [*tokens, *out]: float32 accumulation, one cast at the end.

    Args:
        x: [*tokens, D].
        weight: [*out, D]; a quantised one is decoded whole to the dtype of `x`, exactly.
    """
    return matmul_xla(x, plain(weight, x.dtype), product_precision(x.dtype)).astype(x.dtype)


def project_stored(x: Float[Array, "*tokens D"], weight: Weight, *, interpret: bool) -> Float[Array, "..."]:
    """As `project`, but an FP8 weight stays where it lies and is decoded tile by tile by `block_matmul`."""
    if not _is_fp8(weight):
        return project(x, weight)
    return _fp8_products(x, weight, interpret).reshape(*x.shape[:-1], *weight.shape[:-1])


def project_float32(x: Float[Array, "*tokens D"], weight: Float[Array, "*out D"]) -> Float32[Array, "..."]:
    """As `project`, with operands, products and result in float32 on every backend (router, mHC, head)."""
    return matmul_xla(x.astype(jnp.float32), weight, jax.lax.Precision.HIGHEST)


def project_groups(x: Float[Array, "*tokens G D"], weight: Weight) -> Float[Array, "*tokens G O"]:
    """Each group's channels times that group's matrix, weight [G, O, D]; otherwise as `project`."""
    return grouped_matmul_xla(x, plain(weight, x.dtype))


def project_groups_stored(
    x: Float[Array, "*tokens G D"], weight: Weight, *, interpret: bool
) -> Float[Array, "*tokens G O"]:
    """As `project_groups`, but an FP8 weight is read as by `project_stored`."""
    if not _is_fp8(weight):
        return project_groups(x, weight)
    return _fp8_products(flat(x), weight, interpret, groups=x.shape[-2]).reshape(*x.shape[:-1], -1)


def flat(x: Weight) -> Weight:
    """The last two axes as one, for a product that sums over both."""
    return x.reshape(*x.shape[:-2], -1)


def _is_fp8(weight: Weight) -> bool:
    return format_of(weight) == "fp8"


def _fp8_products(x, weight, interpret, groups=1):
    """[*tokens, outputs]: x times every matrix of the weight (gate and up are two), read in place."""
    rows = x.reshape(-1, x.shape[-1])
    matrices = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), weight.blocks)
    count = math.prod(weight.leading)
    first = 0 if weight.repeat is None else weight.repeat * count
    y = [
        block_matmul(rows, matrices, repeat=first + i, groups=groups, interpret=interpret)
        for i in range(count)
    ]
    return jnp.concatenate(y, axis=1).reshape(*x.shape[:-1], -1)
