"""What `topk_mask` means, by sorting. Nothing in this file is fast."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32


def topk_mask_reference(
    scores: Float32[Array, "*rows S"], visible: Bool[Array, "*rows S"], k: int
) -> Bool[Array, "*rows S"]:
    """The definition; the contract is in `op.topk_mask`."""
    eligible = visible & ~jnp.isnan(scores)
    # Subnormals equal 0, as for processors that read them so.
    scores = jnp.where(jnp.abs(scores) < jnp.finfo(jnp.float32).tiny, 0, scores)
    # A stable sort of (not eligible, -score) leaves ties in index order; to it -0 and 0 are one score.
    order = jnp.lexsort((-jnp.where(eligible, scores, 0.0), ~eligible), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return eligible & (rank < k)
