"""Threshold selection: counting passes find the k-th largest score bit by bit; no row is sorted.

Paired median times relative to this file's (jax 0.10.2, two busy AVX2 cores; ReLU-like scores, a quarter to
all of a row visible). `plain` is the same idea with 32 passes, in each a sum over the last axis, and a prefix
sum for ties; `top_k` is `lax.top_k` and a scatter of its indices.

    rows x S, k         ms   plain  top_k   with ties: ms   plain  top_k
    1 x 1024, 256     0.07     1.2    1.0            0.07     1.8    1.1
    8 x 1024, 512     0.09     2.2    6.5            0.13     2.1    3.0
    256 x 256, 64      0.2     5.9    9.4             0.3     4.5    4.8
    256 x 1024, 64     0.9     3.0    2.6             1.1     3.2    1.9
    256 x 1024, 512    0.8     3.0   10.8             0.9     3.9    9.9
    256 x 4096, 512    3.0     3.7    7.9             4.4     3.3    4.4

Also slower: two bits a pass with three thresholds (2x), interpolating the threshold from the counts instead
of halving (no fewer passes: the slowest row decides), counting by a product with ones (2x).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.arithmetic import round_up

PARTS = 32  # summands of the vectorised first step of a count
EXPONENT = 0x7F800000  # of a float32
NOT_ELIGIBLE = -(2**31)  # below the key of every score


def topk_mask_xla(
    scores: Float32[Array, "*rows S"], visible: Bool[Array, "*rows S"], k: int
) -> Bool[Array, "*rows S"]:
    """The k largest by threshold; see `op.topk_mask`."""
    size = scores.shape[-1]
    keys = ordered_keys(scores, visible & ~jnp.isnan(scores))
    padding = [(0, 0)] * (keys.ndim - 1) + [(0, round_up(size, PARTS) - size)]
    keys = jnp.pad(keys, padding, constant_values=NOT_ELIGIBLE)
    eligible = keys > NOT_ELIGIBLE
    cut, chosen = lower_bound(keys, count(eligible), k, lowest=NOT_ELIGIBLE, bits=32)

    def lowest_index_first(mask: jax.Array) -> jax.Array:
        """Of the scores equal to the cut, a row that has too many keeps the first ones."""
        level = (keys == cut) & (chosen > k)
        places = keys.shape[-1] - lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
        places = jnp.where(level, places, 0)
        left = k - count(keys > cut)
        last, _ = lower_bound(places, count(level), left, lowest=0, bits=keys.shape[-1].bit_length())
        return mask & (~level | (places >= last))

    mask = lax.cond(jnp.any(chosen > k), lowest_index_first, lambda mask: mask, eligible & (keys >= cut))
    return mask[..., :size]


def ordered_keys(
    scores: Float32[Array, "*rows S"], eligible: Bool[Array, "*rows S"]
) -> Int32[Array, "*rows S"]:
    """Signed keys in the order of the scores; NOT_ELIGIBLE for what cannot be chosen."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    # Without an exponent it is 0 or a subnormal, which some processors read as 0.
    bits = jnp.where((bits & EXPONENT) == 0, 0, bits)
    # Minus the magnitude of a negative score: -0 and 0 are one key. (XLA takes `x + 0.0` for `x`, -0 or not.)
    return jnp.where(eligible, jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits), NOT_ELIGIBLE)


def count(mask: Bool[Array, "*rows S"]) -> Int32[Array, "*rows 1"]:
    """Marks a row, in two steps: XLA:CPU vectorises a sum over a middle axis, but not one over the last."""
    parts = mask.astype(jnp.int32).reshape(*mask.shape[:-1], PARTS, -1).sum(axis=-2, dtype=jnp.int32)
    return lax.optimization_barrier(parts).sum(axis=-1, keepdims=True, dtype=jnp.int32)


def lower_bound(
    keys: Int32[Array, "*rows S"],
    total: Int32[Array, "*rows 1"],
    k: int | Int32[Array, "*rows 1"],
    *,
    lowest: int,
    bits: int,
) -> tuple[Int32[Array, "*rows 1"], Int32[Array, "*rows 1"]]:
    """The greatest bound with at least k keys at or above it, and how many those are.

    A row is finished as soon as exactly k keys are left (often well before its last bit), and at once if
    `total`, its number of keys to choose from, is at most k: its bound is then `lowest`. Keys lie in
    [lowest, lowest + 2^bits).
    """

    def refine(state):
        bit, bound, chosen = state
        higher = bound + lax.shift_left(jnp.int32(1), bit)
        left = count(keys >= higher)
        accept = left >= k  # changes nothing in a finished row: the same k keys lie above either bound
        return bit - 1, jnp.where(accept, higher, bound), jnp.where(accept, left, chosen)

    def unfinished(state):
        bit, _, chosen = state
        return (bit >= 0) & jnp.any(chosen > k)

    start = jnp.int32(bits - 1), jnp.full_like(total, lowest), total
    return lax.while_loop(unfinished, refine, start)[1:]
