"""Mosaic TPU kernel of `decode_attention` over the ring and a stretch of entries, all or masked.

Layout: the queries of one sequence with all their heads are one matrix of T * H rows and Dh columns, because
heads and queries share their keys. Logits are seen as [T, H, keys], so that a mask of [T, keys] is broadcast
over heads along sublanes. Grid: (group of sequences, block of entries); step 0 also attends to the ring.
Every sequence of a group brings its entries as an operand of its own and stops fetching at its own end.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import quotient
from pallas_kernels.decode_attention import online_softmax, stored, visibility
from pallas_kernels.decode_attention.online_softmax import Softmax
from pallas_kernels.decode_attention.tuning import SUBLANES, VMEM_LIMIT, Geometry
from pallas_kernels.formats.entries import Fp8Entries


def clear_from(ref, keep: jax.Array) -> None:
    """Zeroes a block's rows from `keep` on: nobody sees them, and nobody may ever have written them."""
    num_rows = ref.shape[0]

    @pl.loop(quotient(jnp.clip(keep, 0, num_rows), SUBLANES), num_rows // SUBLANES)
    def _(tile):
        first = pl.multiple_of(tile * SUBLANES, SUBLANES)
        row = first + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
        rows = pl.ds(first, SUBLANES)
        ref[rows] = jnp.where(row < keep, ref[rows], 0).astype(ref.dtype)


def _body(g: Geometry, repeat_ref, extent_ref, *refs) -> None:
    del repeat_ref  # read by the block specs
    r = SimpleNamespace(**dict(zip(_names(g), refs, strict=True)))
    group, step = pl.program_id(0), pl.program_id(1)
    everyone = range(g.sequences)

    def entries(s: int, first: jax.Array | int) -> visibility.Visible:
        mask = visibility.entry_mask(r.view[s], first, g.entries, r.chosen[s] if g.masked else None)
        keep = extent_ref[group * g.sequences + s] - first
        if g.quantized:
            parts = [getattr(r, f"{part}{s}")[...] for part in Fp8Entries._fields]
            keys = stored.decoded_tile(*parts, r.q.dtype)
            entry = jax.lax.broadcasted_iota(jnp.int32, (1, g.entries), 1)
            return visibility.Visible(jnp.where(entry < keep, keys, 0).astype(keys.dtype), mask, True)
        ref = getattr(r, f"entries{s}")
        clear_from(ref, keep)
        return visibility.Visible(ref[...], mask)

    def ring(s: int) -> visibility.Visible:
        parts = [getattr(r, name)[s] for name in _ring_names(g)]
        return visibility.ring_tile(stored.decoded_ring(parts, r.q.dtype), r.view[s])

    def start() -> list[Softmax]:
        tiles = [[entries(s, 0)] if g.num_entries else [] for s in everyone]
        tiles = [[ring(s), *tiles[s]] for s in everyone]
        states = [online_softmax.from_sink(r.sink[...], g.queries)] * g.sequences
        return online_softmax.attend(states, [r.q[s] for s in everyone], tiles)

    def finish(states: list[Softmax]) -> None:
        for s in everyone:
            o, lse = online_softmax.results(states[s])
            r.o[s], r.lse[s] = o.astype(r.o.dtype), lse

    if g.num_entry_blocks <= 1:
        finish(start())
        return

    def keep(s: int, state: Softmax) -> None:
        r.top[s], r.total[s], r.weighted[s] = state

    def kept(s: int) -> Softmax:
        return Softmax(r.top[s], r.total[s], r.weighted[s])

    @pl.when(step == 0)
    def _():
        for s, state in enumerate(start()):
            keep(s, state)

    for s in everyone:
        first = step * g.entries

        @pl.when((step > 0) & (first < extent_ref[group * g.sequences + s]))
        def _(s=s, first=first):
            keep(s, *online_softmax.attend([kept(s)], [r.q[s]], [[entries(s, first)]]))

    @pl.when(step == g.num_entry_blocks - 1)
    def _():
        finish([kept(s) for s in everyone])


def _ring_names(g: Geometry) -> list[str]:
    return [f"ring_{part}" for part in Fp8Entries._fields] if g.quantized_ring else ["ring"]


def _names(g: Geometry) -> list[str]:
    """Operands, results and scratch, in the order of `stream`."""
    names = ["q", "view", "sink", *_ring_names(g)]
    if g.num_entries:
        parts = Fp8Entries._fields if g.quantized else ("entries",)
        names += [f"{part}{s}" for s in range(g.sequences) for part in parts]
    if g.masked:
        names.append("chosen")
    names += ["o", "lse"]
    return names + (["top", "total", "weighted"] if g.num_entry_blocks > 1 else [])


def stream(
    g: Geometry,
    q: jax.Array,
    view: jax.Array,
    ring: stored.Entries,
    sink: jax.Array,
    repeat: jax.Array,
    entries: stored.Entries | None,
    extent: jax.Array,
    chosen: jax.Array | None,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """o[B, T * H, Dh] and lse f32[B, T, H].

    Args:
        q: [B, T * H, Dh]; view: i32[B, T, 4], see `visibility.views`; ring: [R, B, M, Dh] or fp8;
        sink: f32[H, 1]; repeat: i32[1]; entries: [R, B, S, Dh], fp8 or None; extent: i32[B], each sequence
        sees entries before it; chosen: i8[B, T, S] or None.
    """

    def block(b, e, extent):
        return jnp.minimum(e, quotient(jnp.maximum(extent[b] - 1, 0), g.entries))

    def own_entries(s, part):
        def at(i, e, repeat, extent):
            b = jnp.minimum(i * g.sequences + s, g.batch - 1)
            here = block(b, e, extent)
            return (repeat[0], b, 0, here) if g.quantized else (repeat[0], b, here, 0)

        shape = (part.shape[2], g.entries) if g.quantized else (g.entries, g.width)
        return pl.BlockSpec((None, None, *shape), at)

    def chosen_at(i, e, repeat, extent):
        del repeat
        blocks = [block(i * g.sequences + s, e, extent) for s in range(g.sequences)]
        return i, 0, functools.reduce(jnp.maximum, blocks)

    def per_sequence(*shape):
        return pl.BlockSpec((g.sequences, *shape), lambda i, e, *_: (i, *(0 for _ in shape)))

    def own_rings(part):
        return pl.BlockSpec(
            (None, g.sequences, *part.shape[2:]), lambda i, e, repeat, _: (repeat[0], i, 0, 0)
        )

    rings = stored.ring_parts(ring)
    arrays = [q, view, sink, *rings]
    specs = [
        per_sequence(g.rows, g.width),
        per_sequence(g.queries, 4),
        pl.BlockSpec((g.heads, 1), lambda i, e, *_: (0, 0)),
        *(own_rings(part) for part in rings),
    ]
    if entries is not None:
        parts = stored.channels_first(entries)
        arrays += [*parts] * g.sequences
        specs += [own_entries(s, part) for s in range(g.sequences) for part in parts]
    if chosen is not None:
        arrays.append(chosen)
        specs.append(pl.BlockSpec((g.sequences, g.queries, g.entries), chosen_at))
    scratch = []
    if g.num_entry_blocks > 1:
        column = pltpu.VMEM((g.sequences, g.queries, g.heads, 1), jnp.float32)
        scratch = [column, column, pltpu.VMEM((g.sequences, g.rows, g.width), jnp.float32)]
    # The last group may be ragged: its missing sequences see nothing, but their extents are read.
    extent = jnp.pad(extent, (0, g.num_groups * g.sequences - g.batch))
    keys = g.batch * (g.slots + g.num_entries)
    return pl.pallas_call(
        functools.partial(_body, g),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(g.num_groups, max(g.num_entry_blocks, 1)),
            in_specs=specs,
            out_specs=[per_sequence(g.rows, g.width), per_sequence(g.queries, g.heads)],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((g.batch, g.queries, g.heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * g.rows * keys * g.width,
            transcendentals=g.rows * keys,
            bytes_accessed=(2 * q.size + keys * g.width) * g.itemsize,
        ),
        interpret=interpret,
        name="decode_attention_stream",
    )(repeat, extent, *arrays)
