"""Sorted pairs cut into work items: one expert and at most `rows` of its pairs, in a list of fixed length.

The TPU kernels walk this list. Places are rows of an array [items, rows, ...] in which every item has its own
`rows` places, of which the first `count` are in use.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.arithmetic import quotient
from pallas_kernels.grouped_matmul.routing import sort_pairs


class WorkItems(NamedTuple):
    """Items that are not in use stand behind `total`, the last one always; they repeat the last expert.

    Attributes:
        expert: i32[items] 0 .. E-1.
        count: i32[items] places in use, 0 .. rows.
        total: i32[1] items in use.
        pair: i32[items, rows] the pair (token * Ke + k) of every place; any pair where none is in use.
        place: i32[T, Ke] item * rows + row of every pair.
        routed: bool[T, Ke] pairs that have a place.
    """

    expert: Int32[Array, " items"]
    count: Int32[Array, " items"]
    total: Int32[Array, "1"]
    pair: Int32[Array, "items rows"]
    place: Int32[Array, "T Ke"]
    routed: Bool[Array, "T Ke"]

    @property
    def used(self) -> Bool[Array, "items rows"]:
        return jnp.arange(self.pair.shape[1], dtype=jnp.int32) < self.count[:, None]


def most_items(num_pairs: int, num_experts: int, rows: int, *, every_expert: bool) -> int:
    """The length of the list: no routing needs more, and one is left over."""
    partly_filled = num_experts if every_expert else min(num_pairs, num_experts)
    return partly_filled + num_pairs // rows + 1


def work_items(
    expert_ids: Int32[Array, "T Ke"],
    valid: Bool[Array, "T"],
    *,
    num_experts: int,
    rows: int,
    every_expert: bool = False,
) -> WorkItems:
    """The items of a routing decision, by expert and then by token.

    Args:
        every_expert: an expert without pairs gets an item without rows.
    """
    pairs = sort_pairs(expert_ids, valid, num_experts=num_experts, rows=0)
    keys, shift = pairs.keys, pairs.shift
    bounds = jnp.arange(num_experts + 1, dtype=jnp.int32) << shift
    # All compared with all, one operation: searching by halves is a loop of small ones, dearer on a TPU.
    start = jnp.searchsorted(keys, bounds, method="compare_all").astype(jnp.int32)
    blocks = quotient(start[1:] - start[:-1] + (rows - 1), rows)
    if every_expert:
        blocks = jnp.maximum(blocks, 1)
    behind = jnp.cumsum(blocks, dtype=jnp.int32)
    first, total = behind - blocks, behind[-1]

    length = most_items(expert_ids.size, num_experts, rows, every_expert=every_expert)
    number = jnp.minimum(jnp.arange(length, dtype=jnp.int32), jnp.maximum(total - 1, 0))
    expert = jnp.searchsorted(behind, number, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)
    begin = start[expert] + (number - first[expert]) * rows
    count = jnp.clip(start[expert + 1] - begin, 0, rows)
    count = jnp.where(jnp.arange(length, dtype=jnp.int32) < total, count, 0)

    sorted_place = begin[:, None] + jnp.arange(rows, dtype=jnp.int32)
    last = max(expert_ids.size - 1, 0)
    pair = keys.at[jnp.minimum(sorted_place, last)].get(mode="promise_in_bounds") & ((1 << shift) - 1)

    at = jnp.arange(keys.size, dtype=jnp.int32)
    of = jnp.minimum(keys >> shift, num_experts - 1)
    place = first[of] * rows + at - start[of]
    inverse = jnp.zeros(keys.shape, jnp.int32).at[keys & ((1 << shift) - 1)].set(place, unique_indices=True)
    routed = (expert_ids >= 0) & (expert_ids < num_experts) & valid[:, None]
    place = jnp.where(routed, inverse.reshape(expert_ids.shape), 0)
    return WorkItems(expert, count, total.reshape(1).astype(jnp.int32), pair, place, routed)


def token_rows(x: Array, items: WorkItems) -> Array:
    """[items, rows, C]: the token's row at every place in use, any token's at the others."""
    return x.at[quotient(items.pair, items.place.shape[1])].get(mode="promise_in_bounds")


def sum_rows(rows: Array, items: WorkItems, weights: Array | None = None) -> Array:
    """f32[T, C]: every token's rows of [items, rows, C], weighted, added in ascending expert order."""
    flat = rows.reshape(-1, rows.shape[-1])
    weights = jnp.ones(items.place.shape, jnp.float32) if weights is None else weights
    # Places ascend with the expert; pairs without one go last, where adding nothing changes nothing.
    key = jnp.where(items.routed, items.place, jnp.iinfo(jnp.int32).max)
    key, place, weights = lax.sort((key, items.place, weights), dimension=1, num_keys=1)
    total = jnp.zeros((len(place), flat.shape[1]), jnp.float32)
    for k in range(place.shape[1]):
        row = flat.at[place[:, k]].get(mode="promise_in_bounds").astype(jnp.float32)
        routed = key[:, k, None] != jnp.iinfo(jnp.int32).max
        total += jnp.where(routed, row * weights[:, k, None], 0)
    return total


def of_pairs(values: jax.Array, items: WorkItems) -> jax.Array:
    """f32[T, Ke]: the number at every pair's place of [items, rows]; zeros for pairs without one."""
    return jnp.where(items.routed, values.reshape(-1)[items.place], 0)
