"""Token-expert pairs in expert order: the bookkeeping shared by forward and backward."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32


class SortedPairs(NamedTuple):
    """Pairs ordered by expert, then by token; pairs of padding tokens come last and are never read.

    Attributes:
        order: i32[P + rows] pair number t * Ke + k at each sorted place (tail: zeros, so that a block
            of `rows` places may run past the end).
        offsets: i32[E + 1] first sorted place of each expert; offsets[E] is the number of valid pairs.
        used: i32[min(E, P)] experts with at least one pair, ascending; only `num_used` are meaningful.
        num_used: i32[] length of that list.
    """

    order: Int32[Array, "P_plus_rows"]
    offsets: Int32[Array, "E_plus_1"]
    used: Int32[Array, "U"]
    num_used: Int32[Array, ""]


def sort_pairs(
    expert_ids: Int32[Array, "T Ke"], valid: Bool[Array, "T"] | None, *, num_experts: int, rows: int
) -> SortedPairs:
    """Counting layout of a routing decision.

    One sort of a single int32 key (expert above pair number): on a CPU cheaper than `argsort`, which
    moves two operands, and than ranks by cumulative one-hot sums, which cost P * E.
    """
    num_pairs = expert_ids.size
    shift = num_pairs.bit_length()
    if valid is not None:
        expert_ids = jnp.where(valid[:, None], expert_ids, num_experts)
    keys = (expert_ids.reshape(-1).astype(jnp.int32) << shift) + jnp.arange(num_pairs, dtype=jnp.int32)
    keys = lax.sort(keys, is_stable=False)  # keys are distinct
    order = jnp.pad(keys & ((1 << shift) - 1), (0, rows))
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    offsets = (keys[None, :] < (experts << shift)[:, None]).sum(axis=1, dtype=jnp.int32)
    has_pairs = offsets[1:] > offsets[:-1]
    (used,) = jnp.nonzero(has_pairs, size=min(num_experts, num_pairs), fill_value=0)
    return SortedPairs(order, offsets, used.astype(jnp.int32), has_pairs.sum(dtype=jnp.int32))


def block_places(
    pairs: SortedPairs, expert: jax.Array, block: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Pair numbers i32[rows] of one block of an expert, and bool[rows]: which belong to the expert."""
    start = pairs.offsets[expert] + block * rows
    places = start + jnp.arange(rows, dtype=jnp.int32)
    return lax.dynamic_slice_in_dim(pairs.order, start, rows), places < pairs.offsets[expert + 1]
