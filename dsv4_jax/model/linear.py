"""The two ways this model multiplies by a weight."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dsv4_jax.numerics.formats import Fp8Blocks
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.numerics.weights import Weight, is_quantized, plain
from pallas_kernels.block_matmul import block_matmul
from pallas_kernels.grouped_matmul.stored import Stack
from pallas_kernels.grouped_matmul.stream import LANES, stream_product
from pallas_kernels.precision import product_precision

STREAMED_TERMS = 8
"""Of a bfloat16 product with one row on a CPU. 32 take twice as long to compile, for little speed if any."""


def project(
    x: Float[Array, "*tokens D"], weight: Weight, policy: Policy | None = None
) -> Float[Array, "..."]:
    """x weight^T over the last axis of both, [*tokens, *out]: float32 accumulation, one cast at the end.

    `preferred_element_type` is stated because a bf16 x bf16 -> bf16 dot runs at float32 speed on CPUs.

    Args:
        x: [*tokens, D].
        weight: [*out, D]; a quantised one is decoded to the dtype of `x`, exactly.
        policy: with kernels, FP8 weights are decoded tile by tile inside `block_matmul`; without, whole.
    """
    if policy is not None and _by_kernel(weight, policy):
        return _project_fp8(x, weight, policy.interpret)
    return _product(x, plain(weight, x.dtype), product_precision(x.dtype)).astype(x.dtype)


def project_float32(x: Float[Array, "*tokens D"], weight: Float[Array, "*out D"]) -> Float32[Array, "..."]:
    """As `project`, with operands, products and result in float32 on every backend (router, mHC, head)."""
    return _product(x.astype(jnp.float32), weight, jax.lax.Precision.HIGHEST)


def project_groups(
    x: Float[Array, "*tokens G D"], weight: Weight, policy: Policy
) -> Float[Array, "*tokens G O"]:
    """Each group's channels times that group's matrix, weight [G, O, D]; otherwise as `project`."""
    if _by_kernel(weight, policy):
        return _fp8_products(flat(x), weight, policy.interpret, groups=x.shape[-2]).reshape(*x.shape[:-1], -1)
    rows = x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)  # [G, tokens, D]
    matrices = plain(weight, x.dtype)
    y = jax.lax.dot_general(
        rows,
        matrices,
        (((2,), (2,)), ((0,), (0,))),
        precision=product_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y.swapaxes(0, 1).astype(x.dtype).reshape(*x.shape[:-1], -1)


def flat(x: Weight) -> Weight:
    """The last two axes as one, for a product that sums over both."""
    return x.reshape(*x.shape[:-2], -1)


def _by_kernel(weight: Weight, policy: Policy) -> bool:
    """Whether `block_matmul` decodes the weight: with kernels, all that is held in FP8."""
    return policy.kernels != "xla" and is_quantized(weight) and isinstance(weight.blocks, Fp8Blocks)


def _project_fp8(x, weight, interpret):
    return _fp8_products(x, weight, interpret).reshape(*x.shape[:-1], *weight.shape[:-1])


def _fp8_products(x, weight, interpret, groups=1):
    """[*tokens, outputs]: x times every matrix of the weight (gate and up are two), read in place."""
    rows = x.reshape(-1, x.shape[-1])
    elements, scales = (a.reshape(-1, *a.shape[-2:]) for a in (weight.blocks.elements, weight.blocks.scale))
    count = math.prod(weight.leading)
    first = 0 if weight.repeat is None else weight.repeat * count
    y = [
        block_matmul(rows, elements, scales, repeat=first + i, groups=groups, interpret=interpret)
        for i in range(count)
    ]
    return jnp.concatenate(y, axis=1).reshape(*x.shape[:-1], -1)


def _product(x, weight, precision):
    # One row axis, one column axis, one summed axis, the last of both: a product with more of any kind is
    # rewritten by XLA:CPU with a transposed copy of the weight, at every call.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    columns = weight.reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
    dot = functools.partial(_dot, precision=precision)
    if len(rows) == 1 and columns.dtype == jnp.bfloat16 and columns.shape[1] % LANES == 0:
        y = jax.lax.platform_dependent(rows, columns, cpu=_streamed, default=dot)
    else:
        y = dot(rows, columns)
    return y.reshape(*x.shape[:-1], *weight.shape[:-1])


def _dot(rows, columns, precision):
    return jax.lax.dot_general(
        rows,
        columns.astype(rows.dtype),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _streamed(rows, columns):
    """One row on a CPU: its bfloat16 products take longer than float32 ones, a loop over the bytes less."""
    row = rows[0].astype(jnp.float32)
    return stream_product(Stack(columns[None]), jnp.int32(0), row, STREAMED_TERMS)[None]
