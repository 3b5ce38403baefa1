"""Scores of the lightning indexer, and the choice of the best, in plain XLA; the equations are in `op`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arithmetic import cdiv, int32s
from pallas_kernels.held_rows import HeldRows
from pallas_kernels.topk_mask import topk_mask

KEYS_AT_ONCE = 4096
"""Keys of a row decoded at once: 2 MiB of float32 at Di = 128, which stay in a core's cache."""

MAX_SCORE_ELEMENTS = 2**24
"""Per-head products held at once (64 MiB of float32)."""


def index_scores_xla(
    q: Float[Array, "B T Hi Di"],
    weights: Float32[Array, "B T Hi"],
    keys: HeldRows,
    size: int,
    *,
    rounded: bool = False,
) -> Float32[Array, "B T size"]:
    """I[t, s] = sum_h weights[t, h] relu(q[t, h] . k[s]); float32 products and sums.

    With `rounded`, products, weighted products and the sum are each rounded to bfloat16. The first `size`
    keys are sliced, decoded and scored piece by piece, so that neither their numbers nor [B, T, Hi, size]
    ever exist as a whole. No gradients.
    """
    batch, length, heads, width = q.shape
    by_query = q.reshape(batch, length * heads, width)

    def to_grid(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if rounded else x

    def score(start: int | Int32[Array, ""], count: int) -> Float32[Array, "B T count"]:
        dots = keys.products(by_query, start, count)
        dots = to_grid(dots.reshape(batch, length, heads, count))
        return to_grid(to_grid(jax.nn.relu(dots) * weights[..., None]).sum(axis=2))

    piece = min(KEYS_AT_ONCE, max(64, MAX_SCORE_ELEMENTS // (batch * length * heads)))
    if size <= piece:
        return score(0, size)

    def step(i, scores):
        # The last piece moves back to be whole; what two pieces share they score alike.
        start = jnp.minimum(i * piece, size - piece).astype(jnp.int32)
        return jax.lax.dynamic_update_slice(scores, score(start, piece), int32s(0, 0, start))

    bounds = int32s(0, cdiv(size, piece))
    return jax.lax.fori_loop(*bounds, step, jnp.zeros((batch, length, size), jnp.float32))


def select_xla(
    scores: Float32[Array, "B T S"], visible: Bool[Array, "B T S"], top_k: int
) -> Bool[Array, "B T S"]:
    """Membership of the top-k visible entries, by the same rule as the kernels and `select_list_xla`.

    Ties go to the lowest entry; -0 and subnormal scores equal 0; NaN and -inf are never chosen.
    """
    return topk_mask(scores, visible & (scores > -jnp.inf), top_k)


def select_list_xla(
    scores: Float32[Array, "B T S"], visible: Bool[Array, "B T S"], top_k: int
) -> tuple[Int32[Array, "B T Ki"], Bool[Array, "B T Ki"]]:
    """The choice of `select_xla` as indices, in no order that means anything, and which of them are any."""
    # `lax.top_k` orders by bits: there -0 is less than 0, and a subnormal number is more.
    level = jnp.abs(scores) < jnp.finfo(jnp.float32).tiny
    ranked = jnp.where(visible & ~jnp.isnan(scores), jnp.where(level, 0.0, scores), -jnp.inf)
    best, index = jax.lax.top_k(ranked, top_k)
    return index, best > -jnp.inf
