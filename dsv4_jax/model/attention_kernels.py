"""Core attention and writes to its cache by Pallas kernels; operands as in `core_attention` and `cache`."""

import jax
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.model import cache
from dsv4_jax.model.core_attention import Queries
from dsv4_jax.model.entries import Entries
from dsv4_jax.numerics.cache_formats import Stored
from pallas_kernels import decode_attention as decode_family
from pallas_kernels import entry_write
from pallas_kernels import hybrid_attention as attention_family
from pallas_kernels import indexer as indexer_family
from pallas_kernels.columns import Columns
from pallas_kernels.hybrid_attention import tuning as attention_tuning


def hybrid_attention(
    queries: Queries,
    line: Float[Array, "B past+T Dh"],
    entries: Entries | None,
    index_keys: Entries | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    rounded_scores: bool = False,
    forward_only: bool = False,
    interpret: bool,
) -> Float[Array, "B T H Dh"]:
    """Attention of T queries by the kernels of `indexer` and `hybrid_attention`, forward and backward.

    Args:
        queries, line, entries, index_keys, sink, window, top_k: as `core_attention.hybrid_attention`.
        forward_only: nobody asks for gradients (a call with a cache). Only then, once a query sees as many
            entries as `tuning.gather_from` says, the chosen ones are fetched row by row; else all visible
            ones are read and masked.
        interpret: run the kernels in the interpreter.

    Raises:
        ValueError: for rounded_scores, which no kernel computes.
    """
    if rounded_scores:
        raise ValueError("rounded_scores: no kernel rounds the steps of its index scores")
    line = line.astype(queries.q.dtype)
    near = (queries.q, line, queries.position, sink)
    how = {"window": window, "interpret": interpret}
    if entries is None or not (size := entries.size):
        return attention_family.hybrid_attention(*near, **how)[0]
    chosen = None
    if index_keys is not None and size > top_k:
        chosen = indexer_family.index_select(
            queries.index_q,
            queries.index_weights,
            index_keys.prefix(size, queries.index_q.dtype),
            queries.lo,
            queries.hi,
            top_k,
            interpret=interpret,
        )

    def masked() -> Float[Array, "B T H Dh"]:
        values = entries.prefix(size, line.dtype)
        return attention_family.hybrid_attention(*near, values, queries.lo, queries.hi, chosen, **how)[0]

    def gathered() -> Float[Array, "B T H Dh"]:
        index = indexer_family.index_list(chosen, top_k)
        if isinstance(entries.stack, jax.Array) and entries.stack.dtype == line.dtype:
            values, repeat = entries.stack, entries.repeat  # where it lies
        else:
            values, repeat = entries.prefix(size, line.dtype), None
        return attention_family.csa_attention(*near, values, queries.lo, queries.hi, index, repeat, **how)[0]

    if chosen is None or not forward_only:
        return masked()
    heads, width = queries.q.shape[2:]
    first = attention_tuning.gather_from(
        size=size, num_chosen=top_k, heads=heads, width=width, itemsize=line.dtype.itemsize
    )
    if first > size:
        return masked()
    return jax.lax.cond((queries.hi - queries.lo).max() >= first, gathered, masked)


def decode_attention(
    queries: Queries,
    ring: Stored,
    repeat: Int32[Array, ""],
    entries: Entries | None,
    index_keys: Entries | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    interpret: bool,
) -> Float[Array, "B T H Dh"]:
    """Attention of a few new tokens over the cache where it lies; no gradients.

    Args:
        queries: of the call, whose rows and entries are in the cache already.
        ring: the stack of window rings [R, B, M, Dh], and `repeat`, which of them.
        entries, index_keys: whole stacks, of the same repeat. All three in the cache's format: the kernels
            read FP8 rows, FP8 or FP4 keys as they lie.
        sink, window, top_k, interpret: as `hybrid_attention`.
    """
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
                interpret=interpret,
            )
            index = indexer_family.index_list(chosen, top_k)
    o, _ = decode_family.decode_attention(
        queries.q,
        ring,
        queries.position,
        sink,
        repeat,
        values,
        hi,
        index,
        window=window,
        interpret=interpret,
    )
    return o


def write_entries(
    entries: Stored,
    repeat: Int32[Array, ""],
    new: Stored,
    first: Int32[Array, "B"],
    count: Int32[Array, "B"],
    *,
    interpret: bool,
) -> Stored:
    """As `cache.write_entries`; narrow arrays, which XLA would copy whole, in place.

    Args:
        entries, repeat, new, first, count: as there.
        interpret: run the kernel in the interpreter.
    """
    if isinstance(entries, Columns):
        return entry_write.write_entries(entries, repeat, new, first, count, interpret=interpret)
    return cache.write_entries(entries, repeat, new, first, count)
