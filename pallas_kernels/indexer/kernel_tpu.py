"""Mosaic TPU kernels of the indexer: scores, and scores followed by the exact choice of k.

Layout: queries are rows. A step multiplies the heads of its queries, [queries * Hi, Di], with a tile of keys,
so the [Hi, T, S] products live in VMEM only. The selection keeps a row's scores as ordered int32 keys in
VMEM, entries on the lanes, and finds the k-th largest by counting, one bit a pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv, round_up
from pallas_kernels.indexer.tuning import IndexerBlocks

NOT_ELIGIBLE = -(2**31)  # below the ordered key of every score


def products(q, keys):
    """f32[queries * Hi, keys]: q . k of every head with every key."""
    exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    rows = q.reshape(-1, q.shape[-1])
    return lax.dot_general(
        rows, keys, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def scores_of(q_ref, weights_ref, keys_ref, blocks: IndexerBlocks):
    """f32[rows, keys]: sum_h w_h relu(q_h . k_s), each sequence's queries with its own keys."""
    tiles = []
    for b in range(blocks.sequences):
        own = slice(b * blocks.queries, (b + 1) * blocks.queries)
        dots = products(q_ref[own], keys_ref[b]).reshape(blocks.queries, -1, blocks.keys)
        tiles.append((jnp.maximum(dots, 0) * weights_ref[own][..., None]).sum(axis=1))
    return jnp.concatenate(tiles, axis=0)


def visible_in(lo_ref, hi_ref, first, blocks: IndexerBlocks):
    """bool[rows, keys]: which keys of the tile that starts at entry `first` each row sees."""
    s = first + lax.broadcasted_iota(jnp.int32, (blocks.rows, blocks.keys), 1)
    return (s >= lo_ref[...]) & (s < hi_ref[...])


def _scores_body(q_ref, weights_ref, keys_ref, lo_ref, hi_ref, out_ref, *, blocks):
    visible = visible_in(lo_ref, hi_ref, pl.program_id(1) * blocks.keys, blocks)
    out_ref[...] = jnp.where(visible, scores_of(q_ref, weights_ref, keys_ref, blocks), -jnp.inf)


def _select_body(q_ref, weights_ref, keys_ref, lo_ref, hi_ref, mask_ref, *, blocks, k):
    # Until the last tile of a row has been scored, its mask holds the ordered keys.
    tile, first = pl.program_id(1), pl.program_id(1) * blocks.keys
    here = pl.ds(pl.multiple_of(first, blocks.keys), blocks.keys)

    @pl.when(first >= hi_ref[...].max())
    def _():  # beyond what any row of the block sees
        mask_ref[:, here] = jnp.full((blocks.rows, blocks.keys), NOT_ELIGIBLE, jnp.int32)

    @pl.when(first < hi_ref[...].max())
    def _():
        scores = scores_of(q_ref, weights_ref, keys_ref, blocks)
        visible = visible_in(lo_ref, hi_ref, first, blocks) & ~jnp.isnan(scores) & (scores > -jnp.inf)
        bits = lax.bitcast_convert_type(scores + 0.0, jnp.int32)  # + 0.0: -0 and 0 are one score
        keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        mask_ref[:, here] = jnp.where(visible, keys, NOT_ELIGIBLE)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        mask_ref[...] = k_largest(mask_ref[...], k).astype(jnp.int32)


def k_largest(keys, k: int):
    """bool[rows, S]: the k largest keys of each row above NOT_ELIGIBLE, ties to the lowest index."""

    def count(mask):
        return mask.astype(jnp.int32).sum(axis=1, keepdims=True)

    def refine_cut(step, cut):
        # The greatest cut with at least k keys at or above it, bit by bit; wraps from the lowest int32.
        higher = cut + lax.shift_left(jnp.int32(1), 31 - step)
        return jnp.where(count(keys >= higher) >= k, higher, cut)

    cut = lax.fori_loop(0, 32, refine_cut, jnp.full((keys.shape[0], 1), NOT_ELIGIBLE, jnp.int32))
    above = keys > cut
    level = (keys == cut) & (keys > NOT_ELIGIBLE)
    left = k - count(above)  # places for the keys at the cut: the first ones get them
    place = lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    num_bits = keys.shape[1].bit_length()

    def refine_end(step, end):
        # The greatest end with at most `left` level keys before it.
        further = end + lax.shift_left(jnp.int32(1), num_bits - 1 - step)
        return jnp.where(count(level & (place < further)) <= left, further, end)

    end = lax.fori_loop(0, num_bits, refine_end, jnp.zeros_like(cut))
    return above | (level & (place < end))


def _operand_specs(heads, width, tiles_per_sequence, blocks):
    """q, weights, keys, lo, hi over a grid of (blocks of rows, tiles of keys)."""
    per_row = lambda *shape: pl.BlockSpec((blocks.rows, *shape), lambda r, s: (r, *(0 for _ in shape)))  # noqa: E731
    own_keys = lambda r, s: (lax.div(r, tiles_per_sequence), s, 0)  # noqa: E731
    keys = pl.BlockSpec((blocks.sequences, blocks.keys, width), own_keys)
    return [per_row(heads, width), per_row(heads), keys, per_row(1), per_row(1)]


def _sizes(q, keys, blocks):
    (num_rows, heads, width), (batch, size, _) = q.shape, keys.shape
    grid = (num_rows // blocks.rows, cdiv(size, blocks.keys))
    tiles_per_sequence = grid[0] * blocks.sequences // batch
    return num_rows, heads, width, size, grid, tiles_per_sequence


def _cost(num_rows, heads, width, size, itemsize, keys_read, out_bytes):
    return pl.CostEstimate(
        flops=2 * num_rows * size * heads * (width + 1),
        transcendentals=0,
        bytes_accessed=itemsize * (num_rows * heads * width + keys_read) + 4 * num_rows * heads + out_bytes,
    )


def index_scores_fwd(q, weights, keys, lo, hi, *, blocks: IndexerBlocks, interpret) -> jax.Array:
    """f32[rows, S] for q [rows, Hi, Di], weights [rows, Hi], keys [B, S, Di], lo and hi [rows, 1]."""
    num_rows, heads, width, size, grid, tiles = _sizes(q, keys, blocks)
    return pl.pallas_call(
        functools.partial(_scores_body, blocks=blocks),
        grid=grid,
        in_specs=_operand_specs(heads, width, tiles, blocks),
        out_specs=pl.BlockSpec((blocks.rows, blocks.keys), lambda r, s: (r, s)),
        out_shape=jax.ShapeDtypeStruct((num_rows, size), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=_cost(
            num_rows, heads, width, size, q.dtype.itemsize, grid[0] * size * width, 4 * num_rows * size
        ),
        interpret=interpret,
        name="index_scores_fwd",
    )(q, weights, keys, lo, hi)


def index_select_fwd(q, weights, keys, lo, hi, *, k: int, blocks: IndexerBlocks, interpret) -> jax.Array:
    """i32[rows, S]: 1 where chosen; operands as in `index_scores_fwd`."""
    num_rows, heads, width, size, grid, tiles = _sizes(q, keys, blocks)
    padded = round_up(size, blocks.keys)
    needed = blocks.vmem_bytes(heads, width, size, q.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(_select_body, blocks=blocks, k=k),
        grid=grid,
        in_specs=_operand_specs(heads, width, tiles, blocks),
        out_specs=pl.BlockSpec((blocks.rows, padded), lambda r, s: (r, 0)),
        out_shape=jax.ShapeDtypeStruct((num_rows, padded), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=max(2 * needed, 16 * 2**20)
        ),
        cost_estimate=_cost(
            num_rows, heads, width, size, q.dtype.itemsize, grid[0] * size * width, 4 * num_rows * size
        ),
        interpret=interpret,
        name="index_select_fwd",
    )(q, weights, keys, lo, hi)[:, :size]
