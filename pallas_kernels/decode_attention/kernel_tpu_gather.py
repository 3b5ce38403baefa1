"""Mosaic TPU kernel of `decode_attention` that fetches the chosen entries of each query, one copy a row.

Layout: one query a grid step, its heads are the rows. A row of 32-bit numbers can be copied on its own; rows
of bfloat16 are stored as pairs in 32-bit words, so the pair (2i, 2i + 1) comes whole, as one row of words,
and the half that was chosen is taken from it. Of fp8 entries come a row of words and a row that seven share
(`entry_rows`); decoded, their channels stand in another order, so the query, the ring and the result are
turned to it and back by products with a permutation, which are exact. The cache stays where and as it is.

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

from pallas_kernels.arithmetic import cdiv, quotient
from pallas_kernels.decode_attention import online_softmax, stored, visibility
from pallas_kernels.decode_attention.online_softmax import Softmax
from pallas_kernels.decode_attention.tuning import LANES, VMEM_LIMIT, Geometry
from pallas_kernels.formats import entry_rows


def rows_a_copy(dtype: jnp.dtype) -> int:
    """Rows that lie in one row of 32-bit words."""
    return 4 // jnp.dtype(dtype).itemsize


def chosen_rows(words: jax.Array, place: jax.Array) -> jax.Array:
    """The chosen half of every word, bf16[K, Dh] from u32[K, Dh] and place i32[K, Dh], 0 or 1."""
    # A float32 whose upper half are the bits of a bfloat16 is that number.
    bits = jnp.where(place == 1, words & jnp.uint32(0xFFFF0000), words << 16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def along_lanes(row: jax.Array, width: int) -> jax.Array:
    """i32[K, width] from i32[1, K]: every lane of a row holds its number."""
    count = row.shape[1]
    by_row = jnp.broadcast_to(row, (LANES, count)).T
    return jnp.tile(by_row, (1, cdiv(width, LANES)))[:, :width]


def _body(
    g: Geometry,
    layout: entry_rows.Layout | None,
    repeat_ref,
    first_refs,
    next_refs,
    q_ref,
    view_ref,
    sink_ref,
    place_ref,
    entries_refs,
    order_refs,
    ring_refs,
    o_ref,
    lse_ref,
    fetched_refs,
    arrived,
) -> None:
    step, steps = pl.program_id(1), pl.num_programs(1)
    first = pl.program_id(0) * steps  # query of this part
    num_chunks, chunk_rows, _ = fetched_refs[0].shape
    dtype = q_ref.dtype
    in_words = [ref.bitcast(jnp.uint32) if ref.dtype == jnp.bfloat16 else ref for ref in entries_refs]

    def start(row_refs, of_query: jax.Array, chunk) -> None:
        """The copies of a chunk of a query."""
        sequence = quotient(of_query, g.queries)
        for k in range(chunk_rows):
            for words, row_ref, fetched_ref in zip(in_words, row_refs, fetched_refs, strict=True):
                row = row_ref[0, 0, chunk * chunk_rows + k]
                pltpu.make_async_copy(
                    words.at[repeat_ref[0], sequence].at[pl.ds(row, 1)],
                    fetched_ref.at[chunk, pl.ds(k, 1)],
                    arrived.at[chunk],
                ).start()

    def wait(chunk: int) -> None:
        """For all rows of a chunk at once: a semaphore counts bytes."""
        for fetched_ref in fetched_refs:
            rows = fetched_ref.at[chunk]
            pltpu.make_async_copy(rows, rows, arrived.at[chunk]).wait()

    def in_order(x: jax.Array) -> jax.Array:
        """Channels in the order of the keys. One term of every sum is not zero: exact."""
        for order_ref in order_refs:
            x = online_softmax.dot(x, order_ref[...], transposed=False).astype(dtype)
        return x

    def decoded(chunk: int, place: jax.Array) -> jax.Array:
        """The keys of a chunk, finite also where nothing was chosen and entry 0 was fetched."""
        place = jnp.maximum(place, 0)
        words, *rest = (ref[chunk] for ref in fetched_refs)
        if layout is not None:
            words, rest = (pltpu.bitcast(x, jnp.int32) for x in (words, *rest))
            own = entry_rows.own_words(rest, along_lanes(place, layout.row), layout)
            return entry_rows.planes(words, own, layout).astype(dtype)
        return words if words.dtype == dtype else chosen_rows(words, along_lanes(place, g.width))

    q = in_order(q_ref[0])

    def attend(state: Softmax, tile: visibility.Visible) -> Softmax:
        (state,) = online_softmax.attend([state], [q], [[tile]])
        return state

    @pl.when(step == 0)
    def _():
        @pl.loop(0, num_chunks)
        def _(chunk):
            start(first_refs, first, chunk)

    ring = in_order(stored.decoded_ring([ref[0] for ref in ring_refs], dtype))
    state = attend(online_softmax.from_sink(sink_ref[...], 1), visibility.ring_tile(ring, view_ref[0]))
    following = first + jnp.minimum(step + 1, steps - 1)
    for chunk in range(num_chunks):
        wait(chunk)
        place = place_ref[0, chunk : chunk + 1]
        state = attend(state, visibility.Visible(decoded(chunk, place), place >= 0))
        # The last step has no next query and starts its own again, for nobody: a condition here would part
        # the copies from the arithmetic.
        start(next_refs, following, chunk)
    o, lse = online_softmax.results(state)
    o = o.astype(dtype)
    for order_ref in order_refs:
        o = online_softmax.dot(o, order_ref[...], transposed=True).astype(dtype)
    o_ref[0], lse_ref[0] = o, lse

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
    entries: jax.Array | entry_rows.Fp8Rows,
    index: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """o[B * T, H, Dh] and lse f32[B * T, 1, H].

    Args:
        q: [B * T, H, Dh]; view: i32[B * T, 1, 4], see `visibility.views`; ring: [R, B, M, Dh] or fp8;
        sink: f32[H, 1]; repeat: i32[1]; entries: [R, B, S, Dh] in the dtype of q, or rows of fp8;
        index: i32[B * T, chunks, chunk] in -1 .. S - 1, chunk a multiple of LIST_ROWS.
    """
    queries, num_chunks, chunk = index.shape
    count = num_chunks * chunk
    entry = jnp.maximum(index, 0).reshape(queries, 1, count)
    if isinstance(entries, entry_rows.Fp8Rows):
        layout, sources, words = entries.layout, (entries.words, entries.rest), jnp.uint32
        together = layout.entries_a_row
        rows = (entry, quotient(entry, together))
        # Products with it put channels in the order of the planes, or back.
        orders = (
            (jnp.arange(g.width, dtype=jnp.int32)[:, None] == entry_rows.plane_order(layout)).astype(q.dtype),
        )
    else:
        layout, sources, orders = None, (entries,), ()
        together = rows_a_copy(q.dtype)
        words = jnp.float32 if together == 1 else jnp.uint32
        rows = (quotient(entry, together),)
    place = jnp.where(index < 0, -1, index % together)

    parts = 2 if queries % 2 == 0 else 1
    steps = queries // parts

    def per_query(*shape):
        return pl.BlockSpec((1, *shape), lambda p, i, _: (p * steps + i, *(0 for _ in shape)))

    def of_step(step):
        return pl.BlockSpec(
            (1, 1, count), lambda p, i, _: (p * steps + step(i), 0, 0), memory_space=pltpu.SMEM
        )

    def own_ring(part):
        def at(p, i, repeat):
            return repeat[0], quotient(p * steps + i, g.queries), 0, 0

        return pl.BlockSpec((None, 1, *part.shape[2:]), at)

    rings = stored.ring_parts(ring)
    keys = queries * (g.slots + count)
    copied = queries * count * sum(x.shape[-1] for x in sources) * 4
    return pl.pallas_call(
        functools.partial(_body, g, layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(parts, steps),
            in_specs=[
                tuple(of_step(lambda i: 0) for _ in rows),
                tuple(of_step(lambda i: jnp.minimum(i + 1, steps - 1)) for _ in rows),
                per_query(g.heads, g.width),
                per_query(1, 4),
                pl.BlockSpec((g.heads, 1), lambda p, i, _: (0, 0)),
                per_query(num_chunks, chunk),
                tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in sources),
                tuple(pl.BlockSpec(x.shape, lambda p, i, _: (0, 0)) for x in orders),
                tuple(own_ring(part) for part in rings),
            ],
            out_specs=[per_query(g.heads, g.width), per_query(1, g.heads)],
            scratch_shapes=[
                [pltpu.VMEM((num_chunks, chunk, x.shape[-1]), words) for x in sources],
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
            bytes_accessed=(2 * q.size + queries * g.slots * g.width) * g.itemsize + copied,
        ),
        interpret=interpret,
        name="decode_attention_gather",
    )(repeat, rows, rows, q, view, sink, place, sources, orders, rings)
