"""Attention over several sets of keys, joined after the fact; CSA as a window and a gathered part."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.hybrid_attention.gathered import gathered_attention
from pallas_kernels.hybrid_attention.op import hybrid_attention

Part = tuple[Float[Array, "*n Dh"], Float32[Array, "*n"]]


def merge(parts: Sequence[Part]) -> Part:
    """The attention over the union of the parts' keys, which must not overlap, in float32.

        lse = log(sum_i exp(lse_i))
        o   = sum_i exp(lse_i - lse) o_i

    Args:
        parts: at least one pair (o, lse); a part without keys has lse = -inf, and any finite o. At most one
            of them holds the sink.

    Returns:
        o in the dtype of the first part's, rounded once more than the parts' own; lse in float32. Where no
        part has keys, o = 0 and lse = -inf.
    """
    if not parts:
        raise ValueError("merge: there must be at least one part")
    top = jnp.stack([lse for _, lse in parts]).max(axis=0)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = sum(weights)
    seen = total > 0.0
    inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
    # XLA moves a conversion before the reshape that made `o`, out of the loop below, and stores its result.
    rows = jax.lax.optimization_barrier([o for o, _ in parts])
    out = sum(
        o.astype(jnp.float32) * (weight * inverse)[..., None] for o, weight in zip(rows, weights, strict=True)
    )
    return out.astype(parts[0][0].dtype), top + jnp.log(total)


def csa_attention(
    q: Float[Array, "B T H Dh"],
    line: Float[Array, "B W-1+T Dh"],
    position: Int32[Array, "B T"],
    sink: Float32[Array, "H"],
    entries: Float[Array, "B S Dh"] | Float[Array, "R B S Dh"],
    lo: Int32[Array, "B T"],
    hi: Int32[Array, "B T"],
    index: Int32[Array, "B T K"],
    *,
    repeat: Int32[Array, ""] | None = None,
    window: int,
    impl: Literal["pallas", "reference"] = "pallas",
    interpret: Any = False,
) -> Part:
    """`hybrid_attention` with `selected` = membership in `index`, its chosen entries fetched row by row.

    The window with the sink, and the entries of `index` with lo_t <= s < hi_t, each by its own kernel, then
    merged. Arguments and results are those of `hybrid_attention` and `gathered_attention`. Forward only. In
    bfloat16 both parts are rounded before they are merged, which `hybrid_attention` alone does not do.
    `tuning.gather_from` says when this is the faster way.
    """
    index = jnp.where((index >= lo[..., None]) & (index < hi[..., None]), index, -1)
    near = hybrid_attention(q, line, position, sink, window=window, impl=impl, interpret=interpret)
    far = gathered_attention(q, entries, index, repeat=repeat, impl=impl, interpret=interpret)
    return merge([near, far])
