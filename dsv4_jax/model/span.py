"""Where the tokens of one call stand: positions, validity, and the blocks they complete.

Computed once a call and shared by all layers. Three situations, one description: tokens appended to a
cache (`appended`), whole sequences without a cache (`from_start`), and packed rows (`packed`), where
several segments share a row and nothing crosses a segment (report, section 4.2).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from dsv4_jax.model.geometry import CompressorGeometry
from dsv4_jax.model.rope import Rotation, rotation


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "position", "valid", "start", "num_valid"],
    meta_fields=["is_packed"],
)
@dataclasses.dataclass(frozen=True)
class Span:
    """The tokens of one call. `position` counts from the start of the token's segment."""

    ids: Int32[Array, "B T"]
    position: Int32[Array, "B T"]
    valid: Bool[Array, "B T"]
    start: Int32[Array, "B"]  # tokens already in the cache
    num_valid: Int32[Array, "B"]
    is_packed: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["source", "previous", "is_first", "rotation", "first", "count", "lo", "hi"],
    meta_fields=["in_ring"],
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The compressed entries that the tokens of one call can complete or see, for one ratio m.

    Entries form a list per row. `lo <= entry < hi` is what a query sees of it: blocks of its own segment
    whose last token is not after the query (report, section 2.3).
    """

    # The row behind each token of block p: of the ring if `in_ring`, else of [ring | new rows], and None
    # when the blocks stand in place.
    source: Int32[Array, "B P m"] | None
    previous: Int32[Array, "B P m"] | None  # the same for the block before (CSA)
    is_first: Bool[Array, "B P"]  # block 0 of its segment has no previous block
    rotation: Rotation  # at the position of the block's first token, f32[B, P, Dr / 2]
    first: Int32[Array, "B"]  # list index of the first new entry
    count: Int32[Array, "B"]  # new entries that are complete
    lo: Int32[Array, "B T"]
    hi: Int32[Array, "B T"]
    in_ring: bool = False  # a short call appended to a cache: its rows are written before any are gathered


def appended(ids: Int32[Array, "B T"], start: Int32[Array, "B"], num_valid: Int32[Array, "B"]) -> Span:
    """Tokens that continue each row of a cache at its own length; those past `num_valid` are padding."""
    offset = jnp.arange(ids.shape[1], dtype=jnp.int32)
    position = start[:, None] + offset
    return Span(ids, position, offset < num_valid[:, None], start, num_valid, False)


def from_start(ids: Int32[Array, "B T"], num_valid: Int32[Array, "B"]) -> Span:
    """Whole sequences, one a row."""
    return appended(ids, jnp.zeros(ids.shape[:1], jnp.int32), num_valid)


def packed(ids: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"]) -> Span:
    """Rows of several sequences: runs of equal segment id; id 0 is padding."""
    batch, length = ids.shape
    index = jnp.arange(length, dtype=jnp.int32)
    changed = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    segment_start = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
    valid = segment_ids > 0
    start = jnp.zeros((batch,), jnp.int32)
    num_valid = valid.sum(axis=1, dtype=jnp.int32)
    return Span(ids, index - segment_start, valid, start, num_valid, True)


def blocks_in_place(span: Span, ratio: int, frequencies: np.ndarray) -> Blocks:
    """Blocks of whole sequences: block s is rows m s .. m s + m - 1 of the call."""
    batch, length = span.ids.shape
    num_blocks = length // ratio
    index = jnp.broadcast_to(jnp.arange(num_blocks, dtype=jnp.int32), (batch, num_blocks))
    seen = jnp.where(span.valid, (span.position + 1) // ratio, 0)
    return Blocks(
        source=None,
        previous=None,
        is_first=index == 0,
        rotation=rotation(index * ratio, frequencies),
        first=span.start,
        count=span.num_valid // ratio,
        lo=jnp.zeros_like(seen),
        hi=seen,
    )


def blocks_appended(span: Span, geometry: CompressorGeometry, frequencies: np.ndarray) -> Blocks:
    """Blocks that tokens appended to a cache complete; rows before the call come from the ring."""
    length = span.ids.shape[1]
    ratio, slots = geometry.ratio, geometry.slots
    num_blocks = (length + ratio - 1) // ratio
    first = span.start // ratio
    index = first[:, None] + jnp.arange(num_blocks, dtype=jnp.int32)
    token = index[..., None] * ratio + jnp.arange(ratio, dtype=jnp.int32)

    in_ring = geometry.fits_in_ring(length)

    def row_behind(position: jax.Array) -> jax.Array:
        if in_ring:
            return position % slots
        fresh = position - span.start[:, None, None]
        row = jnp.where(fresh >= 0, slots + jnp.minimum(fresh, length - 1), position % slots)
        return row.astype(jnp.int32)

    seen = jnp.where(span.valid, (span.position + 1) // ratio, 0)
    return Blocks(
        source=row_behind(token),
        previous=row_behind(token - ratio),
        is_first=index == 0,
        rotation=rotation(index * ratio, frequencies),
        first=first,
        count=(span.start + span.num_valid) // ratio - first,
        lo=jnp.zeros_like(seen),
        hi=seen,
        in_ring=in_ring,
    )


def blocks_packed(span: Span, ratio: int, frequencies: np.ndarray) -> Blocks:
    """Blocks of packed rows, listed in row order; each lies within one segment and starts on its grid."""
    batch, length = span.ids.shape
    num_blocks = length // ratio
    ends = span.valid & ((span.position + 1) % ratio == 0)
    ended = jnp.cumsum(ends, axis=1, dtype=jnp.int32)  # blocks that end at or before each token
    # The p-th block ends at the first token whose running count reaches p + 1.
    wanted = jnp.arange(1, num_blocks + 1, dtype=jnp.int32)
    find = jax.vmap(lambda counts: jnp.searchsorted(counts, wanted, side="left"))
    end = jnp.minimum(find(ended), length - 1).astype(jnp.int32)
    token = end[..., None] - (ratio - 1) + jnp.arange(ratio, dtype=jnp.int32)
    position = jnp.take_along_axis(span.position, end, axis=1) - (ratio - 1)
    # A query at position p of its segment has floor((p + 1) / m) blocks of that segment behind it.
    own = (span.position + 1) // ratio
    return Blocks(
        source=jnp.maximum(token, 0),
        previous=jnp.maximum(token - ratio, 0),
        is_first=position == 0,
        rotation=rotation(position, frequencies),
        first=span.start,
        count=ended[:, -1],
        lo=jnp.where(span.valid, ended - own, 0),
        hi=jnp.where(span.valid, ended, 0),
    )
