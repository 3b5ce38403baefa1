"""Who sees whom: ages of ring rows, limits of entries, and the choice of an indexer as a mask.

A ring row's age is how many tokens it is older than the newest token of its sequence. A query that stands
`lag` tokens behind the newest sees the ages lag .. lag + reach, where reach is min(position, W - 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.decode_attention.tuning import LANES

NEWEST, FROM, TO, HI = range(4)
"""Columns of a view: the slot of the newest token, ages FROM <= age <= TO, and entries before HI."""


def views(
    position: Int32[Array, "B T"], hi: Int32[Array, "B T"] | None, window: int, slots: int
) -> Int32[Array, "B T 4"]:
    """What every query sees, but for a choice of entries; a negative position sees no row."""
    newest = position.max(axis=1, keepdims=True)
    lag = newest - position
    reach = jnp.clip(position, -1, window - 1)
    hi = jnp.zeros_like(position) if hi is None else hi
    slot = jnp.broadcast_to(newest % slots, position.shape)
    return jnp.stack([slot, lag, lag + reach, hi], axis=-1)


def chosen_mask(index: Int32[Array, "B T K"], num_entries: int) -> Bool[Array, "B T S"]:
    """Membership of each entry in the list of each query; -1 is no entry.

    s = 128 a + b: the table [a, b] is a product of two one-hot matrices over the K places of the list. That
    needs neither a scatter, which a TPU does one element at a time, nor K S comparisons.
    """
    high = cdiv(num_entries, LANES)
    by_row = jax.nn.one_hot(index >> 7, high, dtype=jnp.bfloat16)  # -1 >> 7 is -1: a row of zeros
    by_lane = jax.nn.one_hot(index & (LANES - 1), LANES, dtype=jnp.bfloat16)
    table = jnp.einsum("btka,btkc->btac", by_row, by_lane, preferred_element_type=jnp.float32)
    return (table > 0).reshape(*index.shape[:2], high * LANES)[..., :num_entries]


class Visible(NamedTuple):
    """Keys of one tile, all finite, and which of them each query sees."""

    keys: jax.Array  # [N, Dh], or [Dh, N] if channels_first
    mask: jax.Array  # bool[T, N]
    channels_first: bool = False


def ring_tile(keys: jax.Array, view: Int32[Array, "T 4"]) -> Visible:
    """The window rows of one sequence."""
    slots = keys.shape[0]
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1)
    newest = view[:1, NEWEST : NEWEST + 1]
    age = jnp.where(slot > newest, newest + slots - slot, newest - slot)
    return Visible(keys, (age >= view[:, FROM : FROM + 1]) & (age <= view[:, TO : TO + 1]))


def entry_mask(
    view: Int32[Array, "T 4"], first: jax.Array | int, count: int, chosen: jax.Array | None
) -> Bool[Array, "T N"]:
    """Of N entries from `first` on; `chosen` is i8[T, N] or None for all before HI."""
    entry = first + jax.lax.broadcasted_iota(jnp.int32, (view.shape[0], count), 1)
    mask = entry < view[:, HI : HI + 1]
    return mask if chosen is None else mask & (chosen.astype(jnp.int32) != 0)
