"""Mosaic TPU kernel of `hybrid_attention`: forward.

Layout: a block of queries with all their heads is one matrix of queries * H rows and Dh columns, because
the heads share their keys; both matmuls have that many rows. Logits are seen as [queries, H, keys], so that
a mask of [queries, keys] is broadcast over heads along sublanes. What there is one of per row (maximum, sum)
fills all 128 lanes: moving a number between lanes costs more than repeating it. Grid: (batch, query block,
key step); step 0 is the window, step e the e-th visible block of entries, and steps beyond the visible ones
do nothing.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.hybrid_attention import visibility
from pallas_kernels.hybrid_attention.tuning import LANES, VMEM_LIMIT, Geometry
from pallas_kernels.precision import product_precision

ROWS_BY_KEYS = (((1,), (1,)), ((), ()))  # x[rows, Dh] . y[keys, Dh] over Dh


def dot(x: jax.Array, y: jax.Array, dimensions=(((1,), (0,)), ((), ()))) -> jax.Array:
    """A product accumulated in float32; float32 operands are not rounded to bfloat16 on the way."""
    precision = product_precision(x.dtype)
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def logits_tile(q: jax.Array, keys: jax.Array, bias: jax.Array) -> jax.Array:
    """f32[queries, H, keys] from q[queries * H, Dh], keys[keys, Dh] and a bias [queries, keys]."""
    queries, num_keys = bias.shape
    logits = dot(q, keys, ROWS_BY_KEYS) * q.shape[1] ** -0.5
    return logits.reshape(queries, -1, num_keys) + bias[:, None, :]


def as_rows(x: jax.Array) -> jax.Array:
    """[queries, H, k] as [queries * H, k]."""
    return x.reshape(-1, x.shape[-1])


def each_chunk(g: Geometry, bias_ref, bias: jax.Array, visit) -> None:
    """Calls visit(queries, rows, bias) for every chunk of the block: two slices, and the chunk's bias."""
    if g.chunk == g.queries:
        visit(slice(None), slice(None), bias)
        return
    num_keys = bias.shape[1]
    bias_ref[:, :num_keys] = bias  # a value cannot be sliced at a position that is known only at run time

    @pl.loop(0, g.queries // g.chunk)
    def _(c):
        queries, rows = chunk_slices(g, c)
        visit(queries, rows, bias_ref[queries, :num_keys])


def chunk_slices(g: Geometry, c: jax.Array) -> tuple[pl.Slice, pl.Slice]:
    """Queries and rows of chunk c."""
    height = g.chunk * g.heads
    return (
        pl.ds(pl.multiple_of(c * g.chunk, g.chunk), g.chunk),
        pl.ds(pl.multiple_of(c * height, height), height),
    )


class Operands:
    """Named operands of one pallas_call, so that absent ones need no special cases in the bodies."""

    def __init__(self, **operands: tuple[jax.Array, pl.BlockSpec] | None) -> None:
        self.present = {name: pair for name, pair in operands.items() if pair is not None}

    @property
    def arrays(self) -> list[jax.Array]:
        return [array for array, _ in self.present.values()]

    @property
    def specs(self) -> list[pl.BlockSpec]:
        return [spec for _, spec in self.present.values()]

    def body(self, body, *names: str, **static):
        """`body(first, last, refs, **static)` with refs by name; `names` are results and scratch."""

        def run(first_ref, last_ref, *refs):
            named = SimpleNamespace(entries=None, selected=None)
            named.__dict__.update(zip((*self.present, *names), refs, strict=True))
            body(first_ref, last_ref, named, **static)

        return run


class Keys(NamedTuple):
    """What the kernels read besides queries, in whole blocks."""

    view: jax.Array  # i32[B, padded T, 3], see `visibility.views`
    line: jax.Array  # [B, padded line, Dh]
    entries: jax.Array | None  # [B, padded S, Dh]
    selected: jax.Array | None  # i8[B, padded T, padded S]
    ranges: visibility.Range  # entry blocks of every query block


def whole_blocks(g: Geometry, line, position, entries, lo, hi, selected) -> Keys:
    """Pads keys with zeros, which no query sees, and masks with queries that see nothing."""
    view = visibility.views(position, lo, hi, g.window, g.num_entries, g.queries)
    line = jnp.pad(line, ((0, 0), (0, g.padded_line - line.shape[1]), (0, 0)))
    if entries is None:
        nothing = jnp.zeros((1,), jnp.int32)
        return Keys(view, line, None, None, visibility.Range(nothing, nothing))
    more_entries = (0, g.num_entry_blocks * g.entries - g.num_entries)
    entries = jnp.pad(entries, ((0, 0), more_entries, (0, 0)))
    if selected is not None:
        more_queries = (0, view.shape[1] - g.length)
        selected = jnp.pad(selected.astype(jnp.int8), ((0, 0), more_queries, more_entries))
    ranges = visibility.entry_blocks_of_queries(view, g.queries, g.entries)
    return Keys(view, line, entries, selected, ranges)


def key_step_specs(g: Geometry) -> dict[str, pl.BlockSpec]:
    """Block specs on the grid (batch, query block, key step) of the forward and the dq kernel."""

    def entry_block(b, i, k, first, last):
        at = b * g.num_query_blocks + i
        # Step k shows the (k - 1)-th visible block; the window's step already fetches the first.
        block = first[at] + jnp.maximum(k - 1, 0)
        return visibility.clamp(block, first[at], last[at], g.num_entry_blocks)

    def first_place(i):
        # The compiler wants starts to be whole tiles; only a lone block may have an odd number of queries.
        return i * g.queries if g.num_query_blocks > 1 else 0

    near = (pl.Element(1), pl.Element(g.near), pl.Element(g.width))
    return {
        "rows": pl.BlockSpec((None, g.rows, g.width), lambda b, i, k, *_: (b, i, 0)),
        "per_query": pl.BlockSpec((None, g.queries, g.heads), lambda b, i, k, *_: (b, i, 0)),
        "view": pl.BlockSpec((None, g.queries, 3), lambda b, i, k, *_: (b, i, 0)),
        "line": pl.BlockSpec(near, lambda b, i, k, *_: (b, first_place(i), 0)),
        "entries": pl.BlockSpec(
            (None, g.entries, g.width), lambda b, i, k, f, n: (b, entry_block(b, i, k, f, n), 0)
        ),
        "selected": pl.BlockSpec(
            (None, g.queries, g.entries), lambda b, i, k, f, n: (b, i, entry_block(b, i, k, f, n))
        ),
        "sink": pl.BlockSpec((g.heads, LANES), lambda b, i, k, *_: (0, 0)),
    }


def when_entries_visible(first_ref, last_ref, refs, g: Geometry):
    """Decorator: runs the function with the bias of this step's entries, if the step has visible ones."""

    def run(function):
        if not g.num_entry_blocks:
            return
        at = pl.program_id(0) * g.num_query_blocks + pl.program_id(1)
        step = pl.program_id(2)
        block = first_ref[at] + step - 1

        @pl.when((step > 0) & (block <= last_ref[at]))
        def _():
            selected = None if refs.selected is None else refs.selected[...]
            function(visibility.entry_bias(refs.view[...], block * g.entries, g.entries, selected))

    return run


def on_lanes(column: jax.Array) -> jax.Array:
    """A column [..., 1] on all lanes of a register, [..., 128]: read back, it need not be spread again."""
    return jnp.broadcast_to(column, (*column.shape[:-1], LANES))


def across(x: jax.Array, width: int) -> jax.Array:
    """The same for `width` lanes instead of 128."""
    return jnp.concatenate([x] * cdiv(width, LANES), axis=-1)[..., :width]


def heads_on_lanes(x: jax.Array) -> jax.Array:
    """[queries, H] of [queries, H, 128] with the same number on every lane: the diagonal of each query."""
    parts = []
    for start in range(0, x.shape[1], LANES):
        part = x[:, start : start + LANES]
        head, lane = (jax.lax.broadcasted_iota(jnp.int32, part.shape[1:], axis) for axis in (0, 1))
        parts.append(jnp.where(head == lane, part, 0.0).sum(axis=1)[:, : part.shape[1]])
    return jnp.concatenate(parts, axis=1)


def _forward_body(first_ref, last_ref, refs, *, g: Geometry) -> None:
    step = pl.program_id(2)

    def finish(queries, rows, top, total, weighted):
        refs.o[rows] = (weighted * across(as_rows(1.0 / total), g.width)).astype(refs.o.dtype)
        refs.lse[queries] = heads_on_lanes(top + jnp.log(total))

    @pl.when(step == 0)
    def _window():
        def start(queries, rows, bias):
            keys = refs.line[0]
            logits = logits_tile(refs.q[rows], keys, bias)
            sink = refs.sink[...][None]  # [1, H, 128]
            top = jnp.maximum(on_lanes(logits.max(axis=-1, keepdims=True)), sink)
            weight = jnp.exp(logits - across(top, g.near))
            total = on_lanes(weight.sum(axis=-1, keepdims=True)) + jnp.exp(sink - top)
            weighted = dot(as_rows(weight.astype(keys.dtype)), keys)
            if not g.num_entry_blocks:
                finish(queries, rows, top, total, weighted)
                return
            refs.top[queries], refs.total[queries], refs.weighted[rows] = top, total, weighted

        bias = visibility.window_bias(refs.view[...], g.window - 1, g.near)
        each_chunk(g, refs.bias, bias, start)

    @when_entries_visible(first_ref, last_ref, refs, g)
    def _entries(bias):
        def add(queries, rows, bias):
            keys = refs.entries[...]
            logits = logits_tile(refs.q[rows], keys, bias)
            before = refs.top[queries]
            top = jnp.maximum(on_lanes(logits.max(axis=-1, keepdims=True)), before)
            weight = jnp.exp(logits - across(top, g.entries))
            shrink = jnp.exp(before - top)
            refs.total[queries] = refs.total[queries] * shrink + on_lanes(weight.sum(axis=-1, keepdims=True))
            product = dot(as_rows(weight.astype(keys.dtype)), keys)
            refs.weighted[rows] = refs.weighted[rows] * across(as_rows(shrink), g.width) + product
            refs.top[queries] = top

        each_chunk(g, refs.bias, bias, add)

    if not g.num_entry_blocks:
        return

    @pl.when(step == g.num_entry_blocks)
    def _finish():
        finish(slice(None), slice(None), refs.top[...], refs.total[...], refs.weighted[...])


def key_operands(keys: Keys, specs) -> dict[str, Any]:
    """The keys and what hides them, for `Operands`."""
    return {
        "view": (keys.view, specs["view"]),
        "line": (keys.line, specs["line"]),
        "entries": None if keys.entries is None else (keys.entries, specs["entries"]),
        "selected": None if keys.selected is None else (keys.selected, specs["selected"]),
    }


def compiler_params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def hybrid_forward(
    g: Geometry, q: jax.Array, sink: jax.Array, keys: Keys, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """o[B, T * H, Dh] and lse f32[B, padded T, H] of q[B, T * H, Dh] and sink f32[H, 1]."""
    specs = key_step_specs(g)
    operands = Operands(
        q=(q, specs["rows"]),
        sink=(jnp.broadcast_to(sink, (g.heads, LANES)), specs["sink"]),
        **key_operands(keys, specs),
    )
    scratch = {"bias": pltpu.VMEM((g.queries, max(g.near, g.entries)), jnp.float32)}
    if g.num_entry_blocks:  # without entries a chunk is finished where it starts
        column = pltpu.VMEM((g.queries, g.heads, LANES), jnp.float32)
        scratch |= {"top": column, "total": column}
        scratch["weighted"] = pltpu.VMEM((g.rows, g.width), jnp.float32)
    visible = g.window + g.num_entries
    pairs = g.batch * g.length * g.heads * visible
    return pl.pallas_call(
        operands.body(_forward_body, "o", "lse", *scratch, g=g),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(g.batch, g.num_query_blocks, 1 + g.num_entry_blocks),
            in_specs=operands.specs,
            out_specs=[specs["rows"], specs["per_query"]],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((g.batch, keys.view.shape[1], g.heads), jnp.float32),
        ],
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * g.width,
            transcendentals=pairs,
            bytes_accessed=2 * q.size * g.itemsize + g.batch * visible * g.width * g.itemsize,
        ),
        interpret=interpret,
        name="hybrid_attention_forward",
    )(*keys.ranges, *operands.arrays)
