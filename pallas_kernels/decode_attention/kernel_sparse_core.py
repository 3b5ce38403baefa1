"""SparseCore kernel that copies listed rows of the cache into one dense array. Compiled, never run on a chip.

Layout: the list is cut into chunks, and every vector subcore takes a run of them. An indirect copy brings the
rows of a chunk, in any order, from HBM to the subcore's memory; an ordinary one writes them to their place.
The next chunk is fetched while the last one is written. Indirect copies move 32-bit numbers only, so rows of
bfloat16 come in the pairs that share words; whoever reads the result takes the half that was meant.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from pallas_kernels.arithmetic import cdiv

CHUNK_BYTES = 64 * 2**10
"""Of one indirect copy. A subcore holds two chunks; the smallest one (v6e) has 256 KiB of memory."""

LONGEST_CHUNK = 128
"""Rows an indirect copy may list."""

ROWS_ALIGNED = 8
"""Offsets into a list of 32-bit numbers are multiples of it."""

INTERPRETED_SUBCORES = 3
"""How many steps of a grid stand for subcores in the interpreter, with chunks of ROWS_ALIGNED rows."""


def chunk_rows(row_bytes: int) -> int:
    """Rows of one indirect copy."""
    return max(ROWS_ALIGNED, min(LONGEST_CHUNK, CHUNK_BYTES // row_bytes // ROWS_ALIGNED * ROWS_ALIGNED))


def indirect_copy(table, rows, into, arrived) -> list[Any]:
    """The rows of a chunk by one copy: what the SparseCore does."""
    return [pltpu.make_async_copy(table.at[rows], into, arrived)]


def row_copies(table, rows, into, arrived) -> list[Any]:
    """One copy a row: what stands for `indirect_copy` in the interpreter, which has none."""
    return [
        pltpu.make_async_copy(table.at[pl.ds(rows[k], 1)], into.at[pl.ds(k, 1)], arrived)
        for k in range(into.shape[0])
    ]


def _body(
    subcore: jax.Array,
    copies: Callable[..., list[Any]],
    num_chunks: int,
    table_ref,
    row_ref,
    out_ref,
    rows_ref,
    chunk_ref,
    arrived,
    written,
) -> None:
    """The share of one subcore: `num_chunks` chunks of the list, from chunk subcore * num_chunks on."""
    table = table_ref if table_ref.dtype.itemsize == 4 else table_ref.bitcast(jnp.uint32)
    chunk = chunk_ref.shape[1]
    first = pl.multiple_of(subcore * num_chunks * chunk, chunk)
    pltpu.sync_copy(row_ref.at[pl.ds(first, num_chunks * chunk)], rows_ref)

    def fetched(c):
        slot = jax.lax.rem(c, 2)
        rows = rows_ref.at[pl.ds(pl.multiple_of(c * chunk, chunk), chunk)]
        return copies(table, rows, chunk_ref.at[slot], arrived.at[slot])

    def stored(c):
        slot = jax.lax.rem(c, 2)
        place = out_ref.at[pl.ds(pl.multiple_of(first + c * chunk, chunk), chunk)]
        return pltpu.make_async_copy(chunk_ref.at[slot], place, written.at[slot])

    for copy in fetched(jnp.int32(0)):
        copy.start()

    @pl.loop(0, num_chunks)
    def _(c):
        @pl.when(c > 0)
        def _():
            stored(c - 1).wait()  # the next chunk goes where this one came from

        @pl.when(c + 1 < num_chunks)
        def _():
            for copy in fetched(c + 1):
                copy.start()

        for copy in fetched(c):
            copy.wait()
        stored(c).start()

    stored(jnp.int32(num_chunks - 1)).wait()


def gather_rows(table: jax.Array, row: jax.Array, *, interpret: Any) -> jax.Array:
    """The listed rows of a table, one after the other.

    Args:
        table: 32-bit numbers [N, W], or bfloat16 [2 N, W] seen as N rows of words; W a multiple of 128. It is
            read where it lies.
        row: i32[n] in 0 .. N - 1.
        interpret: in an interpreter, steps of a grid stand for the subcores and copies of single rows for
            the indirect ones.

    Returns:
        [n', W] of 32-bit numbers, n' >= n: whole chunks for every subcore. Rows behind the n-th are copies of
        row 0.

    Raises:
        RuntimeError: for a chip without SparseCores (v5e).
    """
    words = table.dtype if table.dtype.itemsize == 4 else jnp.dtype(jnp.uint32)
    width = table.shape[1]
    if interpret:
        chunk, subcores = ROWS_ALIGNED, INTERPRETED_SUBCORES
    else:
        info = plsc.get_sparse_core_info()
        chunk, subcores = chunk_rows(width * 4), info.num_cores * info.num_subcores
    num_chunks = cdiv(row.size, chunk * subcores)
    row = jnp.pad(row, (0, num_chunks * chunk * subcores - row.size))
    out = jax.ShapeDtypeStruct((row.size, width), words)
    scratch = [
        pltpu.VMEM((num_chunks * chunk,), jnp.int32),
        pltpu.VMEM((2, chunk, width), words),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    cost = pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * out.size * 4)
    if interpret:

        def step(*refs):
            _body(pl.program_id(0), row_copies, num_chunks, *refs)

        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            step,
            grid=(subcores,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            out_shape=out,
            scratch_shapes=scratch,
            interpret=interpret,
            name="decode_attention_fetch",
        )(table, row)

    def share(*refs):
        subcore = jax.lax.axis_index("core") * info.num_subcores + jax.lax.axis_index("subcore")
        _body(subcore, indirect_copy, num_chunks, *refs)

    mesh = plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore")
    fetch = pl.kernel(
        share,
        out_type=out,
        mesh=mesh,
        scratch_types=scratch,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True
        ),  # of no use: rows are clamped before
        name="decode_attention_fetch",
    )
    return fetch(table, row)
