"""Products with a weight in whatever format it is held: plain XLA of its numbers, or this family's kernel.

Numerics, gradients, cost and sharding of the kernel are those of `block_matmul`.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_matmul.op import block_matmul
from pallas_kernels.block_matmul.xla import grouped_matmul_xla, matmul_xla
from pallas_kernels.formats.weights import Weight, format_of, plain
from pallas_kernels.precision import product_precision


def linear(
    x: Float[Array, "*tokens D"], weight: Weight, *, impl: Literal["xla", "pallas"], interpret: Any = False
) -> Float[Array, "..."]:
    """x weight^T over the last axis of both, [*tokens, *out]: float32 accumulation, one cast at the end.

    Args:
        x: [*tokens, D] bfloat16 or float32.
        weight: [*out, D].
        impl: "xla" decodes a quantised weight whole to the dtype of `x`, exactly. "pallas" leaves an FP8
            weight where it lies and decodes it tile by tile; other formats are multiplied as by "xla".
        interpret: passed to the kernel; tests set it, callers leave it alone.

    Returns:
        [*tokens, *out] in the dtype of `x`.

    Raises:
        ValueError: for an unknown impl.
    """
    if _by_kernel(weight, impl):
        return _fp8_products(x, weight, interpret).reshape(*x.shape[:-1], *weight.shape[:-1])
    return matmul_xla(x, plain(weight, x.dtype), product_precision(x.dtype)).astype(x.dtype)


def grouped_linear(
    x: Float[Array, "*tokens G D"], weight: Weight, *, impl: Literal["xla", "pallas"], interpret: Any = False
) -> Float[Array, "*tokens G O"]:
    """Each group's channels times that group's matrix.

    Args:
        x: [*tokens, G, D] bfloat16 or float32.
        weight: [G, O, D].
        impl, interpret: as in `linear`.

    Returns:
        [*tokens, G, O] in the dtype of `x`.

    Raises:
        ValueError: for an unknown impl.
    """
    if _by_kernel(weight, impl):
        flat = x.reshape(*x.shape[:-2], -1)
        return _fp8_products(flat, weight, interpret, groups=x.shape[-2]).reshape(*x.shape[:-1], -1)
    return grouped_matmul_xla(x, plain(weight, x.dtype))


def _by_kernel(weight: Weight, impl: str) -> bool:
    if impl not in ("xla", "pallas"):
        raise ValueError(f"linear: impl={impl!r} must be 'xla' or 'pallas'")
    return impl == "pallas" and format_of(weight) == "fp8"


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
