"""Who sees whom: the mask of a tile, and which tiles need no visit at all.

Masks are float32 biases (0 or -inf) of [queries, keys]: they are made once a query and broadcast over its
heads, so that the tile of logits costs one addition. A softmax never sees a row of -inf only: the sink is
finite and takes part in the maximum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.arithmetic import cdiv, quotient

REACH, LO, HI = range(3)
"""Columns of a view: tokens seen before the query itself, then its entries lo <= s < hi."""


def views(
    position: Int32[Array, "B T"],
    lo: Int32[Array, "B T"] | None,
    hi: Int32[Array, "B T"] | None,
    window: int,
    num_entries: int,
    query_block: int,
) -> Int32[Array, "B padded_T 3"]:
    """What every query sees, padded to whole blocks with queries that see nothing."""
    reach = jnp.minimum(position, window - 1)
    lo, hi = (jnp.zeros_like(reach) if x is None else jnp.clip(x, 0, num_entries) for x in (lo, hi))
    columns = jnp.stack([reach, lo, hi], axis=-1)
    padding = -reach.shape[1] % query_block
    blind = jnp.broadcast_to(jnp.array([-1, 0, 0], jnp.int32), (reach.shape[0], padding, 3))
    return jnp.concatenate([columns, blind], axis=1)


class Range(NamedTuple):
    """First and last block to visit, flat over (batch, block); first > last where there is none."""

    first: Int32[Array, "N"]
    last: Int32[Array, "N"]


def entry_blocks_of_queries(view: Int32[Array, "B padded_T 3"], query_block: int, entry_block: int) -> Range:
    """The entry blocks that at least one query of each query block may see."""
    blocked = view.reshape(-1, query_block, 3)
    lo, hi = blocked[..., LO], blocked[..., HI]
    sees = hi > lo
    first = jnp.where(sees, lo, jnp.iinfo(jnp.int32).max).min(axis=1) // entry_block
    last = (jnp.where(sees, hi, 0).max(axis=1) - 1) // entry_block  # -1 where nobody sees anything
    return Range(first, last)


def query_blocks_of_entries(blocks: Range, batch: int, num_entry_blocks: int) -> Range:
    """The turned table: first and last query block that visits each entry block."""
    first, last = (x.reshape(batch, 1, -1) for x in blocks)
    entry = jnp.arange(num_entry_blocks, dtype=jnp.int32)[:, None]
    visits = (first <= entry) & (entry <= last)  # [B, entry blocks, query blocks]
    num_query_blocks = visits.shape[-1]
    query = jnp.arange(num_query_blocks, dtype=jnp.int32)
    return Range(
        jnp.where(visits, query, num_query_blocks).min(axis=-1).reshape(-1).astype(jnp.int32),
        jnp.where(visits, query, -1).max(axis=-1).reshape(-1).astype(jnp.int32),
    )


def clamp(block: jax.Array, first: jax.Array, last: jax.Array, count: int) -> jax.Array:
    """`block`, moved into first .. last: a block that is not visited is then not fetched either."""
    return jnp.clip(jnp.clip(block, first, last), 0, count - 1)


class LineBlocks(NamedTuple):
    """Which query blocks see line block j: those that overlap places j * size - (W - 1) .. (j + 1) * size."""

    size: int
    query_block: int
    num_query_blocks: int
    window: int

    def first(self, j):
        """The first query block; j may be traced."""
        place = j * self.size - (self.window - 1)
        if isinstance(j, int):
            return max(place, 0) // self.query_block
        return quotient(jnp.maximum(place, 0), self.query_block)

    def last(self, j):
        """The last query block; j may be traced."""
        place = (j + 1) * self.size - 1
        if isinstance(j, int):
            return min(place // self.query_block, self.num_query_blocks - 1)
        return jnp.minimum(quotient(place, self.query_block), self.num_query_blocks - 1)

    def steps(self, line_length: int) -> int:
        """Query blocks of the line block that has most of them."""
        return max(1 + self.last(j) - self.first(j) for j in range(cdiv(line_length, self.size)))


def window_bias(view: Int32[Array, "q 3"], offset: jax.Array | int, num_keys: int) -> Float32[Array, "q k"]:
    """Bias of line places; `offset` is how many tokens the first query lies behind the first key."""
    shape = (view.shape[0], num_keys)
    distance = _iota(shape, 0) - _iota(shape, 1) + offset
    return _bias((distance >= 0) & (distance <= view[:, REACH : REACH + 1]))


def entry_bias(
    view: Int32[Array, "q 3"], first_entry: jax.Array, num_keys: int, selected: jax.Array | None
) -> Float32[Array, "q k"]:
    """Bias of the entries from `first_entry` on; `selected` is i8[q, k] or None for all."""
    index = first_entry + _iota((view.shape[0], num_keys), 1)
    visible = (index >= view[:, LO : LO + 1]) & (index < view[:, HI : HI + 1])
    if selected is not None:
        visible &= selected.astype(jnp.int32) != 0
    return _bias(visible)


def _bias(visible: jax.Array) -> jax.Array:
    return jnp.where(visible, jnp.float32(0), -jnp.inf)


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
