"""Mosaic TPU kernel of `gathered_attention`: every query's own rows, one copy a row.

Layout: one query at a time, its heads are the rows of both products. A row of 32-bit numbers can be copied on
its own; bfloat16 rows come as pairs in 32-bit words, and the half that was chosen is taken from them.

Starting the copies is most of the work, and it is work of the scalar unit alone. So a grid step goes through
its query's chunks in one piece of straight code: wait for the chunk, compute it, start the same chunk of the
next query into the same place. The compiler starts copies while it computes, and as every place is known to
it, a start costs little more than the address of its row. A row has all but one of the chunks of a step to
arrive in.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import quotient
from pallas_kernels.decode_attention.kernel_tpu_gather import along_lanes, chosen_rows, rows_a_copy
from pallas_kernels.hybrid_attention.kernel_tpu import ROWS_BY_KEYS, dot
from pallas_kernels.hybrid_attention.tuning import SUBLANES, VMEM_LIMIT, GatherGeometry

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The running maximum before the first key: finite, so that no difference is -inf - -inf."""


def _body(
    g: GatherGeometry,
    repeat_ref,
    first_ref,
    next_ref,
    q_ref,
    index_ref,
    entries_ref,
    o_ref,
    lse_ref,
    fetched_ref,
    arrived,
    top_ref,
    total_ref,
    weighted_ref,
) -> None:
    step = pl.program_id(0)
    words = entries_ref if entries_ref.dtype == jnp.float32 else entries_ref.bitcast(jnp.uint32)

    def start(row_ref, of_query, chunk, first, count: int) -> None:
        """The copies of some rows of a chunk of a query. All but their number may be traced."""
        source = words.at[repeat_ref[0], quotient(of_query, g.length)]
        for k in range(count):
            row = row_ref[0, 0, chunk * g.chunk + first + k]
            pltpu.make_async_copy(
                source.at[pl.ds(row, 1)], fetched_ref.at[chunk, pl.ds(first + k, 1)], arrived.at[chunk]
            ).start()

    def wait(chunk: int) -> None:
        """For all rows of a chunk at once: a semaphore counts bytes."""
        rows = fetched_ref.at[chunk]
        pltpu.make_async_copy(rows, rows, arrived.at[chunk]).wait()

    def attend(chunk: int) -> None:
        """One chunk of keys joins the softmax."""
        index = index_ref[0, chunk : chunk + 1]
        keys = fetched_ref[chunk]
        if keys.dtype != q_ref.dtype:
            keys = chosen_rows(keys, along_lanes(index & 1, g.width))
        logits = dot(q_ref[0], keys, ROWS_BY_KEYS) * g.width**-0.5
        logits = jnp.where(index >= 0, logits, -jnp.inf)
        top = jnp.maximum(top_ref[...], logits.max(axis=-1, keepdims=True))
        weight, shrink = jnp.exp(logits - top), jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * shrink + weight.sum(axis=-1, keepdims=True)
        weighted_ref[...] = weighted_ref[...] * shrink + dot(weight.astype(keys.dtype), keys)

    @pl.when(step == 0)
    def _():
        @pl.loop(0, g.num_chunks)
        def _(chunk):
            @pl.loop(0, g.chunk // SUBLANES)
            def _(group):
                start(first_ref, jnp.int32(0), chunk, group * SUBLANES, SUBLANES)

    top_ref[...] = jnp.full(top_ref.shape, LOWEST, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)
    following = jnp.minimum(step + 1, g.queries - 1)
    for chunk in range(g.num_chunks):
        wait(chunk)
        attend(chunk)
        # The last step has no next query and starts its own again, for nobody: a condition here would part
        # the copies from the arithmetic.
        start(next_ref, following, chunk, 0, g.chunk)
    total = total_ref[...]
    seen = total > 0.0  # the largest logit alone adds one
    o_ref[0] = (weighted_ref[...] * jnp.where(seen, 1.0 / total, 0.0)).astype(o_ref.dtype)
    lse_ref[0] = jnp.where(seen, top_ref[...] + jnp.log(total), -jnp.inf).reshape(1, g.heads)

    @pl.when(step == g.queries - 1)
    def _():
        for chunk in range(g.num_chunks):
            wait(chunk)


def gathered_forward(
    g: GatherGeometry,
    q: jax.Array,
    entries: jax.Array,
    repeat: jax.Array,
    index: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """o[B * T, H, Dh] and lse f32[B * T, 1, H].

    Args:
        q: [B * T, H, Dh]; entries: [R, B, S, Dh], S even in bfloat16; repeat: i32[1] in 0 .. R - 1;
        index: i32[B * T, chunks, chunk] in -1 .. S - 1.
    """
    together = rows_a_copy(q.dtype)
    row = quotient(jnp.maximum(index, 0), together).reshape(g.queries, 1, -1)

    def own(*shape):
        return pl.BlockSpec((1, *shape), lambda i, _: (i, *(0 for _ in shape)))

    def rows(query):
        return pl.BlockSpec((1, 1, g.num_keys), lambda i, _: (query(i), 0, 0), memory_space=pltpu.SMEM)

    column = pltpu.VMEM((g.heads, 1), jnp.float32)
    keys = g.queries * g.num_keys
    return pl.pallas_call(
        functools.partial(_body, g),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(g.queries,),
            in_specs=[
                rows(lambda i: 0),
                rows(lambda i: jnp.minimum(i + 1, g.queries - 1)),
                own(g.heads, g.width),
                own(g.num_chunks, g.chunk),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[own(g.heads, g.width), own(1, g.heads)],
            scratch_shapes=[
                pltpu.VMEM((g.num_chunks, g.chunk, g.width), jnp.float32 if together == 1 else jnp.uint32),
                pltpu.SemaphoreType.DMA((g.num_chunks,)),
                column,
                column,
                pltpu.VMEM((g.heads, g.width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((g.queries, 1, g.heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,  # they cost more than the copies; `index` is clamped before
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * g.heads * keys * g.width,
            transcendentals=g.heads * keys,
            bytes_accessed=(2 * q.size + together * keys * g.width) * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="gathered_attention_forward",
    )(repeat, row, row, q, index, entries)
