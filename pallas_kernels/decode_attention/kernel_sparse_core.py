"""SparseCore kernel that copies listed rows of the cache into one dense array. Compiled, never run on a chip.

Layout: the list is cut into chunks, and every vector subcore takes a run of them. An indirect copy brings the
rows of a chunk, in any order, from HBM to the subcore's memory; an ordinary one writes them to their place.
The next chunk is on its way meanwhile. Indirect copies move 32-bit numbers only, so rows of bfloat16 come in
the pairs that share words; the subcore takes the halves that were meant and pairs them anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from pallas_kernels.arithmetic import cdiv, remainder

CHUNK_BYTES = 64 * 2**10
"""Of one indirect copy. A subcore holds two chunks and, of pairs, two halves of chunks; the smallest (v6e)
has 256 KiB of memory."""

LONGEST_CHUNK = 128
"""Rows an indirect copy may list."""

ROWS_ALIGNED = 16
"""A chunk is whole vectors of row numbers: of 8 on v5p and v6e, of 16 on tpu7x."""


def chunk_rows(row_bytes: int) -> int:
    """Rows of one indirect copy."""
    return max(ROWS_ALIGNED, min(LONGEST_CHUNK, CHUNK_BYTES // row_bytes // ROWS_ALIGNED * ROWS_ALIGNED))


class Machine(NamedTuple):
    """What differs between a SparseCore and the interpreter."""

    subcores: int
    lanes: int  # 32-bit numbers of a vector
    copies: Callable[..., list[Any]]  # of the rows of a chunk
    loop: Callable[..., Any]  # of steps that do not depend on each other


def sparse_core() -> Machine:
    """Of the chip that is compiled for; RuntimeError if it has none."""
    info = plsc.get_sparse_core_info()

    def indirect_copy(table, rows, into, arrived) -> list[Any]:
        return [pltpu.make_async_copy(table.at[rows], into, arrived)]

    def loop(start, stop, step):
        return plsc.parallel_loop(start, stop, step, unroll=8)

    return Machine(info.num_cores * info.num_subcores, info.num_lanes, indirect_copy, loop)


def interpreted() -> Machine:
    """Copies of single rows stand for the indirect one, which no interpreter has; loops keep their order."""

    def row_copies(table, rows, into, arrived) -> list[Any]:
        return [
            pltpu.make_async_copy(table.at[pl.ds(rows[k], 1)], into.at[pl.ds(k, 1)], arrived)
            for k in range(into.shape[0])
        ]

    return Machine(3, 8, row_copies, lambda start, stop, step: pl.loop(start, stop, step=step))


def _pick_halves(m: Machine, words, shifts, picked) -> None:
    """picked[j] = the half of words[2j] that shifts[2j] brings down, and that of words[2j + 1] above it."""
    chunk, width = words.shape

    @pl.loop(0, chunk // m.lanes)
    def _(group):
        own = shifts[pl.ds(pl.multiple_of(group * m.lanes, m.lanes), m.lanes)]
        for k in range(0, m.lanes, 2):
            row = group * m.lanes + k
            low, high = own[k].astype(jnp.uint32), own[k + 1].astype(jnp.uint32)

            @m.loop(0, width, m.lanes)
            def _(lane, row=row, low=low, high=high):
                place = pl.ds(lane, m.lanes)
                lower = (words[row, place] >> low) & jnp.uint32(0xFFFF)
                picked[row // 2, place] = lower | (words[row + 1, place] >> high) << 16


class _Refs(NamedTuple):
    """Operand, result and scratch of a subcore; the last two are None where whole rows are copied."""

    table: Any  # [N, W] in HBM, 32-bit numbers or bfloat16
    row: Any  # i32[n] in HBM
    out: Any  # [n, W] or u32[n / 2, W] in HBM
    rows: Any  # i32, the subcore's own share of `row`
    words: Any  # [2, chunk, W]
    arrived: Any
    written: Any
    shift: Any = None  # i32[n] in HBM, 0 or 16
    shifts: Any = None
    picked: Any = None  # u32[2, chunk / 2, W]


def _body(m: Machine, subcore: jax.Array, num_chunks: int, r: _Refs) -> None:
    """The share of one subcore: `num_chunks` chunks of the list, from chunk subcore * num_chunks on."""
    table = r.table if r.table.dtype.itemsize == 4 else r.table.bitcast(jnp.uint32)
    halves, chunk = r.shift is not None, r.words.shape[1]
    results = r.picked if halves else r.words
    own = pl.ds(pl.multiple_of(subcore * num_chunks * chunk, chunk), num_chunks * chunk)
    pltpu.sync_copy(r.row.at[own], r.rows)
    if halves:
        pltpu.sync_copy(r.shift.at[own], r.shifts)

    def of_chunk(c: jax.Array) -> Any:
        return pl.ds(pl.multiple_of(c * chunk, chunk), chunk)

    def fetched(c: jax.Array) -> list[Any]:
        slot = remainder(c, 2)
        return m.copies(table, r.rows.at[of_chunk(c)], r.words.at[slot], r.arrived.at[slot])

    def stored(c: jax.Array) -> Any:
        slot, count = remainder(c, 2), results.shape[1]
        place = pl.ds(pl.multiple_of((subcore * num_chunks + c) * count, count), count)
        return pltpu.make_async_copy(results.at[slot], r.out.at[place], r.written.at[slot])

    for copy in fetched(jnp.int32(0)):
        copy.start()

    @pl.loop(0, num_chunks)
    def _(c):
        if not halves:  # the next chunk goes where the last one came from

            @pl.when(c > 0)
            def _():
                stored(c - 1).wait()

        @pl.when(c + 1 < num_chunks)
        def _():
            for copy in fetched(c + 1):
                copy.start()

        for copy in fetched(c):
            copy.wait()
        if halves:

            @pl.when(c > 1)
            def _():
                stored(c - 2).wait()

            slot = remainder(c, 2)
            _pick_halves(m, r.words.at[slot], r.shifts.at[of_chunk(c)], r.picked.at[slot])
        stored(c).start()

    for c in range(max(0, num_chunks - 2) if halves else num_chunks - 1, num_chunks):
        stored(jnp.int32(c)).wait()


def gather_rows(table: jax.Array, row: jax.Array, *, interpret: Any) -> jax.Array:
    """The listed rows of a table, one after the other.

    Args:
        table: 32-bit numbers [N, W]; W a multiple of 128. It is read where it lies.
        row: i32[n] in 0 .. N - 1.
        interpret: in an interpreter, steps of a grid stand for the subcores; see `interpreted`.

    Returns:
        [n', W], n' >= n: whole chunks for every subcore. Rows behind the n-th are copies of row 0.

    Raises:
        RuntimeError: for a chip without SparseCores (v5e).
    """
    return _gather(table, row, None, interpret=interpret)


def gather_halves(table: jax.Array, row: jax.Array, *, interpret: Any) -> jax.Array:
    """The same for rows of bfloat16: u32[n' / 2, W], with rows 2j and 2j + 1 in the halves of its row j.

    Args:
        table: bfloat16 [N, W], N even, read where it lies; or its words u32[N / 2, W].
        row, interpret: as `gather_rows`.
    """
    return _gather(table, row // 2, 16 * (row % 2), interpret=interpret)


def _gather(table, row, shift, *, interpret):
    m = interpreted() if interpret else sparse_core()
    width, halves = table.shape[1], shift is not None
    chunk = ROWS_ALIGNED if interpret else chunk_rows(width * 4)
    num_chunks = cdiv(row.size, chunk * m.subcores)
    total = num_chunks * chunk * m.subcores
    lists = [jnp.pad(x, (0, total - x.size)) for x in ([row, shift] if halves else [row])]
    words = jnp.uint32 if halves else table.dtype
    out = jax.ShapeDtypeStruct((total // (2 if halves else 1), width), words)
    share = pltpu.VMEM((num_chunks * chunk,), jnp.int32)
    scratch = [share, pltpu.VMEM((2, chunk, width), words)]
    scratch += [pltpu.SemaphoreType.DMA((2,))] * 2
    if halves:
        scratch += [share, pltpu.VMEM((2, chunk // 2, width), words)]

    def body(subcore, table, row, *refs):
        if not halves:
            return _body(m, subcore, num_chunks, _Refs(table, row, *refs))
        shift, out, rows, words, arrived, written, shifts, picked = refs
        _body(
            m,
            subcore,
            num_chunks,
            _Refs(table, row, out, rows, words, arrived, written, shift, shifts, picked),
        )

    if interpret:
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        gather = pl.pallas_call(
            lambda *refs: body(pl.program_id(0), *refs),
            grid=(m.subcores,),
            in_specs=[anywhere] * (1 + len(lists)),
            out_specs=anywhere,
            out_shape=out,
            scratch_shapes=scratch,
            interpret=interpret,
            name="decode_attention_fetch",
        )
        return gather(table, *lists)
    mesh = plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore")

    def of_subcore(*refs):
        body(jax.lax.axis_index("core") * mesh.num_subcores + jax.lax.axis_index("subcore"), *refs)

    gather = pl.kernel(
        of_subcore,
        out_type=out,
        mesh=mesh,
        scratch_types=scratch,
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=(total + out.shape[0]) * width * 4
        ),
        name="decode_attention_fetch",
    )
    return gather(table, *lists)
