"""Mosaic TPU kernels of `hybrid_attention`: backward, by recomputing the probabilities from log-sum-exp.

Layout as in `kernel_tpu`. Three kernels, each of which owns what it adds up, so that the order of all sums
is fixed: dq walks over the keys of a query block (the forward's grid) and makes delta for all three on its
way; d_line and d_entries walk over the query blocks that see one block of keys. A key's gradient has two
parts, because it is also the value:
    d_keys = p^T do + ds^T q,   ds = p (do keys^T - delta) Dh^-1/2,   delta = rowsum(do o) - d_lse
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hybrid_attention import visibility
from pallas_kernels.hybrid_attention.kernel_tpu import (
    ROWS_BY_KEYS,
    Keys,
    Operands,
    as_rows,
    compiler_params,
    dot,
    each_chunk,
    heads_on_lanes,
    key_operands,
    key_step_specs,
    logits_tile,
    on_lanes,
    when_entries_visible,
)
from pallas_kernels.hybrid_attention.tuning import Geometry

OVER_ROWS = (((0,), (0,)), ((), ()))  # x[rows, keys] . y[rows, Dh] over rows


def _probabilities(q, do, keys, bias, lse, delta):
    """p and ds of one tile, both f32[rows, keys]."""
    p = jnp.exp(logits_tile(q, keys, bias) - lse[:, :, None])
    dp = dot(do, keys, ROWS_BY_KEYS).reshape(p.shape)
    ds = p * (dp - delta[:, :, None]) * keys.shape[1] ** -0.5
    return as_rows(p), as_rows(ds)


def _delta(refs, queries, rows) -> jax.Array:
    """f32[queries, H]. Zero behind the last query, where operands may hold anything: 0 * NaN spoils sums."""
    product = refs.do[rows].astype(jnp.float32) * refs.o[rows].astype(jnp.float32)
    d_lse = refs.d_lse[queries]
    sums = on_lanes(product.sum(axis=-1, keepdims=True)).reshape(*d_lse.shape, -1)
    real = refs.view[queries, visibility.REACH : visibility.REACH + 1] >= 0
    return jnp.where(real, heads_on_lanes(sums) - d_lse, 0.0)


def _d_query_body(first_ref, last_ref, refs, *, g: Geometry) -> None:
    step = pl.program_id(2)

    def product(keys, queries, rows, bias):
        lse, delta = refs.lse[queries], refs.delta[queries]
        _, ds = _probabilities(refs.q[rows], refs.do[rows], keys, bias, lse, delta)
        return dot(ds.astype(keys.dtype), keys)

    @pl.when(step == 0)
    def _window():
        def start(queries, rows, bias):
            refs.delta[queries] = _delta(refs, queries, rows)
            refs.sum[rows] = product(refs.line[0], queries, rows, bias)

        bias = visibility.window_bias(refs.view[...], g.window - 1, g.near)
        each_chunk(g, refs.bias, bias, start)

    @when_entries_visible(first_ref, last_ref, refs, g)
    def _entries(bias):
        def add(queries, rows, bias):
            refs.sum[rows] += product(refs.entries[...], queries, rows, bias)

        each_chunk(g, refs.bias, bias, add)

    @pl.when(step == g.num_entry_blocks)
    def _finish():
        refs.dq[...] = refs.sum[...].astype(refs.dq.dtype)


class Rows(NamedTuple):
    """Queries, and what the forward pass, the loss and `hybrid_d_query` say about them."""

    q: jax.Array  # [B, T * H, Dh]
    do: jax.Array  # likewise
    lse: jax.Array  # f32[B, padded T, H]
    delta: jax.Array  # likewise


def hybrid_d_query(
    g: Geometry, q, do, o, lse, d_lse, keys: Keys, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """dq[B, T * H, Dh] and delta f32[B, padded T, H] of q, do, o like dq and lse, d_lse like delta."""
    specs = key_step_specs(g)
    operands = Operands(
        q=(q, specs["rows"]),
        do=(do, specs["rows"]),
        o=(o, specs["rows"]),
        lse=(lse, specs["per_query"]),
        d_lse=(d_lse, specs["per_query"]),
        **key_operands(keys, specs),
    )
    visible = g.window + g.num_entries
    pairs = g.batch * g.length * g.heads * visible
    return pl.pallas_call(
        operands.body(_d_query_body, "dq", "delta", "sum", "bias", g=g),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(g.batch, g.num_query_blocks, 1 + g.num_entry_blocks),
            in_specs=operands.specs,
            out_specs=[specs["rows"], specs["per_query"]],
            scratch_shapes=[
                pltpu.VMEM((g.rows, g.width), jnp.float32),
                pltpu.VMEM((g.queries, max(g.near, g.entries)), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)],
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=6 * pairs * g.width,
            transcendentals=pairs,
            bytes_accessed=4 * q.size * g.itemsize + g.batch * visible * g.width * g.itemsize,
        ),
        interpret=interpret,
        name="hybrid_attention_d_query",
    )(*keys.ranges, *operands.arrays)


def _add_d_keys(refs, bias, query_block, g: Geometry) -> None:
    """Adds one query block's share to the gradient of the keys in VMEM."""

    def add(queries, rows, bias):
        q, do, keys = refs.q[rows], refs.do[rows], refs.keys[...]
        if g.length % g.queries:
            # Rows behind the last query may hold anything, NaN too; 0 * NaN would spoil the sum over rows.
            row = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0)
            first = 0 if isinstance(rows, slice) else rows.start
            real = row < (g.length - query_block * g.queries) * g.heads - first
            q, do = (jnp.where(real, x, jnp.zeros_like(x)) for x in (q, do))
        p, ds = _probabilities(q, do, keys, bias, refs.lse[queries], refs.delta[queries])
        refs.sum[...] += dot(p.astype(do.dtype), do, OVER_ROWS) + dot(ds.astype(q.dtype), q, OVER_ROWS)

    each_chunk(g, refs.bias, bias, add)


def _d_keys_body(first_ref, last_ref, refs, *, g: Geometry, steps: int, locate, make_bias) -> None:
    """One step of either key gradient; `locate` finds the query block and whether to visit it."""
    b, j, step = (pl.program_id(axis) for axis in range(3))
    query_block, visited = locate(b, j, step, first_ref, last_ref)

    @pl.when(step == 0)
    def _start():
        refs.sum[...] = jnp.zeros_like(refs.sum)

    @pl.when(visited)
    def _add():
        _add_d_keys(refs, make_bias(refs, j, query_block), query_block, g)

    @pl.when(step == steps - 1)
    def _finish():
        refs.d_keys[...] = refs.sum[...].astype(refs.d_keys.dtype)


def _d_keys_call(
    g, ranges, rows, view, keys, selected,
    *, size: int, num_blocks: int, steps: int, locate, make_bias, name: str, interpret: Any,
) -> jax.Array:  # fmt: skip
    """The gradient of `keys` in blocks of `size`; grid (batch, key block, query block that may see it)."""

    def query_block(b, j, step, first, last):
        block, _ = locate(b, j, step, first, last)
        return jnp.clip(block, 0, g.num_query_blocks - 1)

    def by_query(height, columns):
        return pl.BlockSpec((None, height, columns), lambda b, j, s, f, n: (b, query_block(b, j, s, f, n), 0))

    per_query = by_query(g.queries, g.heads)
    key_spec = pl.BlockSpec((None, size, g.width), lambda b, j, s, *_: (b, j, 0))
    selected_spec = pl.BlockSpec(
        (None, g.queries, size), lambda b, j, s, f, n: (b, query_block(b, j, s, f, n), j)
    )
    operands = Operands(
        q=(rows.q, by_query(g.rows, g.width)),
        do=(rows.do, by_query(g.rows, g.width)),
        lse=(rows.lse, per_query),
        delta=(rows.delta, per_query),
        view=(view, by_query(g.queries, 3)),
        keys=(keys, key_spec),
        selected=None if selected is None else (selected, selected_spec),
    )
    visits = g.batch * num_blocks * steps
    pairs = visits * g.rows * size
    return pl.pallas_call(
        operands.body(
            _d_keys_body, "d_keys", "sum", "bias", g=g, steps=steps, locate=locate, make_bias=make_bias
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(g.batch, num_blocks, steps),
            in_specs=operands.specs,
            out_specs=key_spec,
            scratch_shapes=[
                pltpu.VMEM((size, g.width), jnp.float32),
                pltpu.VMEM((g.queries, size), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((g.batch, num_blocks * size, g.width), keys.dtype),
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=8 * pairs * g.width,
            transcendentals=pairs,
            bytes_accessed=2 * visits * g.rows * g.width * g.itemsize + 2 * keys.size * g.itemsize,
        ),
        interpret=interpret,
        name=name,
    )(*ranges, *operands.arrays)


def hybrid_d_line(g: Geometry, rows: Rows, keys: Keys, *, interpret: Any) -> jax.Array:
    """d_line[B, whole blocks of places, Dh]."""
    seen_by = visibility.LineBlocks(g.line, g.queries, g.num_query_blocks, g.window)

    def locate(b, j, step, first, last):
        block = seen_by.first(j) + step
        return jnp.minimum(block, seen_by.last(j)), block <= seen_by.last(j)

    def make_bias(refs, j, query_block):
        # Query 0 of the block stands at place query_block * queries + W - 1.
        offset = query_block * g.queries + g.window - 1 - j * g.line
        return visibility.window_bias(refs.view[...], offset, g.line)

    return _d_keys_call(
        g, keys.ranges, rows, keys.view, keys.line, None,
        size=g.line, num_blocks=g.num_line_blocks, steps=seen_by.steps(g.length + g.window - 1),
        locate=locate, make_bias=make_bias, name="hybrid_attention_d_line", interpret=interpret,
    )  # fmt: skip


def hybrid_d_entries(g: Geometry, rows: Rows, keys: Keys, *, interpret: Any) -> jax.Array:
    """d_entries[B, padded S, Dh]."""
    ranges = visibility.query_blocks_of_entries(keys.ranges, g.batch, g.num_entry_blocks)

    def locate(b, j, step, first, last):
        at = b * g.num_entry_blocks + j
        block = first[at] + step
        return jnp.minimum(block, last[at]), block <= last[at]

    def make_bias(refs, j, query_block):
        chosen = None if refs.selected is None else refs.selected[...]
        return visibility.entry_bias(refs.view[...], j * g.entries, g.entries, chosen)

    return _d_keys_call(
        g, ranges, rows, keys.view, keys.entries, keys.selected,
        size=g.entries, num_blocks=g.num_entry_blocks, steps=g.num_query_blocks,
        locate=locate, make_bias=make_bias, name="hybrid_attention_d_entries", interpret=interpret,
    )  # fmt: skip
