"""Mosaic TPU kernel of `decode_attention` over lists of entries that were fetched before, and the ring.

Layout: one query with its heads as rows, and several of them a grid step, written side by side. The fetched
entries of query i are rows i * K to (i + 1) * K - 1 of one array; two rows of bfloat16 that follow each other
share 32-bit words, which is how registers hold them anyway.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv, quotient
from pallas_kernels.decode_attention import online_softmax, stored, visibility
from pallas_kernels.decode_attention.tuning import VMEM_LIMIT, Geometry


def _body(names: list[str], together: int, rings: int, repeat_ref, *refs) -> None:
    del repeat_ref  # read by the block specs
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    together, count, dtype = range(together), r.index.shape[2], r.q.dtype

    def fetched(i: int) -> visibility.Visible:
        num_rows = count * dtype.itemsize // 4  # of words
        keys = r.fetched[i * num_rows : (i + 1) * num_rows]
        return visibility.Visible(pltpu.bitcast(keys, dtype), r.index[i] >= 0)

    def ring(i: int) -> visibility.Visible:
        parts = [getattr(r, f"ring{i}_{part}")[...] for part in range(rings)]
        return visibility.ring_tile(stored.decoded_ring(parts, dtype), r.view[i])

    states = [online_softmax.from_sink(r.sink[...], 1) for _ in together]
    tiles = [[ring(i), fetched(i)] for i in together]
    for i, state in enumerate(online_softmax.attend(states, [r.q[i] for i in together], tiles)):
        o, lse = online_softmax.results(state)
        r.o[i], r.lse[i] = o.astype(dtype), lse


def attend_fetched(
    g: Geometry,
    q: jax.Array,
    view: jax.Array,
    ring: stored.Entries,
    sink: jax.Array,
    repeat: jax.Array,
    fetched: jax.Array,
    index: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """o[B * T, H, Dh] and lse f32[B * T, 1, H].

    Args:
        q: [B * T, H, Dh]; view: i32[B * T, 1, 4], see `visibility.views`; ring: [R, B, M, Dh] or fp8;
        sink: f32[H, 1]; repeat: i32[1]; fetched: the entries that the lists name, all finite, those for -1
        too: f32[n, Dh], n >= B * T * K, or bfloat16 in pairs, u32[n / 2, Dh];
        index: i32[B * T, 1, K], K a multiple of 16.
    """
    steps, count = index.shape[0], index.shape[2]
    together = min(g.blocks.sequences, steps)

    def per_query(*shape):
        return pl.BlockSpec((together, *shape), lambda i, _: (i, *(0 for _ in shape)))

    def own_ring(part, k):
        def at(i, repeat):
            return repeat[0], quotient(jnp.minimum(i * together + k, steps - 1), g.queries), 0, 0

        return pl.BlockSpec((None, None, *part.shape[2:]), at)

    rings = stored.ring_parts(ring)
    ring_names = [f"ring{k}_{part}" for k in range(together) for part in range(len(rings))]
    names = ["q", "view", "sink", "index", "fetched", *ring_names, "o", "lse"]
    keys = steps * (g.slots + count)
    return pl.pallas_call(
        functools.partial(_body, names, together, len(rings)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cdiv(steps, together),),
            in_specs=[
                per_query(g.heads, g.width),
                per_query(1, 4),
                pl.BlockSpec((g.heads, 1), lambda i, _: (0, 0)),
                per_query(1, count),
                pl.BlockSpec((together * count * g.itemsize // 4, g.width), lambda i, _: (i, 0)),
                *(own_ring(part, k) for k in range(together) for part in rings),
            ],
            out_specs=[per_query(g.heads, g.width), per_query(1, g.heads)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((steps, 1, g.heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=4 * g.heads * keys * g.width,
            transcendentals=g.heads * keys,
            bytes_accessed=(2 * q.size + keys * g.width) * g.itemsize,
        ),
        interpret=interpret,
        name="decode_attention_fetched",
    )(repeat, q, view, sink, index, fetched, *(list(rings) * together))
