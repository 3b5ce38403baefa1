"""Mosaic TPU kernels of the family: a matmul that decodes its FP8 weight, and the cast of activations to FP8.

Layout: the weight lies as in checkpoints, outputs on the sublanes and inputs on the lanes. Its scales are
spread to one float32 row of I numbers for every 128 outputs, so that decoding is one multiplication by a row
that is broadcast over the sublanes. `axis` says which weight axis is the result's: "output" for x W^T,
"input" for dy W.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.block_matmul.reference import E4M3_MAX, SMALLEST
from pallas_kernels.block_matmul.tuning import VMEM_LIMIT, MatmulBlocks
from pallas_kernels.low_precision import BLOCK, e8m0_value
from pallas_kernels.precision import product_precision

Axis = Literal["output", "input"]

MANTISSA_OF_MAX = 0x600000
"""Of 448, the largest E4M3 number."""


def _matmul_body(x_ref, weight_ref, scale_ref, y_ref, decoded_ref, sums_ref, *, axis: Axis) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    for group in range(weight_ref.shape[0] // BLOCK):
        rows = pl.ds(group * BLOCK, BLOCK)
        # Through float32: not every generation multiplies in bfloat16 on the vector unit.
        decoded = weight_ref[rows, :].astype(jnp.float32) * scale_ref[group]
        decoded_ref[rows, :] = decoded.astype(decoded_ref.dtype)
    sums_ref[...] += lax.dot_general(
        x_ref[...],
        decoded_ref[...],
        (((1,), (1 if axis == "output" else 0,)), ((), ())),
        precision=product_precision(decoded_ref.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def _spread(scale: UInt8[Array, "m n"]) -> Float32[Array, "m 1 n128"]:
    """Every scale in 128 lanes."""
    m, n = scale.shape
    lanes = jnp.broadcast_to(scale[:, None, :, None], (m, 1, n, BLOCK)).reshape(m, 1, n * BLOCK)
    return e8m0_value(lanes)


def _few_rows_body(x_ref, weight_ref, scale_ref, y_ref, sums_ref) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums = sums_ref[...]
    for group in range(x_ref.shape[1] // BLOCK):
        columns = pl.ds(group * BLOCK, BLOCK)
        product = lax.dot_general(
            x_ref[:, columns],
            weight_ref[:, columns],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        sums += product * scale_ref[group]
    sums_ref[...] = sums

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def block_matmul_few_rows(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    scale: UInt8[Array, "O_blocks I_blocks"],
    *,
    blocks: MatmulBlocks,
    interpret,
) -> Float[Array, "T O"]:
    """As `block_matmul_forward` of axis "output" for bfloat16 rows: scales meet the sums, not the weight."""
    outer, summed = weight.shape
    rows_of_o = _spread(scale.T)  # f32[I / 128, 1, O]
    grid = (cdiv(x.shape[0], blocks.rows), outer // blocks.outer, summed // blocks.summed)
    return pl.pallas_call(
        _few_rows_body,
        grid=grid,
        in_specs=[
            pl.BlockSpec((blocks.rows, blocks.summed), lambda t, n, k: (t, k)),
            pl.BlockSpec((blocks.outer, blocks.summed), lambda t, n, k: (n, k)),
            pl.BlockSpec((blocks.summed // BLOCK, 1, blocks.outer), lambda t, n, k: (k, 0, n)),
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.outer), lambda t, n, k: (t, n)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outer), x.dtype),
        scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.outer), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * weight.size,
            transcendentals=0,
            bytes_accessed=grid[0] * (weight.nbytes + rows_of_o.nbytes) + x.nbytes * grid[1],
        ),
        interpret=interpret,
        name="block_matmul_few_rows",
    )(x, weight, rows_of_o)


def block_matmul_forward(
    x: Float[Array, "T K"],
    weight: Float[Array, "O I"],
    scale: UInt8[Array, "O_blocks I_blocks"],
    *,
    axis: Axis,
    blocks: MatmulBlocks,
    interpret,
) -> Float[Array, "T N"]:
    """x times the weight; N is the weight's `axis`, K the other one; both are multiples of 128."""
    outer, summed = weight.shape if axis == "output" else weight.shape[::-1]
    rows_of_i = _spread(scale)  # f32[O / 128, 1, I]
    grid = (cdiv(x.shape[0], blocks.rows), outer // blocks.outer, summed // blocks.summed)
    if axis == "output":
        weight_block = (blocks.outer, blocks.summed)
        place = lambda t, n, k: (n, k)  # noqa: E731
    else:
        weight_block = (blocks.summed, blocks.outer)
        place = lambda t, n, k: (k, n)  # noqa: E731
    scale_block = (weight_block[0] // BLOCK, 1, weight_block[1])
    return pl.pallas_call(
        functools.partial(_matmul_body, axis=axis),
        grid=grid,
        in_specs=[
            pl.BlockSpec((blocks.rows, blocks.summed), lambda t, n, k: (t, k)),
            pl.BlockSpec(weight_block, place),
            pl.BlockSpec(scale_block, lambda t, n, k: (place(t, n, k)[0], 0, place(t, n, k)[1])),
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.outer), lambda t, n, k: (t, n)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outer), x.dtype),
        scratch_shapes=[
            pltpu.VMEM(weight_block, x.dtype),
            pltpu.VMEM((blocks.rows, blocks.outer), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * weight.size,
            transcendentals=0,
            bytes_accessed=grid[0] * (weight.nbytes + rows_of_i.nbytes) + x.nbytes * grid[1],
        ),
        interpret=interpret,
        name=f"block_matmul_{axis}",
    )(x, weight, rows_of_i)


def _cast_body(x_ref, values_ref, codes_ref) -> None:
    groups = [pl.ds(group * BLOCK, BLOCK) for group in range(codes_ref.shape[1])]
    lane = lax.broadcasted_iota(jnp.int32, codes_ref.shape, 1)
    largest = jnp.full(codes_ref.shape, SMALLEST, jnp.float32)
    for group, columns in enumerate(groups):
        own = jnp.abs(x_ref[:, columns].astype(jnp.float32)).max(axis=1, keepdims=True)
        largest = jnp.where(lane == group, jnp.maximum(own, SMALLEST), largest)
    # ceil(log2(largest / 448)) without the division, for all groups of a row at once: 448 = 1.75 * 2^8.
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    codes = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > MANTISSA_OF_MAX).astype(jnp.int32)
    codes_ref[...] = codes
    # Dividing by 2^(code - 127) is multiplying by 2^(127 - code), of exponent field 254 - code.
    inverse = lax.bitcast_convert_type((254 - codes) << 23, jnp.float32)
    for group, columns in enumerate(groups):
        scaled = x_ref[:, columns].astype(jnp.float32) * inverse[:, group : group + 1]
        values_ref[:, columns] = jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(values_ref.dtype)


def block_cast_forward(
    x: Float[Array, "T C"], *, rows: int, interpret
) -> tuple[Float[Array, "T C"], UInt8[Array, "T groups"]]:
    """(values, codes)."""
    num_rows, channels = x.shape
    groups = channels // BLOCK
    values, codes = pl.pallas_call(
        _cast_body,
        grid=(cdiv(num_rows, rows),),
        in_specs=[pl.BlockSpec((rows, channels), lambda t: (t, 0))],
        out_specs=[
            pl.BlockSpec((rows, channels), lambda t: (t, 0)),
            pl.BlockSpec((rows, groups), lambda t: (t, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, channels), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((num_rows, groups), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=4 * x.size, transcendentals=0, bytes_accessed=x.nbytes + x.size + 4 * num_rows * groups
        ),
        interpret=interpret,
        name="block_cast",
    )(x)
    return values, codes.astype(jnp.uint8)
