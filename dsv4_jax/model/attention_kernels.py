"""Core attention by Pallas kernels; operands and result as in `core_attention.py`."""

from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.model.core_attention import Entries, Queries
from pallas_kernels import decode_attention as decode_family
from pallas_kernels import hybrid_attention as attention_family
from pallas_kernels import indexer as indexer_family


def hybrid_attention(
    queries: Queries,
    line: Float[Array, "B past+T Dh"],
    entries: Entries | None,
    index_keys: Entries | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    interpret: bool,
) -> Float[Array, "B T H Dh"]:
    """Attention of T queries by the kernels of `indexer` and `hybrid_attention`, forward and backward.

    Args:
        queries, line, entries, index_keys, sink, window, top_k: as `core_attention.hybrid_attention`.
        interpret: run the kernels in the interpreter.
    """
    values = selected = lo = hi = None
    if entries is not None and (size := entries.size):
        values, lo, hi = entries.prefix(size, queries.q.dtype), queries.lo, queries.hi
        if index_keys is not None and size > top_k:
            keys = index_keys.prefix(size, queries.index_q.dtype)
            selected = indexer_family.index_select(
                queries.index_q, queries.index_weights, keys, lo, hi, top_k, interpret=interpret
            )
    o, _ = attention_family.hybrid_attention(
        queries.q,
        line.astype(queries.q.dtype),
        queries.position,
        sink,
        values,
        lo,
        hi,
        selected,
        window=window,
        interpret=interpret,
    )
    return o


def decode_attention(
    queries: Queries,
    ring: Float[Array, "R B M Dh"],
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
        ring: the stack of window rings, and `repeat`, which of them.
        entries, index_keys: whole stacks, of the same repeat.
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
