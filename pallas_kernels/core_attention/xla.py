"""Core attention in plain XLA; the contract is in `op`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.core_attention.operands import Queries
from pallas_kernels.held_rows import HeldRows
from pallas_kernels.indexer.xla import index_scores_xla, select_list_xla, select_xla
from pallas_kernels.precision import einsum_float32

SMALLEST_EXTENT = 64
"""Entries are read in power-of-two prefixes from this size on; the smallest one that is long enough runs."""

GATHER_BEYOND = 8
"""Above this many times top-k entries, gathering the chosen ones beats masking all of them on a CPU."""


def softmax_attention(
    q: Float[Array, "B c H Dh"],
    keys: Float[Array, "B K Dh"],
    visible: Bool[Array, "B c K"],
    sink: Float32[Array, "H"],
) -> Float[Array, "B c H Dh"]:
    """One softmax over the visible keys and a per-head sink without a value (report, section 2.3).

    Logits, maximum, sums and accumulation are float32; the sink is not scaled and takes part in the
    maximum. Probabilities meet the values in the compute dtype.
    """
    weight, total = sink_softmax(q, keys, visible, sink)
    out = einsum_float32("bchk,bkd->bchd", weight.astype(keys.dtype), keys)
    return (out / total).astype(keys.dtype)


def sink_softmax(q, keys, visible, sink):
    """Unnormalised weights f32[B, c, H, K] and their sum, the sink included, f32[B, c, H, 1]."""
    batch, count, heads, width = q.shape
    # With a head's dimension of its own XLA:CPU multiplies by a transposed copy of the keys.
    flat = q.reshape(batch, count * heads, width)
    logits = einsum_float32("bnd,bkd->bnk", flat, keys)
    logits = logits.reshape(batch, count, heads, -1)
    logits = jnp.where(visible[:, :, None], logits * width**-0.5, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1), sink))[..., None]
    weight = jnp.exp(logits - top)
    return weight, weight.sum(axis=-1, keepdims=True) + jnp.exp(sink[:, None] - top)


def attend_xla(
    queries: Queries,
    line: Float[Array, "B past+T Dh"],
    entries: HeldRows | None,
    index_keys: HeldRows | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    rounded_scores: bool,
) -> Float[Array, "B T H Dh"]:
    """As `op.attend`, a block of queries at a time.

    Every block reads only the shortest power-of-two prefix of the entries that holds all it can see, so the
    work follows the live length, not the capacity.
    """
    batch, length = queries.position.shape
    block = query_block(length)
    num_blocks = -(-length // block)
    padding = num_blocks * block - length
    line = jnp.pad(line, ((0, 0), (0, padding), (0, 0)))
    sizes = {"window": window, "top_k": top_k, "rounded_scores": rounded_scores}
    attend = functools.partial(_attend_block, line, entries, index_keys, sink, **sizes)
    if num_blocks == 1:
        return attend(jnp.int32(0), queries)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_blocks, block, *x.shape[2:]), 1, 0)

    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block
    # Recomputing a block in backward keeps memory at one block of scores, whatever T is.
    out = jax.lax.map(jax.checkpoint(lambda xs: attend(*xs)), (starts, jax.tree.map(split, queries)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]


def attend_cached_xla(
    queries: Queries,
    ring: HeldRows,
    entries: HeldRows | None,
    index_keys: HeldRows | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    rounded_scores: bool,
) -> Float[Array, "B T H Dh"]:
    """As `op.attend_cached`: the rows that the window can see are gathered, then it is `attend_xla`."""
    line = line_of(queries, ring, window)
    sizes = {"window": window, "top_k": top_k, "rounded_scores": rounded_scores}
    return attend_xla(queries, line, entries, index_keys, sink, **sizes)


def line_of(queries: Queries, ring: HeldRows, window: int) -> Float[Array, "B past+T Dh"]:
    """Rows of the W - 1 tokens before a call and of the call itself, from the ring that holds them."""
    first = queries.position[:, :1] - (window - 1)
    count = window - 1 + queries.position.shape[1]
    return ring.at_positions(first + jnp.arange(count, dtype=jnp.int32), queries.q.dtype)


def query_block(length: int) -> int:
    """Queries attended to at once: all of a short call, else 128 (measured in experiments/bench_cpu.py)."""
    return length if length <= 256 else 128


def _attend_block(line, entries, index_keys, sink, start, queries, *, window, top_k, rounded_scores):
    count = queries.position.shape[1]
    near = jax.lax.dynamic_slice_in_dim(line, start, count + window - 1, axis=1)
    near_visible = window_visible(queries.position, window)
    if entries is None or entries.size == 0:
        return softmax_attention(queries.q, near, near_visible, sink)

    def attend_prefix(size: int) -> jax.Array:
        visible = entries_visible(queries, size)
        if index_keys is not None and size > top_k:
            scores = _scores(queries, index_keys, size, rounded_scores)
            if size > GATHER_BEYOND * top_k:
                return _attend_gathered(queries, near, near_visible, entries, scores, visible, sink, top_k)
            visible = select_xla(scores, visible, top_k)
        values = entries.prefix(size, near.dtype)
        return softmax_attention(
            queries.q,
            jnp.concatenate([near, values], axis=1),
            jnp.concatenate([near_visible, visible], axis=2),
            sink,
        )

    sizes = prefix_sizes(entries.size)
    if len(sizes) == 1:
        return attend_prefix(sizes[0])
    needed = queries.hi.max()
    branch = sum((needed > size).astype(jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(branch, [functools.partial(attend_prefix, size) for size in sizes])


def window_visible(position: Int32[Array, "B c"], window: int) -> Bool[Array, "B c K"]:
    """Which of the c + W - 1 window entries each query sees: the last W of its own segment."""
    count = position.shape[1]
    # Query a stands at place window - 1 + a, so the key at place j lies `distance` tokens before it.
    distance = (
        jnp.arange(count, dtype=jnp.int32)[:, None]
        + (window - 1)
        - jnp.arange(count + window - 1, dtype=jnp.int32)
    )
    return (distance >= 0) & (distance <= jnp.minimum(position, window - 1)[..., None])


def entries_visible(queries: Queries, size: int) -> Bool[Array, "B c size"]:
    index = jnp.arange(size, dtype=jnp.int32)
    return (index >= queries.lo[..., None]) & (index < queries.hi[..., None])


def _scores(queries: Queries, index_keys: HeldRows, size: int, rounded: bool) -> Float32[Array, "B c size"]:
    # Choosing entries is not differentiable: cut here, no loop over the keys is linearised.
    q, weights, keys = jax.lax.stop_gradient((queries.index_q, queries.index_weights, index_keys))
    return index_scores_xla(q, weights, keys, size, rounded=rounded)


def view(
    queries: Queries,
    near: Float[Array, "B past+T Dh"] | HeldRows,
    entries: HeldRows | None,
    index_keys: HeldRows | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    rounded_scores: bool,
    collect: frozenset[str],
) -> dict[str, jax.Array]:
    """What the queries look at, for inspection: dense, so for short calls only.

    Args:
        queries, entries, index_keys, sink, window, top_k, rounded_scores: as `op.attend`.
        near: the line of `op.attend`, or the ring of `op.attend_cached`.
        collect: "selected" and "attention".

    Returns:
        "selected": bool[B, T, S], the entries the indexer chose (CSA layers);
        "attention": f32[B, T, H, W - 1 + T + S], probabilities over the window entries, then the entries.
    """
    line = near if isinstance(near, jax.Array) else line_of(queries, near, window)
    taps = {}
    keys, visible = line, window_visible(queries.position, window)
    if entries is not None:
        size = entries.size
        chosen = entries_visible(queries, size)
        if index_keys is not None:
            if size > top_k:
                chosen = select_xla(_scores(queries, index_keys, size, rounded_scores), chosen, top_k)
            taps["selected"] = chosen
        keys = jnp.concatenate([line, entries.prefix(size, line.dtype)], axis=1)
        visible = jnp.concatenate([visible, chosen], axis=2)
    if "attention" in collect:
        weight, total = sink_softmax(queries.q, keys, visible, sink)
        taps["attention"] = weight / total
    return {name: taps[name] for name in sorted(collect & taps.keys())}


def prefix_sizes(capacity: int) -> tuple[int, ...]:
    """Doubling from SMALLEST_EXTENT up to the capacity."""
    sizes, size = [], SMALLEST_EXTENT
    while size < capacity:
        sizes.append(size)
        size *= 2
    return (*sizes, capacity)


def _attend_gathered(queries, near, near_visible, entries, scores, visible, sink, top_k):
    """CSA over a long list: the chosen entries of each query are gathered, not masked."""
    index, any_chosen = select_list_xla(scores, visible, top_k)
    size = scores.shape[-1]

    def one_query(xs):
        q, near_seen, chosen, seen = xs  # [B, H, Dh], [B, K], [B, Ki], [B, Ki]
        keys = jnp.concatenate([near, entries.chosen(chosen, size, near.dtype)], axis=1)
        visible = jnp.concatenate([near_seen, seen], axis=1)
        return softmax_attention(q[:, None], keys, visible[:, None], sink)[:, 0]

    by_query = [jnp.moveaxis(x, 1, 0) for x in (queries.q, near_visible, index, any_chosen)]
    return jnp.moveaxis(jax.lax.map(one_query, tuple(by_query)), 0, 1)
