"""Core attention by the ops of `indexer`, `hybrid_attention` and `decode_attention`; contract in `op`."""

import jax
from jaxtyping import Array, Float, Float32

from pallas_kernels import decode_attention as decode_family
from pallas_kernels import hybrid_attention as attention_family
from pallas_kernels import indexer as indexer_family
from pallas_kernels.core_attention.operands import Queries
from pallas_kernels.held_rows import HeldRows
from pallas_kernels.hybrid_attention import tuning as attention_tuning


def attend_by_kernels(
    queries: Queries,
    line: Float[Array, "B past+T Dh"],
    entries: HeldRows | None,
    index_keys: HeldRows | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    forward_only: bool,
    how: dict,
) -> Float[Array, "B T H Dh"]:
    """As `op.attend`; `how` are `impl` and `interpret` for each of the ops."""
    line = line.astype(queries.q.dtype)
    near = (queries.q, line, queries.position, sink)
    sized = {"window": window, **how}
    if entries is None or not (size := entries.size):
        return attention_family.hybrid_attention(*near, **sized)[0]
    chosen = None
    if index_keys is not None and size > top_k:
        chosen = indexer_family.index_select(
            queries.index_q,
            queries.index_weights,
            index_keys.prefix(size, queries.index_q.dtype),
            queries.lo,
            queries.hi,
            top_k,
            **how,
        )

    def masked() -> Float[Array, "B T H Dh"]:
        values = entries.prefix(size, line.dtype)
        return attention_family.hybrid_attention(*near, values, queries.lo, queries.hi, chosen, **sized)[0]

    def gathered() -> Float[Array, "B T H Dh"]:
        index = indexer_family.index_list(chosen, top_k)
        if entries.are_numbers(line.dtype):
            values, repeat = entries.stack, entries.repeat  # where it lies
        else:
            values, repeat = entries.prefix(size, line.dtype), None
        operands = (*near, values, queries.lo, queries.hi, index)
        return attention_family.csa_attention(*operands, repeat=repeat, **sized)[0]

    if chosen is None or not forward_only:
        return masked()
    heads, width = queries.q.shape[2:]
    first = attention_tuning.gather_from(
        size=size, num_chosen=top_k, heads=heads, width=width, itemsize=line.dtype.itemsize
    )
    if first > size:
        return masked()
    return jax.lax.cond((queries.hi - queries.lo).max() >= first, gathered, masked)


def attend_cached_by_kernels(
    queries: Queries,
    ring: HeldRows,
    entries: HeldRows | None,
    index_keys: HeldRows | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    how: dict,
) -> Float[Array, "B T H Dh"]:
    """As `op.attend_cached`: ring, entries and keys are read where they lie, in the cache's format."""
    values = hi = index = None
    if entries is not None and (size := entries.size):
        values = entries.stack
        if index_keys is None or size <= top_k:
            hi = queries.hi
        else:
            chosen = indexer_family.index_select(
                queries.index_q,
                queries.index_weights,
                index_keys.stack,
                queries.lo,
                queries.hi,
                top_k,
                repeat=index_keys.repeat,
                **how,
            )
            index = indexer_family.index_list(chosen, top_k)
    o, _ = decode_family.decode_attention(
        queries.q,
        ring.stack,
        queries.position,
        sink,
        values,
        hi,
        index,
        repeat=ring.repeat,
        window=window,
        **how,
    )
    return o
