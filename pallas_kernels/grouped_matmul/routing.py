"""Token-expert pairs in expert order, as one sorted array of integer keys.

A key is `expert << shift | pair`, where pair = token * Ke + k and `shift` bits hold any pair number. Sorting
single keys is cheaper on a CPU than `argsort` (two operands) and than ranks by cumulative one-hot sums
(P * E work); everything else is read off the keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32


class SortedPairs(NamedTuple):
    """Keys in order; pairs of no expert (padding tokens, ids out of range) stand behind `total`.

    Attributes:
        keys: i32[P + rows]; the tail repeats a key of no expert, so that a block of `rows` places may
            start anywhere before P.
        shift: bits of the pair number.
        total: i32[] pairs that have an expert.
    """

    keys: Int32[Array, " places"]
    shift: int
    total: Int32[Array, ""]

    def expert_at(self, place: Int32[Array, ""]) -> Int32[Array, ""]:
        """Expert of the pair at a sorted place before `total`."""
        return self.keys[place] >> self.shift

    def end_of(self, expert: Int32[Array, ""]) -> Int32[Array, ""]:
        """The sorted place behind the last pair of an expert."""
        return (self.keys < ((expert + 1) << self.shift)).sum(dtype=jnp.int32)

    def pairs_at(self, place: Int32[Array, ""], rows: int) -> Int32[Array, " rows"]:
        """Pair numbers at `rows` sorted places from `place` on."""
        keys = lax.dynamic_slice_in_dim(self.keys, place, rows)
        return keys & ((1 << self.shift) - 1)


def key_bits(num_pairs: int, num_experts: int) -> int:
    """Bits of the largest key; more than 31 cannot be sorted as int32."""
    return num_pairs.bit_length() + num_experts.bit_length()


def sort_pairs(
    expert_ids: Int32[Array, "T Ke"], valid: Bool[Array, "T"] | None, *, num_experts: int, rows: int
) -> SortedPairs:
    """Sorts a routing decision by expert, then by token."""
    num_pairs = expert_ids.size
    shift = num_pairs.bit_length()
    routed = (expert_ids >= 0) & (expert_ids < num_experts)
    if valid is not None:
        routed &= valid[:, None]
    experts = jnp.where(routed, expert_ids, num_experts).reshape(-1).astype(jnp.int32)
    keys = lax.sort((experts << shift) + jnp.arange(num_pairs, dtype=jnp.int32), is_stable=False)
    nobody = num_experts << shift
    return SortedPairs(
        jnp.pad(keys, (0, rows), constant_values=nobody),
        shift,
        (keys < nobody).sum(dtype=jnp.int32),
    )
