"""Which rows make which block."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def block_rows(
    rows: Float[Array, "B T ..."], source: Int32[Array, "B P m"] | None, ratio: int, num_blocks: int
) -> Float[Array, "B P m ..."]:
    """Rows grouped into blocks: by `source`, or where it is None, m P rows in place."""
    if source is None:
        batch = rows.shape[0]
        return rows[:, : num_blocks * ratio].reshape(batch, num_blocks, ratio, *rows.shape[2:])
    batch = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None, None]
    return rows.at[batch, source].get(mode="promise_in_bounds")
