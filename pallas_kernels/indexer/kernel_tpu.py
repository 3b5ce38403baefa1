"""Mosaic TPU kernel of the index scores, and the scoring of one tile that the selection shares.

Layout: queries are rows, keys are columns. The heads of a step's queries, [heads x queries, Di], meet a chunk
of keys at a time, so the [Hi, T, S] products live in registers only. A step takes the queries of one sequence
(prefill: products are laid out [heads, queries], and the sum over heads adds whole registers) or all the
queries of several sequences (decode: each sequence with its own keys).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv, quotient, round_up
from pallas_kernels.formats.blocks import Format
from pallas_kernels.formats.index_keys import format_of
from pallas_kernels.indexer import key_tiles
from pallas_kernels.indexer.tuning import LANES, IndexerBlocks


def scoring_scratch(heads: int, width: int, dtype, blocks: IndexerBlocks) -> list:
    """Of `Scoring`: each head's weight on every lane, and the queries with heads first."""
    spread = pltpu.VMEM((blocks.sequences, blocks.queries * heads, LANES), jnp.float32)
    reordered = pltpu.VMEM((heads * blocks.queries, width), dtype)
    return [spread, reordered] if blocks.heads_first else [spread]


class Scoring:
    """Scores one step's queries against tiles of keys."""

    def __init__(self, q_ref, weights_ref, key_refs, scratch, form: Format, blocks: IndexerBlocks) -> None:
        self.q, self.weights, self.keys = q_ref, weights_ref, key_refs
        self.spread, *self.reordered = scratch
        self.form, self.blocks = form, blocks

    def start(self) -> None:
        """Once a block of rows: lays out queries and weights in scratch."""
        blocks, heads = self.blocks, self.q.shape[1]
        if not blocks.heads_first:
            lanes = jnp.broadcast_to(self.weights[...][..., None], (blocks.rows, heads, LANES))
            self.spread[...] = lanes.reshape(self.spread.shape)
            return
        for h in range(heads):
            own = slice(h * blocks.queries, (h + 1) * blocks.queries)
            self.reordered[0][own] = self.q[:, h]
            self.spread[0, own] = jnp.broadcast_to(self.weights[:, h : h + 1], (blocks.queries, LANES))

    def sequence(self, b, here):
        """f32[queries, chunk]: sum_h w_h relu(q_h . k_s) of one sequence's queries and keys."""
        blocks, heads, width = self.blocks, *self.q.shape[1:]
        if blocks.heads_first:
            q = self.reordered[0][...]
        else:
            q = self.q[pl.ds(b * blocks.queries, blocks.queries)].reshape(-1, width)
        dots = key_tiles.tile_products(q, self.keys, b, here, self.form)
        weights = jnp.concatenate([self.spread[b]] * (blocks.chunk // LANES), axis=1)
        weighted = jnp.maximum(dots, 0) * weights
        if blocks.heads_first:
            scores = weighted.reshape(heads, blocks.queries, blocks.chunk).sum(axis=0)
        else:
            scores = weighted.reshape(blocks.queries, heads, blocks.chunk).sum(axis=1)
        scale = key_tiles.tile_scale(self.keys, b, here, self.form)
        return scores if scale is None else scores * scale

    def tile(self, first, end, emit) -> None:
        """Calls emit(rows, chunk of the tile, scores) for every chunk that begins before entry `end`.

        Args:
            first: entry at which the tile begins.
        """
        blocks = self.blocks
        num_chunks = chunks_before(end - first, blocks.keys, blocks.chunk)
        rows = blocks.group * blocks.queries

        @pl.loop(0, blocks.sequences // blocks.group)
        def _(group):
            own = slice(0, rows) if rows == blocks.rows else pl.ds(pl.multiple_of(group * rows, rows), rows)

            @pl.loop(0, num_chunks)
            def _(chunk):
                here = pl.ds(pl.multiple_of(chunk * blocks.chunk, blocks.chunk), blocks.chunk)
                found = [self.sequence(group * blocks.group + i, here) for i in range(blocks.group)]
                emit(own, chunk, jnp.concatenate(found, axis=0))


def chunks_before(end, size: int, chunk: int):
    """How many of the chunks of `size` entries begin before entry `end`."""
    return quotient(jnp.clip(end, 0, size) + (chunk - 1), chunk)


def visible_in(lo, hi, first, num_keys: int):
    """bool[rows, keys]: which of the keys from entry `first` on each row sees; lo and hi are [rows, 1]."""
    s = first + lax.broadcasted_iota(jnp.int32, (lo.shape[0], num_keys), 1)
    return (s >= lo) & (s < hi)


def _scores_body(repeat_ref, ends_ref, q_ref, weights_ref, *refs, form, blocks):
    del repeat_ref  # only the index maps need it
    key_refs, (lo_ref, hi_ref, out_ref, *scratch) = split_keys(refs, form)
    scoring = Scoring(q_ref, weights_ref, key_refs, scratch, form, blocks)
    tile, first = pl.program_id(1), pl.program_id(1) * blocks.keys
    pl.when(tile == 0)(scoring.start)
    out_ref[...] = jnp.full(out_ref.shape, -jnp.inf, jnp.float32)

    def emit(rows, chunk, scores):
        offset = pl.multiple_of(chunk * blocks.chunk, blocks.chunk)
        visible = visible_in(lo_ref[rows], hi_ref[rows], first + offset, blocks.chunk)
        out_ref[rows, pl.ds(offset, blocks.chunk)] = jnp.where(visible, scores, -jnp.inf)

    scoring.tile(first, ends_ref[pl.program_id(0)], emit)


def split_keys(refs, form: Format):
    """The refs of the keys, and those behind them."""
    num = 1 if form == "plain" else 2
    return refs[:num], refs[num:]


def scoring_call(
    body, q, weights, keys, lo, hi, repeat, *, blocks: IndexerBlocks, out_specs, scratch_shapes=(), **call
):
    """A `pl.pallas_call` over (blocks of rows, tiles of keys), with the operands every scoring kernel takes.

    The scalars a body gets first: the repeat, and for each block of rows the end of what any of them sees.
    Tiles past that end are not fetched again.

    Args:
        q, weights, lo, hi: [rows, Hi, Di], [rows, Hi], [rows, 1] twice; keys: a stack [R, B, S, Di].
        repeat: i32[], which keys of the stack.
        out_specs, scratch_shapes: of the body, behind the scratch of `Scoring`.
        call: `pl.pallas_call`'s out_shape, compiler_params, interpret, name.
    """
    (num_rows, heads, width), form = q.shape, format_of(keys)
    _, batch, size, _ = keys.shape
    num_blocks = num_rows // blocks.rows
    blocks_per_sequence = max(num_blocks * blocks.sequences // round_up(batch, blocks.sequences), 1)
    ends = jnp.minimum(hi.reshape(num_blocks, blocks.rows).max(axis=1), size)

    def per_row(*shape):
        return pl.BlockSpec((blocks.rows, *shape), lambda r, s, *_: (r, *(0 for _ in shape)))

    def own_keys(r, s, repeat, ends):
        last = jnp.maximum(quotient(ends[r] + (blocks.keys - 1), blocks.keys) - 1, 0)
        return repeat[0], quotient(r, blocks_per_sequence), jnp.minimum(s, last)

    return pl.pallas_call(
        functools.partial(body, form=form, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_blocks, cdiv(size, blocks.keys)),
            in_specs=[
                per_row(heads, width),
                per_row(heads),
                *key_tiles.block_specs(form, width, blocks.sequences, blocks.keys, own_keys),
                per_row(1),
                per_row(1),
            ],
            out_specs=out_specs,
            scratch_shapes=[*scoring_scratch(heads, width, q.dtype, blocks), *scratch_shapes],
        ),
        cost_estimate=_cost(q, keys, blocks_per_sequence, call["out_shape"]),
        **call,
    )(
        repeat.reshape(1),
        ends,
        key_tiles.in_key_order(q, form),
        weights,
        *key_tiles.operands(keys),
        lo,
        hi,
    )


def _cost(q, keys, blocks_per_sequence, out):
    """Every block of rows reads the keys of its sequences once."""
    (num_rows, heads, width), (repeats, _, size, _) = q.shape, keys.shape
    key_bytes = sum(part.nbytes for part in key_tiles.operands(keys)) // repeats
    return pl.CostEstimate(
        flops=2 * num_rows * size * heads * (width + 1),
        transcendentals=0,
        bytes_accessed=q.nbytes
        + 4 * num_rows * heads
        + key_bytes * blocks_per_sequence
        + out.size * out.dtype.itemsize,
    )


def index_scores_fwd(
    q, weights, keys, lo, hi, repeat, *, blocks: IndexerBlocks, vmem_limit: int, interpret
) -> jax.Array:
    """f32[rows, S]; operands as in `scoring_call`."""
    return scoring_call(
        _scores_body,
        *(q, weights, keys, lo, hi, repeat),
        blocks=blocks,
        out_specs=pl.BlockSpec((blocks.rows, blocks.keys), lambda r, s, *_: (r, s)),
        out_shape=jax.ShapeDtypeStruct((q.shape[0], keys.shape[-2]), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            # A block's tiles come in order: the first one lays out the queries.
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        interpret=interpret,
        name="index_scores_fwd",
    )
