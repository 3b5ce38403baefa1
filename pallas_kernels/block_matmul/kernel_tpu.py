"""Mosaic TPU kernels of the family: matmuls that decode their FP8 weight.

Layout: the weight lies as in checkpoints, outputs on the sublanes and inputs on the lanes; it is one matrix
of a stack, which the grid indexes, because a slice would be a copy. Its scales are spread to one float32 row
of I numbers for every 128 outputs, so that decoding is one multiplication by a row that is broadcast over the
sublanes. `axis` says which weight axis is the result's: "output" for x W^T, "input" for dy W. Groups lie side
by side on the lanes of x and of the result; a tile belongs to one group, so only index maps know of them.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.arithmetic import cdiv, quotient, remainder
from pallas_kernels.block_matmul.tuning import VMEM_LIMIT, MatmulBlocks
from pallas_kernels.formats import e8m0
from pallas_kernels.formats.sizes import FP8_BLOCK
from pallas_kernels.precision import product_precision

Axis = Literal["output", "input"]


def _matmul_body(_, x_ref, weight_ref, scale_ref, y_ref, decoded_ref, sums_ref, *, axis: Axis) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    for group in range(weight_ref.shape[0] // FP8_BLOCK):
        rows = pl.ds(group * FP8_BLOCK, FP8_BLOCK)
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
    lanes = jnp.broadcast_to(scale[:, None, :, None], (m, 1, n, FP8_BLOCK)).reshape(m, 1, n * FP8_BLOCK)
    return e8m0.normal_value(lanes)


def _few_rows_body(_, x_ref, weight_ref, scale_ref, y_ref, sums_ref) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums = sums_ref[...]
    for group in range(x_ref.shape[1] // FP8_BLOCK):
        columns = pl.ds(group * FP8_BLOCK, FP8_BLOCK)
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


class Tiles(NamedTuple):
    """Where the tiles of a product lie: block indices for a grid step (rows t, result columns n, summed k).

    Group g of the result's columns meets group g of x's, and the same group of the weight's O axis.
    """

    axis: Axis
    outer: int  # blocks of the result in one group
    summed: int  # blocks of the sum in one group

    def x(self, t, n, k, _):
        """Of x [T, G K]."""
        return t, quotient(n, self.outer) * self.summed + k

    def weight(self, t, n, k, repeat):
        """Of the stack [R, G O, I]."""
        if self.axis == "output":
            return repeat[0], n, k
        group, own = quotient(n, self.outer), remainder(n, self.outer)
        return repeat[0], group * self.summed + k, own

    def y(self, t, n, k, _):
        """Of the result [T, G N]."""
        return t, n


def _product_call(
    body, name, x, weight, scales, scale_spec, scratch, *, tiles, groups, blocks, interpret, repeat
):
    """The `pallas_call` of both products; `scales` are float32 rows of one matrix."""
    rows, outer, summed = blocks.rows, blocks.outer, blocks.summed
    columns = groups * tiles.outer * outer
    weight_block = (outer, summed) if tiles.axis == "output" else (summed, outer)
    grid = (cdiv(x.shape[0], rows), groups * tiles.outer, tiles.summed)
    num_repeats = weight.shape[0]
    num_bytes = weight.nbytes // num_repeats + scales.nbytes
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((rows, summed), tiles.x),
                pl.BlockSpec((None, *weight_block), tiles.weight),
                scale_spec,
            ],
            out_specs=pl.BlockSpec((rows, outer), tiles.y),
            scratch_shapes=[*scratch, pltpu.VMEM((rows, outer), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * weight.size // num_repeats,
            transcendentals=0,
            bytes_accessed=grid[0] * num_bytes + x.nbytes * tiles.outer,
        ),
        interpret=interpret,
        name=name,
    )(repeat.reshape(1), x, weight, scales)


def block_matmul_few_rows(
    x: Float[Array, "T GI"],
    weight: Float[Array, "R GO I"],
    scale: UInt8[Array, "O_blocks I_blocks"],
    repeat: Int32[Array, ""],
    *,
    groups: int,
    blocks: MatmulBlocks,
    interpret,
) -> Float[Array, "T GO"]:
    """As `block_matmul_forward` of axis "output" for bfloat16 rows: scales meet the sums, not the weight."""
    _, outputs, summed = weight.shape
    return _product_call(
        _few_rows_body,
        "block_matmul_few_rows",
        x,
        weight,
        _spread(scale.T),  # f32[I / 128, 1, G O]
        pl.BlockSpec((blocks.summed // FP8_BLOCK, 1, blocks.outer), lambda t, n, k, _: (k, 0, n)),
        [],
        tiles=Tiles("output", outputs // groups // blocks.outer, summed // blocks.summed),
        groups=groups,
        blocks=blocks,
        interpret=interpret,
        repeat=repeat,
    )


def block_matmul_forward(
    x: Float[Array, "T GK"],
    weight: Float[Array, "R GO I"],
    scale: UInt8[Array, "O_blocks I_blocks"],
    repeat: Int32[Array, ""],
    *,
    axis: Axis,
    groups: int,
    blocks: MatmulBlocks,
    interpret,
) -> Float[Array, "T GN"]:
    """x times one matrix of the stack, group by group; N is the weight's `axis`, K the other one.

    `scale` is that matrix's. O, in a group, and I are multiples of 128.
    """
    _, outputs, inputs = weight.shape
    outer, summed = (outputs // groups, inputs) if axis == "output" else (inputs, outputs // groups)
    tiles = Tiles(axis, outer // blocks.outer, summed // blocks.summed)
    weight_block = (blocks.outer, blocks.summed) if axis == "output" else (blocks.summed, blocks.outer)

    def place(t, n, k, repeat):
        _, row, column = tiles.weight(t, n, k, repeat)
        return row, 0, column

    return _product_call(
        functools.partial(_matmul_body, axis=axis),
        f"block_matmul_{axis}",
        x,
        weight,
        _spread(scale),  # f32[G O / 128, 1, I]
        pl.BlockSpec((weight_block[0] // FP8_BLOCK, 1, weight_block[1]), place),
        [pltpu.VMEM(weight_block, x.dtype)],
        tiles=tiles,
        groups=groups,
        blocks=blocks,
        interpret=interpret,
        repeat=repeat,
    )
