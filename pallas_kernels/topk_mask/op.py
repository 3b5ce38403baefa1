"""Public entry point of the family: contract and dispatch."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from pallas_kernels.splits import Splits
from pallas_kernels.topk_mask.reference import topk_mask_reference
from pallas_kernels.topk_mask.xla import topk_mask_xla


def topk_mask(
    scores: Float32[Array, "*rows S"],
    visible: Bool[Array, "*rows S"],
    k: int,
    *,
    impl: Literal["xla", "reference"] = "xla",
) -> Bool[Array, "*rows S"]:
    """Marks the k largest visible scores of every row.

    Equation (DeepSeek-V4 report, section 2.3, selection of compressed entries):
        mask[s] = visible[s] and |{ j visible : (score_j, -j) > (score_s, -s) }| < k

    Args:
        scores: f32[..., S]; any finite or infinite values. NaN is never chosen. -0 and subnormals equal 0.
        visible: bool[..., S] what may be chosen.
        k: entries to choose, >= 1 (512 or 1024 in V4); a row with fewer visible keeps them all.
        impl: "xla" counts against a threshold, "reference" sorts. There is no silent fallback.

    Returns:
        bool[..., S] with min(k, number of visible scores that are not NaN) marks a row. There may be no rows,
        and S may be 0.

    Numerics: exact; ties go to the lowest index.
    Gradients: none (a choice of indices); wrap the scores in stop_gradient.
    Cost: one compare-and-count pass over 4 S bytes a row for each bit that the slowest row needs to single
        out k scores, at most 32, often fewer than 25, none if no row sees more than k; where equal scores
        compete for the last places, log2 S passes more. Memory: 4 S bytes of keys a row.
    Sharding: `SPLITS`.
    Raises:
        ValueError: for k < 1 or shapes that differ.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if scores.shape != visible.shape:
        raise ValueError(f"scores {scores.shape} and visible {visible.shape} must have one shape")
    if 0 in scores.shape:
        return jnp.zeros(scores.shape, bool)
    if impl == "reference":
        return topk_mask_reference(scores, visible, k)
    return topk_mask_xla(scores, visible, k)


SPLITS = {
    "topk_mask": Splits({"scores": "*rows S", "visible": "*rows S"}, ("*rows S",), free="rows"),
}
