"""Mosaic TPU kernel of `decode_attention` that fetches the chosen entries of each query, one copy a row.

Layout: one query a grid step, its heads are the rows. A row of 32-bit numbers can be copied on its own; rows
of bfloat16 are stored as pairs in 32-bit words, so the pair (2i, 2i + 1) comes whole, as one row of words,
and the half that was chosen is taken from it. The cache stays where and as it is. While a query is worked on,
the rows of the next one are on their way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.decode_attention import online_softmax, stored, visibility
from pallas_kernels.decode_attention.tuning import LANES, ROWS_UNROLLED, VMEM_LIMIT, Geometry


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
    count: int,
    repeat_ref,
    own_ref,
    next_ref,
    q_ref,
    view_ref,
    sink_ref,
    index_ref,
    entries_ref,
    *refs,
) -> None:
    *ring_refs, o_ref, lse_ref, fetched_ref, arrived = refs
    step, num_steps = pl.program_id(0), pl.num_programs(0)
    slot = jax.lax.rem(step, 2)
    words = entries_ref if entries_ref.dtype == jnp.float32 else entries_ref.bitcast(jnp.uint32)

    def fetch(of_step: jax.Array, row_ref, into: jax.Array) -> None:
        source = words.at[repeat_ref[0], jax.lax.div(of_step, g.queries)]

        @pl.loop(0, count // ROWS_UNROLLED)
        def _(chunk):
            for k in range(ROWS_UNROLLED):
                row = row_ref[0, 0, chunk * ROWS_UNROLLED + k]
                pltpu.make_async_copy(
                    source.at[pl.ds(row, 1)], fetched_ref.at[into, chunk, pl.ds(k, 1)], arrived.at[into]
                ).start()

    @pl.when(step == 0)
    def _():
        fetch(step, own_ref, slot)

    @pl.when(step + 1 < num_steps)
    def _():
        fetch(step + 1, next_ref, 1 - slot)

    # One wait for all rows of the query: a semaphore counts bytes.
    here = fetched_ref.at[slot]
    pltpu.make_async_copy(here, here, arrived.at[slot]).wait()
    index = index_ref[0]
    keys = fetched_ref[slot].reshape(count, g.width)
    if keys.dtype != q_ref.dtype:
        keys = chosen_rows(keys, index)
    ring = stored.decoded_ring([ref[0] for ref in ring_refs], q_ref.dtype)
    tiles = [visibility.ring_tile(ring, view_ref[0]), visibility.Visible(keys, index >= 0)]
    (state,) = online_softmax.attend([online_softmax.from_sink(sink_ref[...], 1)], [q_ref[0]], [tiles])
    o, lse = online_softmax.results(state)
    o_ref[0], lse_ref[0] = o.astype(o_ref.dtype), lse


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
        index: i32[B * T, 1, K] in -1 .. S - 1, K a multiple of ROWS_UNROLLED.
    """
    count, together = index.shape[2], rows_a_copy(q.dtype)
    row = jax.lax.div(jnp.maximum(index, 0), together)
    steps = g.batch * g.queries
    words = jnp.float32 if together == 1 else jnp.uint32

    def per_query(*shape, memory=pltpu.VMEM, ahead=0):
        return pl.BlockSpec(
            (1, *shape),
            lambda i, _: (jnp.minimum(i + ahead, steps - 1), *(0 for _ in shape)),
            memory_space=memory,
        )

    def own_ring(part):
        return pl.BlockSpec(
            (None, 1, *part.shape[2:]), lambda i, repeat: (repeat[0], jax.lax.div(i, g.queries), 0, 0)
        )

    rings = stored.ring_parts(ring)
    keys = steps * (g.slots + together * count)
    return pl.pallas_call(
        functools.partial(_body, g, count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                per_query(1, count, memory=pltpu.SMEM),
                per_query(1, count, memory=pltpu.SMEM, ahead=1),
                per_query(g.heads, g.width),
                per_query(1, 4),
                pl.BlockSpec((g.heads, 1), lambda i, _: (0, 0)),
                per_query(1, count),
                pl.BlockSpec(memory_space=pl.ANY),
                *(own_ring(part) for part in rings),
            ],
            out_specs=[per_query(g.heads, g.width), per_query(1, g.heads)],
            scratch_shapes=[
                pltpu.VMEM((2, count // ROWS_UNROLLED, ROWS_UNROLLED, g.width), words),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((steps, 1, g.heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
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
