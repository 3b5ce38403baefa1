"""Threshold selection: 32 counting passes find the k-th largest score bit by bit; no row is sorted."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, UInt32


def ordered_bits(
    scores: Float32[Array, "*rows S"], eligible: Bool[Array, "*rows S"]
) -> UInt32[Array, "*rows S"]:
    """Unsigned keys in the order of the scores; 0, below every score, for what cannot be chosen."""
    bits = jax.lax.bitcast_convert_type(scores + 0.0, jnp.uint32)  # + 0.0: -0 and 0 are one score
    sign = jnp.uint32(0x80000000)
    keys = jnp.where(bits & sign, ~bits, bits | sign)
    return jnp.where(eligible, keys, 0)


def topk_mask_xla(
    scores: Float32[Array, "*rows S"], visible: Bool[Array, "*rows S"], k: int
) -> Bool[Array, "*rows S"]:
    """The k largest by threshold; see `op.topk_mask`."""
    eligible = visible & ~jnp.isnan(scores)
    keys = ordered_bits(scores, eligible)

    def refine(step: jax.Array, threshold: jax.Array) -> jax.Array:
        # The largest t with at least k keys >= t is the k-th largest key; set its bits from the top.
        candidate = threshold | (jnp.uint32(0x80000000) >> step.astype(jnp.uint32))
        enough = (keys >= candidate).sum(axis=-1, keepdims=True, dtype=jnp.int32) >= k
        return jnp.where(enough, candidate, threshold)

    threshold = jnp.zeros((*keys.shape[:-1], 1), jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, refine, threshold)
    above, level = keys > threshold, (keys == threshold) & eligible
    left = k - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    crowded = jnp.any(level.sum(axis=-1, keepdims=True, dtype=jnp.int32) > left)
    # Counting along the row is the expensive part, and only needed when equal scores compete.
    level = jax.lax.cond(
        crowded,
        lambda level: level & (jnp.cumsum(level, axis=-1, dtype=jnp.int32) <= left),
        lambda level: level,
        level,
    )
    return above | level
