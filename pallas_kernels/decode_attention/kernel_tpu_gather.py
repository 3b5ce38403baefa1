"""Mosaic TPU kernel of `decode_attention` that fetches the chosen entries of each query, one copy a row.

Layout: one query a grid step, its heads are the rows. A row of 32-bit numbers can be copied on its own; rows
of bfloat16 are stored as pairs in 32-bit words, so the pair (2i, 2i + 1) comes whole, as one row of words,
and the half that was chosen is taken from it. The cache stays where and as it is.

Starting the copies is most of the work, and it is work of the scalar unit alone. So a grid step goes through
its query's chunks in one piece of straight code: wait for the chunk, compute it, start the same chunk of the
next query into the same place. The compiler starts copies while it computes, and as every place is known to
it, a start costs little more than the address of its row.

Queries are cut into two parts for the two cores of a v5p. Elsewhere that costs one more list whose copies are
started with nothing beside them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.decode_attention import online_softmax, stored, visibility
from pallas_kernels.decode_attention.online_softmax import Softmax
from pallas_kernels.decode_attention.tuning import LANES, VMEM_LIMIT, Geometry


def rows_a_copy(dtype: jnp.dtype) -> int:
    """Rows that lie in one row of 32-bit words."""
    return 4 // jnp.dtype(dtype).itemsize


def chosen_rows(words: jax.Array, index: jax.Array) -> jax.Array:
    """The chosen half of every word, bf16[K, Dh] from u32[K, Dh] and index i32[1, K]."""
    count, width = words.shape
    by_row = jnp.broadcast_to(index, (LANES, count)).T  # [K, LANES]: every lane holds the row's index
    odd = jnp.tile(by_row & 1, (1, cdiv(width, LANES)))[:, :width]
    # A float32 whose upper half are the bits of a bfloat16 is that number.
    bits = jnp.where(odd == 1, words & jnp.uint32(0xFFFF0000), words << 16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _body(
    g: Geometry,
    repeat_ref,
    first_ref,
    next_ref,
    q_ref,
    view_ref,
    sink_ref,
    index_ref,
    entries_ref,
    *refs,
) -> None:
    *ring_refs, o_ref, lse_ref, fetched_ref, arrived = refs
    step, steps = pl.program_id(1), pl.num_programs(1)
    first = pl.program_id(0) * steps  # query of this part
    num_chunks, chunk_rows, _ = fetched_ref.shape
    words = entries_ref if entries_ref.dtype == jnp.float32 else entries_ref.bitcast(jnp.uint32)

    def start(row_ref, of_query: jax.Array, chunk) -> None:
        """The copies of a chunk of a query."""
        source = words.at[repeat_ref[0], jax.lax.div(of_query, g.queries)]
        for k in range(chunk_rows):
            row = row_ref[0, 0, chunk * chunk_rows + k]
            pltpu.make_async_copy(
                source.at[pl.ds(row, 1)], fetched_ref.at[chunk, pl.ds(k, 1)], arrived.at[chunk]
            ).start()

    def wait(chunk: int) -> None:
        """For all rows of a chunk at once: a semaphore counts bytes."""
        rows = fetched_ref.at[chunk]
        pltpu.make_async_copy(rows, rows, arrived.at[chunk]).wait()

    def attend(state: Softmax, tile: visibility.Visible) -> Softmax:
        (state,) = online_softmax.attend([state], [q_ref[0]], [[tile]])
        return state

    @pl.when(step == 0)
    def _():
        @pl.loop(0, num_chunks)
        def _(chunk):
            start(first_ref, first, chunk)

    ring = stored.decoded_ring([ref[0] for ref in ring_refs], q_ref.dtype)
    state = attend(online_softmax.from_sink(sink_ref[...], 1), visibility.ring_tile(ring, view_ref[0]))
    following = first + jnp.minimum(step + 1, steps - 1)
    for chunk in range(num_chunks):
        wait(chunk)
        index, keys = index_ref[0, chunk : chunk + 1], fetched_ref[chunk]
        if keys.dtype != q_ref.dtype:
            keys = chosen_rows(keys, index)
        state = attend(state, visibility.Visible(keys, index >= 0))
        # The last step has no next query and starts its own again, for nobody: a condition here would part
        # the copies from the arithmetic.
        start(next_ref, following, chunk)
    o, lse = online_softmax.results(state)
    o_ref[0], lse_ref[0] = o.astype(o_ref.dtype), lse

    @pl.when(step == steps - 1)
    def _():
        for chunk in range(num_chunks):
            wait(chunk)


def gather(
    g: Geometry,
    q: jax.Array,
    view: jax.Array,
    ring: stored.Entries,
    sink: jax.Array,
    repeat: jax.Array,
    entries: jax.Array,
    index: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """o[B * T, H, Dh] and lse f32[B * T, 1, H].

    Args:
        q: [B * T, H, Dh]; view: i32[B * T, 1, 4], see `visibility.views`; ring: [R, B, M, Dh] or fp8;
        sink: f32[H, 1]; repeat: i32[1]; entries: [R, B, S, Dh];
        index: i32[B * T, chunks, chunk] in -1 .. S - 1, chunk a multiple of LIST_ROWS.
    """
    (queries, num_chunks, chunk), together = index.shape, rows_a_copy(q.dtype)
    count = num_chunks * chunk
    row = jax.lax.div(jnp.maximum(index, 0), together).reshape(queries, 1, count)
    words = jnp.float32 if together == 1 else jnp.uint32

    parts = 2 if queries % 2 == 0 else 1
    steps = queries // parts

    def per_query(*shape):
        return pl.BlockSpec((1, *shape), lambda p, i, _: (p * steps + i, *(0 for _ in shape)))

    def rows(step):
        return pl.BlockSpec(
            (1, 1, count), lambda p, i, _: (p * steps + step(i), 0, 0), memory_space=pltpu.SMEM
        )

    def own_ring(part):
        def at(p, i, repeat):
            return repeat[0], jax.lax.div(p * steps + i, g.queries), 0, 0

        return pl.BlockSpec((None, 1, *part.shape[2:]), at)

    rings = stored.ring_parts(ring)
    keys = queries * (g.slots + together * count)
    return pl.pallas_call(
        functools.partial(_body, g),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(parts, steps),
            in_specs=[
                rows(lambda i: 0),
                rows(lambda i: jnp.minimum(i + 1, steps - 1)),
                per_query(g.heads, g.width),
                per_query(1, 4),
                pl.BlockSpec((g.heads, 1), lambda p, i, _: (0, 0)),
                per_query(num_chunks, chunk),
                pl.BlockSpec(memory_space=pl.ANY),
                *(own_ring(part) for part in rings),
            ],
            out_specs=[per_query(g.heads, g.width), per_query(1, g.heads)],
            scratch_shapes=[
                pltpu.VMEM((num_chunks, chunk, g.width), words),
                pltpu.SemaphoreType.DMA((num_chunks,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((queries, 1, g.heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,  # they cost more than the copies; `index` is clamped before
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * g.heads * keys * g.width,
            transcendentals=g.heads * keys,
            bytes_accessed=(2 * q.size + keys * g.width) * g.itemsize,
        ),
        interpret=interpret,
        name="decode_attention_gather",
    )(repeat, row, row, q, view, sink, index, entries, *rings)
