"""The definition: a scatter of rows."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


def write_entries_reference(
    stack: Shaped[Array, "R B S C"],
    repeat: Int32[Array, ""],
    new: Shaped[Array, "B P C"],
    first: Int32[Array, "B"],
    count: Int32[Array, "B"],
) -> Shaped[Array, "R B S C"]:
    """stack[repeat, b, first_b + p] = new[b, p] for p < count_b; places from S on are dropped."""
    batch, num_new, _ = new.shape
    offset = jnp.arange(num_new, dtype=jnp.int32)
    slot = jnp.where(offset < count[:, None], first[:, None] + offset, stack.shape[2])
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return stack.at[repeat, rows, slot].set(new, mode="drop")
