"""Rows of tables by token id: embeddings, and the experts of hash routers (report, section 2.1)."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


def by_rows(table: Shaped[Array, "V width"], ids: Int32[Array, "*tokens"]) -> Shaped[Array, "*tokens width"]:
    """The row of each token; ids are clipped to the vocabulary."""
    return table.at[ids].get(mode="clip")


def by_columns(table: Int32[Array, "V Ke"], ids: Int32[Array, "*tokens"]) -> Int32[Array, "*tokens Ke"]:
    """The same, number by number out of the table's columns, one behind the other.

    A TPU keeps so narrow a table with the tokens on its lanes. Reading rows would first turn all of it, at
    every step; this reads it once as it lies, which takes a tenth of that.
    """
    vocabulary, width = table.shape
    line = table.T.reshape(-1)
    ids = jnp.clip(ids, 0, vocabulary - 1)
    return line.at[ids[..., None] + jnp.arange(width, dtype=jnp.int32) * vocabulary].get(
        mode="promise_in_bounds"
    )
