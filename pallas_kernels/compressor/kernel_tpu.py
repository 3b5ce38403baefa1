"""Mosaic TPU kernels for `compressor`: forward, and backward by recomputing the softmax of each block.

Layout: channels sit on the 128 lanes and tokens on the sublanes, as the projections leave them. Rows that are
pooled together are a leading index, f32[entries, rows, Dc], so that pooling reduces over sublanes.

Overlapping blocks (w = 2) are taken in pairs of 2 m rows, which for m = 4 are the 8 sublanes of a register:

    rows of pair k      branch 1         branch 0 of pair k     branch 0 of pair k-1
    0 .. m-1            block 2k         block 2k               block 2k-2
    m .. 2m-1           block 2k+1       block 2k+1             block 2k-1

The 2 m rows of entry 2k (even) are the upper half of the first column and the lower half of the third, those
of entry 2k+1 (odd) the upper half of the second and the lower half of the first: one select each, no
row moves, and the softmax does not mind the order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.compressor.tuning import HALO_ROWS, VMEM_LIMIT, CompressorBlocks

ROW = 1  # the axis of the rows that are pooled together in f32[entries, rows, Dc]


class Static(NamedTuple):
    """What the bodies know when they are compiled."""

    ratio: int
    branches: int
    width: int
    num_entries: int
    eps: float


# --- the maths of one tile, shared by both kernels -----------------------------------------------------


class _Rows(NamedTuple):
    """What some of a tile's entries are pooled from: all entries, or the even or the odd ones."""

    values: Float32[Array, "entries rows Dc"]
    logits: Float32[Array, "entries rows Dc"]


def _gather(static: Static, tile: jax.Array, kv_ref, gate_ref, ape_ref, first_ref, halo_refs) -> list[_Rows]:
    """[all entries] for one branch, [even entries, odd entries] for two."""
    rows, ratio, width = kv_ref.shape[0], static.ratio, static.width
    has_tail = static.num_entries % (rows // ratio) != 0
    real = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < static.num_entries * ratio - tile * rows

    def groups(ref, branch: int) -> jax.Array:
        x = ref[:, branch * width : (branch + 1) * width].astype(jnp.float32)
        if has_tail:  # rows behind the last entry are arbitrary, and no zero weight removes a NaN
            x = jnp.where(real, x, 0.0)
        size = ratio * static.branches
        return x.reshape(rows // size, size, width)

    if static.branches == 1:
        return [_Rows(groups(kv_ref, 0), groups(gate_ref, 0) + ape_ref[...][None])]

    def even_and_odd(ref, halo_ref) -> tuple[jax.Array, jax.Array]:
        own, before = groups(ref, 1), groups(ref, 0)
        # The rows before the first tile do not exist; what was read for them is arbitrary.
        halo = halo_ref[...].astype(jnp.float32)[HALO_ROWS - 2 * ratio :]
        halo = jnp.where(tile > 0, halo, 0.0)[None]
        upper = _upper_half(own.shape)
        shifted = jnp.concatenate([halo, before[:-1]], axis=0)
        return jnp.where(upper, own, shifted), jnp.where(upper, before, own)

    bias_before, bias_own = ape_ref[:, :width], ape_ref[:, width:]
    biases = [bias_own, bias_before], [bias_before, bias_own]
    first = first_ref[...].reshape(-1, 2, 1, 1)
    views = []
    for odd, (values, gate) in enumerate(
        zip(even_and_odd(kv_ref, halo_refs[0]), even_and_odd(gate_ref, halo_refs[1]), strict=True)
    ):
        is_own = _upper_half(values.shape) if odd == 0 else ~_upper_half(values.shape)
        absent = (jnp.broadcast_to(first[:, odd], values.shape) != 0) & ~is_own
        logits = gate + jnp.concatenate(biases[odd], axis=0)[None]
        views.append(_Rows(jnp.where(absent, 0.0, values), jnp.where(absent, -jnp.inf, logits)))
    return views


def _upper_half(shape: tuple[int, ...]) -> jax.Array:
    """bool of `shape`: whether a row is one of the first half."""
    return lax.broadcasted_iota(jnp.int32, shape, ROW) < shape[ROW] // 2


def _pool(view: _Rows) -> tuple[jax.Array, jax.Array]:
    """Entries f32[entries, 1, Dc], and the softmax weights of their rows."""
    shares = jnp.exp(view.logits - view.logits.max(axis=ROW, keepdims=True))
    scale = 1.0 / shares.sum(axis=ROW, keepdims=True)  # one division an entry and channel, not one a row
    return (shares * view.values).sum(axis=ROW, keepdims=True) * scale, shares * scale


def _in_order(pooled: list[jax.Array]) -> jax.Array:
    """f32[entries, Dc] of all views."""
    if len(pooled) == 1:
        return pooled[0][:, 0]
    return jnp.concatenate(pooled, axis=ROW).reshape(-1, pooled[0].shape[-1])


def _by_view(x: jax.Array, num_views: int) -> list[jax.Array]:
    """The inverse of `_in_order`."""
    x = x.reshape(-1, num_views, x.shape[-1])
    return [x[:, view : view + 1] for view in range(num_views)]


def _rounded_and_scale(pooled: jax.Array, dtype: jnp.dtype, eps: float) -> tuple[jax.Array, jax.Array]:
    """The entries [entries, Dc] rounded to the compute dtype, and 1 / their root mean square [entries, 1]."""
    rounded = pooled.astype(dtype).astype(jnp.float32)
    return rounded, lax.rsqrt(jnp.mean(rounded * rounded, axis=1, keepdims=True) + eps)


def _swap_pairs(x: jax.Array) -> jax.Array:
    """Channels 2j and 2j + 1 exchanged."""
    width = x.shape[1]
    is_even = lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    return jnp.where(is_even, pltpu.roll(x, width - 1, 1), pltpu.roll(x, 1, 1))


# --- bodies --------------------------------------------------------------------------------------------


def _forward_body(*refs, static: Static) -> None:
    kv_ref, gate_ref, ape_ref, norm_ref, cos_ref, sin_ref, *overlap_refs, entry_ref = refs
    first_ref, *halo_refs = overlap_refs or [None]
    views = _gather(static, pl.program_id(1), kv_ref, gate_ref, ape_ref, first_ref, halo_refs)
    pooled = _in_order([_pool(view)[0] for view in views])
    rounded, scale = _rounded_and_scale(pooled, entry_ref.dtype, static.eps)
    entry = rounded * scale * norm_ref[...]

    # y = cos * x + sin * swap(x) on the last lanes; sin carries the sign of the pair's first channel.
    passed = static.width - cos_ref.shape[1]
    turned = entry[:, passed:]
    turned = cos_ref[...] * turned + sin_ref[...] * _swap_pairs(turned)
    if passed:
        entry_ref[:, :passed] = entry[:, :passed].astype(entry_ref.dtype)
    entry_ref[:, passed:] = turned.astype(entry_ref.dtype)


def _backward_body(*refs, static: Static) -> None:
    """Tiles run from the last to the first: each hands on what it owes the pair of blocks before it."""
    kv_ref, gate_ref, ape_ref, norm_ref, cos_ref, sin_ref, d_entry_ref, *refs = refs
    carry_ref = refs.pop() if static.branches == 2 else None
    *overlap_refs, d_kv_ref, d_gate_ref, d_ape_ref, d_norm_ref = refs
    first_ref, *halo_refs = overlap_refs or [None]
    tile = pl.num_programs(1) - 1 - pl.program_id(1)

    @pl.when(pl.program_id(1) == 0)
    def _start() -> None:
        d_ape_ref[...] = jnp.zeros_like(d_ape_ref)
        d_norm_ref[...] = jnp.zeros_like(d_norm_ref)
        if carry_ref is not None:
            carry_ref[...] = jnp.zeros_like(carry_ref)  # no block follows the last one

    views = _gather(static, tile, kv_ref, gate_ref, ape_ref, first_ref, halo_refs)
    pooled, weights = zip(*[_pool(view) for view in views], strict=True)
    rounded, scale = _rounded_and_scale(_in_order(pooled), kv_ref.dtype, static.eps)
    d_normed = _d_normed(static, tile, d_entry_ref, cos_ref, sin_ref)

    # entry = rounded * scale * norm;  d scale / d rounded = -scale^3 rounded / Dc
    d_norm_ref[...] += (d_normed * rounded * scale).sum(axis=0, keepdims=True)
    d_scaled = d_normed * norm_ref[...]
    towards = jnp.mean(d_scaled * rounded, axis=1, keepdims=True)
    d_pooled = _by_view(scale * d_scaled - scale * scale * scale * towards * rounded, len(views))

    # pooled = sum_j weight_j value_j;  d weight_j / d logit_j adds value_j - pooled
    d_values = [w * d for w, d in zip(weights, d_pooled, strict=True)]
    d_logits = [d * (v.values - p) for d, v, p in zip(d_values, views, pooled, strict=True)]
    if static.branches == 1:
        d_ape_ref[...] += d_logits[0].sum(axis=0)
        d_kv_ref[...] = d_values[0].reshape(d_kv_ref.shape).astype(d_kv_ref.dtype)
        d_gate_ref[...] = d_logits[0].reshape(d_gate_ref.shape).astype(d_gate_ref.dtype)
        return

    ratio, width = static.ratio, static.width
    even, odd = (d.sum(axis=0) for d in d_logits)
    d_ape_ref[:, :width] += odd[:ratio] + even[ratio:]
    d_ape_ref[:, width:] += even[:ratio] + odd[ratio:]
    for index, (ref, (even, odd)) in enumerate(((d_kv_ref, d_values), (d_gate_ref, d_logits))):
        # The lower half of an even entry's rows belongs to the pair before.
        following = jnp.concatenate([even[1:], carry_ref[index][None]], axis=0)
        carry_ref[index] = even[0]
        upper = _upper_half(even.shape)
        own, before = jnp.where(upper, even, odd), jnp.where(upper, odd, following)
        ref[:, :width] = before.reshape(ref.shape[0], width).astype(ref.dtype)
        ref[:, width:] = own.reshape(ref.shape[0], width).astype(ref.dtype)


def _d_normed(static: Static, tile: jax.Array, d_entry_ref, cos_ref, sin_ref) -> jax.Array:
    """The cotangent of the normalised entries: the rotation undone, zeros behind the last entry."""
    entries = d_entry_ref.shape[0]
    passed = static.width - cos_ref.shape[1]
    d_entry = d_entry_ref[...].astype(jnp.float32)
    d_turned = d_entry[:, passed:]
    d_turned = cos_ref[...] * d_turned + _swap_pairs(sin_ref[...] * d_turned)
    d_normed = jnp.concatenate([d_entry[:, :passed], d_turned], axis=1) if passed else d_turned
    if static.num_entries % entries:
        row = tile * entries + lax.broadcasted_iota(jnp.int32, d_normed.shape, 0)
        d_normed = jnp.where(row < static.num_entries, d_normed, 0.0)
    return d_normed


# --- calls ---------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """The kernels' inputs; T' >= m P rows, of which the first m P are blocks in a row.

    Attributes:
        cos, sin: f32[B, P, R], the factors of a channel and of its pair's other channel on the last R lanes.
        first: i32[B, P, 1, 1], not 0 where an entry has no block before it; None for one branch.
    """

    kv: Float[Array, "B T wDc"]
    gate: Float[Array, "B T wDc"]
    ape: Float32[Array, "m wDc"]
    norm: Float32[Array, "1 Dc"]
    cos: Float32[Array, "B P lanes"]
    sin: Float32[Array, "B P lanes"]
    first: Int32[Array, "B P 1 1"] | None


def _specs(o: Operands, static: Static, blocks: CompressorBlocks, tile_of) -> dict[str, pl.BlockSpec]:
    """How each operand is cut; `tile_of` maps the second grid index to a tile of entries."""
    rows, channels = blocks.entries * static.ratio, static.branches * static.width
    whole = lambda shape: pl.BlockSpec(shape, lambda b, i: (0,) * len(shape))  # noqa: E731
    per_entry = lambda lanes: pl.BlockSpec((None, blocks.entries, lanes), lambda b, i: (b, tile_of(i), 0))  # noqa: E731
    return {
        "rows": pl.BlockSpec((None, rows, channels), lambda b, i: (b, tile_of(i), 0)),
        # The end of the tile before; the first tile reads its own start and ignores it.
        "halo": pl.BlockSpec(
            (None, HALO_ROWS, static.width),
            lambda b, i: (b, jnp.maximum(tile_of(i) * (rows // HALO_ROWS) - 1, 0), 0),
        ),
        "ape": whole(o.ape.shape),
        "norm": whole(o.norm.shape),
        "table": per_entry(o.cos.shape[-1]),
        "first": pl.BlockSpec((None, blocks.entries, 1, 1), lambda b, i: (b, tile_of(i), 0, 0)),
        "entry": per_entry(static.width),
        "d_ape": pl.BlockSpec((None, *o.ape.shape), lambda b, i: (b, 0, 0)),
        "d_norm": pl.BlockSpec((None, *o.norm.shape), lambda b, i: (b, 0, 0)),
    }


def _overlap(o: Operands) -> tuple[list[str], list[jax.Array]]:
    """Names of the specs, and operands, that only two branches need."""
    return ([], []) if o.first is None else (["first", "halo", "halo"], [o.first, o.kv, o.gate])


def _cost(
    o: Operands, static: Static, blocks: CompressorBlocks, *, passes: int, flops: int
) -> pl.CostEstimate:
    """`passes` over kv or gate, and `flops` for each of their numbers; see Cost in `op.compressor`."""
    entries = o.kv.shape[0] * static.num_entries
    numbers = entries * static.ratio * static.branches * static.width
    halos = o.kv.shape[0] * cdiv(static.num_entries, blocks.entries) if static.branches == 2 else 0
    moved = passes * numbers + entries * static.width + 2 * HALO_ROWS * static.width * halos
    return pl.CostEstimate(
        flops=flops * numbers,
        transcendentals=numbers,
        bytes_accessed=o.kv.dtype.itemsize * moved + o.cos.nbytes + o.sin.nbytes,
    )


def compressor_forward(
    o: Operands, *, static: Static, blocks: CompressorBlocks, interpret
) -> Float[Array, "B P Dc"]:
    """The entries of all complete blocks."""
    specs = _specs(o, static, blocks, lambda i: i)
    names, extra = _overlap(o)
    batch = o.kv.shape[0]
    return pl.pallas_call(
        functools.partial(_forward_body, static=static),
        grid=(batch, cdiv(static.num_entries, blocks.entries)),
        in_specs=[specs[n] for n in ("rows", "rows", "ape", "norm", "table", "table", *names)],
        out_specs=specs["entry"],
        out_shape=jax.ShapeDtypeStruct((batch, static.num_entries, static.width), o.kv.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(o, static, blocks, passes=2, flops=7),
        interpret=interpret,
        name="compressor_forward",
    )(*o[:6], *extra)


def compressor_backward(
    d_entry: Float[Array, "B P Dc"], o: Operands, *, static: Static, blocks: CompressorBlocks, interpret
) -> tuple[jax.Array, jax.Array, Float32[Array, "B m wDc"], Float32[Array, "B 1 Dc"]]:
    """(d_kv, d_gate) of the m P rows in blocks, and (d_ape, d_norm) of every row of the batch."""
    tiles = cdiv(static.num_entries, blocks.entries)
    specs = _specs(o, static, blocks, lambda i: tiles - 1 - i)
    names, extra = _overlap(o)
    batch = o.kv.shape[0]
    rows = (batch, static.num_entries * static.ratio, static.branches * static.width)
    carry = pltpu.VMEM((2, 2 * static.ratio, static.width), jnp.float32)  # for kv and gate
    return pl.pallas_call(
        functools.partial(_backward_body, static=static),
        grid=(batch, tiles),
        in_specs=[specs[n] for n in ("rows", "rows", "ape", "norm", "table", "table", "entry", *names)],
        out_specs=[specs[n] for n in ("rows", "rows", "d_ape", "d_norm")],
        out_shape=[
            jax.ShapeDtypeStruct(rows, o.kv.dtype),
            jax.ShapeDtypeStruct(rows, o.gate.dtype),
            jax.ShapeDtypeStruct((batch, *o.ape.shape), jnp.float32),
            jax.ShapeDtypeStruct((batch, *o.norm.shape), jnp.float32),
        ],
        scratch_shapes=[carry] if static.branches == 2 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(o, static, blocks, passes=4, flops=13),
        interpret=interpret,
        name="compressor_backward",
    )(*o[:6], d_entry, *extra)
