"""What the indexer means, in plain jax.numpy. Nothing in this file is fast."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.formats.index_keys import Keys, decoded


def index_scores_reference(
    q: Float[Array, "B T Hi Di"],
    weights: Float32[Array, "B T Hi"],
    keys: Keys,
    lo: Int32[Array, "B T"],
    hi: Int32[Array, "B T"],
) -> Float32[Array, "B T S"]:
    """The definition; the contract is in `op.index_scores`."""
    keys = decoded(keys)
    dots = jnp.einsum(
        "bthd,bsd->bths", q, keys, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    scores = (jax.nn.relu(dots) * weights[..., None]).sum(axis=2)
    return jnp.where(visible_entries(lo, hi, keys.shape[1]), scores, -jnp.inf)


def index_select_reference(scores: Float32[Array, "B T S"], k: int) -> Bool[Array, "B T S"]:
    """The k largest scores above -inf, ties to the lowest index; NaN is never chosen, subnormals equal 0."""
    ranked = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    ranked = jnp.where(jnp.abs(ranked) < jnp.finfo(jnp.float32).tiny, 0, ranked)
    order = jnp.argsort(ranked, axis=-1, stable=True, descending=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < k) & (ranked > -jnp.inf)


def visible_entries(lo: Int32[Array, "B T"], hi: Int32[Array, "B T"], size: int) -> Bool[Array, "B T S"]:
    """Entries lo <= s < hi of each query."""
    s = jnp.arange(size, dtype=jnp.int32)
    return (s >= lo[..., None]) & (s < hi[..., None])
