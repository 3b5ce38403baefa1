"""Mosaic TPU kernels of the family: rows of work items times their expert's matrices, and gradients of those.

Layout: weights lie as stored, [S, M, N, K] with M = 2 (gate and up) or 1 (down), and a step of the grid reads
a tile [M, N block, K] of the item's expert where it lies: its number comes from a list in scalar memory. Rows
are [items, rows, K]. A step of an item that is not in use reads nothing new, computes nothing and writes to
the last item, which is never in use. FP4 tiles have even columns first, and so have the rows they meet.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arithmetic import quotient
from pallas_kernels.formats import e2m1, e8m0
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK
from pallas_kernels.grouped_matmul.decode_tpu import (
    GROUP_BYTES,
    decode_fp4,
    decode_fp8,
    fp4_scale,
    spreading,
)
from pallas_kernels.grouped_matmul.stored import Format, Stack
from pallas_kernels.grouped_matmul.tuning_tpu import FEW_ROWS, LANES, ROWS_AT_ONCE, VMEM_LIMIT, ItemBlocks
from pallas_kernels.precision import product_precision

SUBLANES = 8

Formulation = Literal["plain", "decoded", "scaled sums", "masked rows"]


@dataclasses.dataclass(frozen=True)
class Product:
    """What one kernel computes with every tile.

    Attributes:
        formulation: "plain": the tile is multiplied as it is; "decoded": after its numbers were written to
            VMEM; "scaled sums" (FP8): as it is, 128 columns at a time, and the sums are scaled;
            "masked rows" (FP4): see `_masked_rows`.
        limit: of the clamped SwiGLU that joins the two results of M = 2; None: results are given as they are.
    """

    format: Format
    formulation: Formulation
    limit: float | None = None
    weighted: bool = False  # whether the routing weight multiplies the hidden activation


def formulation_of(stack: Stack, dtype, rows: int, axis: Literal["output", "input"]) -> Formulation:
    """How a product with this stack is computed; the same for every routing."""
    if stack.format == "plain":
        return "plain"
    few = dtype == jnp.bfloat16 and axis == "output"
    if (
        stack.format == "fp8"
        and few
        and rows <= FP8_BLOCK
        and not any(n % FP8_BLOCK for n in stack.shape[-2:])
    ):
        return "scaled sums"
    if stack.format == "mxfp4" and few and rows <= FEW_ROWS and stack.shape[-1] % (2 * LANES) == 0:
        return "masked rows"
    return "decoded"


def _dot(lhs, rhs, lhs_dim: int, rhs_dim: int):
    return lax.dot_general(
        lhs,
        rhs,
        (((lhs_dim,), (rhs_dim,)), ((), ())),
        precision=product_precision(lhs.dtype),
        preferred_element_type=jnp.float32,
    )


def scale_lies_across(groups: int) -> bool:
    """Whether FP4 scales are read as [S, M, groups, N].

    XLA lays out [..., N, groups] with N on the lanes where groups would leave lanes unused. Reading them so
    spares a copy of all scales.
    """
    return groups % LANES != 0


class _Tile:
    """The weight tile of a step: references to elements [1, M, N block, K], scales, and where decoded."""

    def __init__(self, form: Format, values, scale, spread, decoded, step) -> None:
        self.form, self.values, self.scale = form, values, scale
        self.spread, self.decoded, self.step = spread, decoded, step

    @property
    def scale_lies_across(self) -> bool:
        """Whether the FP4 scales of this tile are [groups, N block] rather than [N block, groups]."""
        return scale_lies_across(2 * self.values.shape[-1] // FP4_GROUP)

    def fp8_scale(self, m: int, r, g: int):
        """f32[]: of the tile's rows from 128 r and columns from 128 g on."""
        return self.scale[0, m, self.step * (self.values.shape[2] // FP8_BLOCK) + r, g]

    def matrix(self, m: int, dtype):
        """[N block, K] in the dtype of the rows."""
        values = self.values.at[0, m]
        if self.form == "plain":
            return values[...].astype(dtype)
        if self.form == "fp8":
            decode_fp8(values, functools.partial(self.fp8_scale, m), self.decoded)
        else:
            codes = self.scale[0, m]
            decode_fp4(values, fp4_scale(codes), self.spread, self.decoded, across=self.scale_lies_across)
        return self.decoded[...]

    def scaled_sums(self, m: int, rows):
        """f32[rows, N block] of FP8: each 128 columns' products times their scale."""
        values, total = self.values.at[0, m], 0.0
        blocks = values.shape[0] // FP8_BLOCK
        for g in range(values.shape[1] // FP8_BLOCK):
            columns = pl.ds(g * FP8_BLOCK, FP8_BLOCK)
            lanes = [jnp.full((1, FP8_BLOCK), self.fp8_scale(m, r, g), jnp.float32) for r in range(blocks)]
            total += _dot(rows[:, columns], values[:, columns], 1, 1) * jnp.concatenate(lanes, axis=1)
        return total


def _spread_rows(x_ref, wide_ref, sub) -> None:
    """Lays out ROWS_AT_ONCE rows for `_masked_rows`: wide[sub, k] is [rows x 8, 256]."""
    half, lanes = x_ref.shape[1] // 2, 2 * LANES
    own = lax.broadcasted_iota(jnp.int32, (SUBLANES, lanes), 0) == (
        (lax.broadcasted_iota(jnp.int32, (SUBLANES, lanes), 1) & (LANES - 1)) >> GROUP_BYTES.bit_length() - 1
    )
    for k in range(half // LANES):
        parts = []
        for t in range(ROWS_AT_ONCE):
            row = pl.ds(sub * ROWS_AT_ONCE + t, 1)
            both = [x_ref[row, pl.ds(first + k * LANES, LANES)] for first in (0, half)]
            parts.append(jnp.where(own, jnp.concatenate(both, axis=1), 0))
        wide_ref[sub, k] = jnp.concatenate(parts, axis=0).astype(wide_ref.dtype)


def _masked_rows(tile: _Tile, wide_ref, sub, sums_ref) -> None:
    """Sums of FP4 weights that are scaled behind the matrix unit, for ROWS_AT_ONCE rows.

    128 bytes of a weight row are 8 groups of 32 columns. Each row of x is there 8 times, with the columns of
    one group and zeros elsewhere; the 8 results are the sums of 8 groups, one a sublane, and are multiplied
    by the scales, groups on sublanes and outputs on lanes. The matrix unit has rows to spare, while scaling
    the weights would be the vector unit's second pass over all of them.
    """
    for m in range(tile.values.shape[1]):
        scale = fp4_scale(tile.scale[0, m])
        if tile.scale_lies_across:
            scale = scale.astype(jnp.float32)
        else:  # a product with the identity transposes, exactly
            square = (scale.shape[1],) * 2
            diagonal = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(
                jnp.int32, square, 1
            )
            scale = _dot(diagonal.astype(scale.dtype), scale, 1, 1)
        totals = [0.0] * ROWS_AT_ONCE
        for k in range(scale.shape[0] // SUBLANES):
            even, odd = e2m1.e5m2(tile.values[0, m, :, pl.ds(k * LANES, LANES)])
            sums = _dot(wide_ref[sub, k], jnp.concatenate([even, odd], axis=1), 1, 1)
            factor = scale[k * SUBLANES : (k + 1) * SUBLANES]
            for t in range(ROWS_AT_ONCE):
                totals[t] += sums[t * SUBLANES : (t + 1) * SUBLANES] * factor
        rows = sums_ref[m]
        for t, total in enumerate(totals):
            here = lax.broadcasted_iota(jnp.int32, rows.shape, 0) == sub * ROWS_AT_ONCE + t
            rows = jnp.where(here, total.sum(axis=0, keepdims=True), rows)
        sums_ref[m] = rows


def _hidden(gate, up, limit: float):
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def _output_body(expert, count, total, *refs, names, product: Product) -> None:
    named = dict(zip(names, refs, strict=True))
    item, step = pl.program_id(0), pl.program_id(1)
    x_ref, out_ref = named["x"], named["out"]
    tile = _Tile(
        product.format, named["values"], named.get("scale"), named.get("spread"), named.get("decoded"), step
    )
    num = tile.values.shape[1]

    @pl.when(item < total[0])
    def _compute() -> None:
        if product.formulation == "masked rows":
            sums_ref, wide_ref, plain_ref = named["sums"], named["wide"], named["plain_rows"]
            used = quotient(count[item] + (ROWS_AT_ONCE - 1), ROWS_AT_ONCE)

            @pl.when(step == 0)
            def _lay_out() -> None:
                plain_ref[...] = x_ref[0].astype(jnp.float32)  # single rows of bfloat16 cannot be read
                for sub in range(wide_ref.shape[0]):
                    pl.when(sub < used)(functools.partial(_spread_rows, plain_ref, wide_ref, sub))

            sums_ref[...] = jnp.zeros_like(sums_ref)
            lax.fori_loop(0, used, lambda sub, _: _masked_rows(tile, wide_ref, sub, sums_ref), None)
            sums = [sums_ref[m] for m in range(num)]
        elif product.formulation == "scaled sums":
            sums = [tile.scaled_sums(m, x_ref.at[0]) for m in range(num)]
        else:
            sums = [_dot(x_ref[0], tile.matrix(m, x_ref.dtype), 1, 1) for m in range(num)]
        if product.limit is None:
            for m in range(num):
                out_ref[0, m] = sums[m]
            return
        hidden = _hidden(*sums, product.limit)
        if product.weighted:
            hidden *= named["weight"][0]
        out_ref[0] = hidden.astype(out_ref.dtype)


def _input_body(expert, count, total, *refs, names, product: Product) -> None:
    named = dict(zip(names, refs, strict=True))
    item, step = pl.program_id(0), pl.program_id(1)
    d_ref, out_ref = named["x"], named["out"]
    tile = _Tile(
        product.format, named["values"], named.get("scale"), named.get("spread"), named.get("decoded"), step
    )

    @pl.when(item < total[0])
    def _compute() -> None:
        @pl.when(step == 0)
        def _start() -> None:
            out_ref[...] = jnp.zeros_like(out_ref)

        for m in range(tile.values.shape[1]):
            out_ref[0] += _dot(d_ref[0, m], tile.matrix(m, d_ref.dtype), 1, 0)


def grouped_product(
    x: Float[Array, "items rows K"] | Float[Array, "items M rows N"],
    stack: Stack,
    expert: Int32[Array, " items"],
    count: Int32[Array, " items"],
    total: Int32[Array, "1"],
    *,
    axis: Literal["output", "input"],
    blocks: ItemBlocks,
    swiglu: float | None = None,
    weight: Float32[Array, "items rows"] | None = None,
    interpret,
) -> Array:
    """Rows of every item times the matrices of its expert.

    Args:
        x: for axis "output" [items, rows, K], for "input" [items, M, rows, N]; of FP4 stacks the columns K
            are the even ones, then the odd ones.
        stack: [S, M, N, K]; scales [S, M, ...].
        expert: place of the item's expert in the stack.
        count, total: see `work_items.WorkItems`.
        swiglu: joins gate and up to hidden activations, clamped at this limit; None does not.
        weight: routing weights to multiply these with.

    Returns:
        "output": f32[items, M, rows, N], or with `swiglu` [items, rows, N] in the dtype of x.
        "input": f32[items, rows, K], summed over M and N; FP4: even columns first.
        Items and rows that are not in use hold anything.
    """
    _, num, outer, width = stack.shape
    items, rows = x.shape[0], x.shape[-2]
    block, steps = blocks.outer, outer // blocks.outer
    how = formulation_of(stack, x.dtype, rows, axis)
    product = Product(stack.format, how, swiglu, weight is not None)

    def used(i, total):
        return jnp.minimum(i, jnp.maximum(total[0] - 1, 0))

    def tile_at(i, j, expert, count, total):
        return expert[i], 0, jnp.where(i < total[0], j, steps - 1), 0

    def out_at(i, j, total):
        return jnp.where(i < total[0], i, items - 1), jnp.where(i < total[0], j, steps - 1)

    names, arrays, specs = ["values"], [stack.values], []
    specs.append(pl.BlockSpec((1, num, block, stack.values.shape[-1]), tile_at))
    scratch = {}
    if stack.format == "fp8":
        # Few numbers: those of the items' experts go to scalar memory.
        scales = e8m0.normal_value(stack.scale[expert])
        at = lambda i, j, expert, count, total: (used(i, total), 0, 0, 0)  # noqa: E731
        names.append("scale")
        arrays.append(scales)
        specs.append(pl.BlockSpec((1, *scales.shape[1:]), at, memory_space=pltpu.SMEM))
    if stack.format == "mxfp4":
        groups = stack.scale.shape[-1]
        names.append("scale")
        if scale_lies_across(groups):
            arrays.append(stack.scale.swapaxes(-1, -2))
            specs.append(
                pl.BlockSpec((1, num, groups, block), lambda *at: (*tile_at(*at)[:2], 0, tile_at(*at)[2]))
            )
        else:
            arrays.append(stack.scale)
            specs.append(pl.BlockSpec((1, num, block, groups), tile_at))
        if how == "decoded":
            names.append("spread")
            arrays.append(spreading(groups))
            specs.append(pl.BlockSpec((groups, width // 2), lambda *_: (0, 0)))
    if axis == "output":
        x_spec = pl.BlockSpec((1, rows, width), lambda i, j, expert, count, total: (used(i, total), 0, 0))
    else:
        x_spec = pl.BlockSpec(
            (1, num, rows, block),
            lambda i, j, expert, count, total: (
                used(i, total), 0, 0, jnp.where(i < total[0], j, steps - 1)
            ),
        )  # fmt: skip
    names.append("x")
    arrays.append(x)
    specs.append(x_spec)
    if weight is not None:
        names.append("weight")
        arrays.append(weight[..., None])
        specs.append(pl.BlockSpec((1, rows, 1), lambda i, j, expert, count, total: (used(i, total), 0, 0)))
    if axis == "input":
        body, name = _input_body, "grouped_matmul_input"
        out_shape = jax.ShapeDtypeStruct((items, rows, width), jnp.float32)
        out_spec = pl.BlockSpec((1, rows, width), lambda i, j, e, c, total: (out_at(i, j, total)[0], 0, 0))
    elif swiglu is not None:
        body, name = _output_body, "grouped_matmul_swiglu"
        out_shape = jax.ShapeDtypeStruct((items, rows, outer), x.dtype)
        out_spec = pl.BlockSpec(
            (1, rows, block), lambda i, j, e, c, total: (out_at(i, j, total)[0], 0, out_at(i, j, total)[1])
        )
    else:
        body, name = _output_body, "grouped_matmul_output"
        out_shape = jax.ShapeDtypeStruct((items, num, rows, outer), jnp.float32)
        out_spec = pl.BlockSpec(
            (1, num, rows, block),
            lambda i, j, e, c, total: (out_at(i, j, total)[0], 0, 0, out_at(i, j, total)[1]),
        )
    if how == "decoded":
        scratch["decoded"] = pltpu.VMEM((block, width), x.dtype)
    if how == "masked rows":
        scratch["sums"] = pltpu.VMEM((num, rows, block), jnp.float32)
        wide = (rows // ROWS_AT_ONCE, width // (2 * LANES), ROWS_AT_ONCE * SUBLANES, 2 * LANES)
        scratch["wide"] = pltpu.VMEM(wide, x.dtype)
        scratch["plain_rows"] = pltpu.VMEM((rows, width), jnp.float32)
    matrix_bytes = num * block * (stack.values.shape[-1] * stack.values.dtype.itemsize) * steps
    return pl.pallas_call(
        functools.partial(body, names=[*names, "out", *scratch], product=product),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(items, steps),
            in_specs=specs,
            out_specs=out_spec,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * items * rows * num * outer * width,
            transcendentals=0 if swiglu is None else items * rows * outer,
            bytes_accessed=items * matrix_bytes + x.nbytes + out_shape.size * out_shape.dtype.itemsize,
        ),
        interpret=interpret,
        name=name,
    )(expert, count, total, *arrays)


def _weights_body(expert, total, d_ref, x_ref, out_ref, sums_ref) -> None:
    item, items = pl.program_id(3), pl.num_programs(3)
    here = expert[item]

    @pl.when((item == 0) | (expert[jnp.maximum(item - 1, 0)] != here))
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(item < total[0])
    def _add() -> None:
        sums_ref[...] += _dot(d_ref[0, 0], x_ref[0], 0, 0)

    @pl.when((item == items - 1) | (expert[jnp.minimum(item + 1, items - 1)] != here))
    def _finish() -> None:
        out_ref[0, 0] = sums_ref[...].astype(out_ref.dtype)


def grouped_weight_gradient(
    d: Float[Array, "items M rows N"],
    x: Float[Array, "items rows K"],
    expert: Int32[Array, " items"],
    total: Int32[Array, "1"],
    *,
    num_experts: int,
    blocks: ItemBlocks,
    dtype: jax.typing.DTypeLike,
    interpret,
) -> Float[Array, "E M N K"]:
    """sum over each expert's items, in their order, of d^T x; every expert has an item, unused rows are 0."""
    items, num, rows, outer = d.shape
    width = x.shape[-1]
    grid = (num, outer // blocks.outer, width // blocks.inner, items)

    def used(i, total):
        return jnp.minimum(i, total[0] - 1)

    return pl.pallas_call(
        _weights_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                pl.BlockSpec(
                    (1, 1, rows, blocks.outer), lambda m, n, k, i, e, total: (used(i, total), m, 0, n)
                ),
                pl.BlockSpec((1, rows, blocks.inner), lambda m, n, k, i, e, total: (used(i, total), 0, k)),
            ],
            out_specs=pl.BlockSpec(
                (1, 1, blocks.outer, blocks.inner), lambda m, n, k, i, expert, total: (expert[i], m, n, k)
            ),
            scratch_shapes=[pltpu.VMEM((blocks.outer, blocks.inner), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_experts, num, outer, width), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * items * num * rows * outer * width,
            transcendentals=0,
            bytes_accessed=d.nbytes * grid[2]
            + x.nbytes * num * grid[1]
            + num_experts * num * outer * width * jnp.dtype(dtype).itemsize,
        ),
        interpret=interpret,
        name="grouped_matmul_weights",
    )(expert, total, d, x)
