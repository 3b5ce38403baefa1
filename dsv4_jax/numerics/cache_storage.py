"""The arrays in which a cache keeps rows, entries and keys: made, written and read here, and only here.

Four ways to keep the numbers of a format (`cache_formats`), chosen when a cache is made:

    numbers   as they are: of plain formats, and the rings
    bits      FP8 and bfloat16 as unsigned integers with the same bits, which XLA:CPU can slice and update
    words     FP8 entries as rows of words (`Fp8Rows`), which a TPU can copy one by one: where kernels choose
              some of many entries
    columns   narrow arrays with the slots on the last axis (`Columns`), as kernels stream entries and keys; a
              kernel writes them in place

Whatever the way, stored bytes are sliced or gathered first and decoded after: the work follows the rows asked
for, not the capacity. Every array has the repeats R of a layer and the rows B in front.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from dsv4_jax.numerics import cache_formats
from dsv4_jax.numerics.cache_formats import CacheFormat, Stored
from pallas_kernels.arithmetic import int32s
from pallas_kernels.decode_attention.tuning import rows_pay
from pallas_kernels.formats import entry_rows
from pallas_kernels.formats.bits import as_stored, bits
from pallas_kernels.formats.columns import LANES, Columns, columns_of
from pallas_kernels.formats.entry_rows import Fp8Rows, Layout
from pallas_kernels.formats.index_keys import Fp8Keys

MOST_CHOSEN = 8
"""New rows up to which `write_slots` chooses: each is one more pass over the slots."""


def empty(
    shape: tuple[int, ...], store: Callable[[jax.Array], Stored], dtype: jax.typing.DTypeLike, as_bits: bool
) -> Stored:
    """What `store` makes of numbers of this shape and dtype, with zeros in it, as numbers or as bits."""
    kept = (lambda x: bits(store(x))) if as_bits else store
    made = jax.eval_shape(kept, jax.ShapeDtypeStruct(shape, dtype))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made)


def empty_stack(
    shape: tuple[int, int, int, int],
    store: Callable[[jax.Array], Stored],
    dtype: jax.typing.DTypeLike,
    as_bits: bool,
) -> Stored:
    """As `empty`, for entries or keys [R, B, S, width]: for kernels, those of narrow formats in columns.

    Plain ones stay: their rows fill whole tiles. The numbers of FP8 keys do too, but not their scales.
    """
    made = empty(shape, store, dtype, as_bits)
    if as_bits or cache_formats.is_plain(made):
        return made
    return columns_of(made, keep_rows=(0,) if isinstance(made, Fp8Keys) else ())


def empty_entries(
    shape: tuple[int, int, int, int],
    dtype: jax.typing.DTypeLike,
    format: CacheFormat,
    as_bits: bool,
    *,
    num_rotary: int,
    num_heads: int,
    num_chosen: int,
) -> Stored:
    """Compressed entries [R, B, S, Dh] of which a query looks at `num_chosen`: words where that pays.

    Args:
        shape, dtype, format, as_bits: as `empty`, and `cache_formats.store_entries`.
        num_rotary: Dr.
        num_heads: H, rows of a query that one fetched entry serves.
        num_chosen: Ki.
    """
    repeats, batch, size, width = shape
    layout = Layout(width, num_rotary)
    pays = rows_pay(rows=num_heads, num_entries=size, num_chosen=num_chosen)
    if as_bits or format == "plain" or layout.problems() or size <= num_chosen or not pays:

        def store(x: jax.Array) -> Stored:
            return cache_formats.store_entries(x, format, num_rotary)

        return empty_stack(shape, store, dtype, as_bits)
    return entry_rows.empty(repeats, batch, size, layout)


def num_slots(stored: Stored) -> int:
    """M of a ring, or S of a stack of entries, in any format."""
    return stored.size if isinstance(stored, Columns) else jax.tree.leaves(stored)[0].shape[2]


def slot_axes(stored: Stored) -> tuple[int, ...]:
    """The axis of the slots in every array of a ring or stack, in the order of its leaves."""
    turned = stored.turned if isinstance(stored, Columns) else (False,) * len(jax.tree.leaves(stored))
    return tuple(3 if each else 2 for each in turned)


def in_rows(stored: Stored) -> Stored:
    """The same stack as operations take it, with every array [R, B, S, ...]."""
    return stored.rows if isinstance(stored, Columns) else stored


def read_slots(stored: Stored, repeat: Int32[Array, ""], slot: Int32[Array, "B P"]) -> Stored:
    """What stands in these slots of each row, [B, P, ...] as it is stored; every slot must exist.

    Raises:
        TypeError: for words, from which only kernels choose.
    """
    _refuse_words(stored)
    rows = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]
    return jax.tree.map(lambda leaf: leaf.at[repeat, rows, slot].get(mode="promise_in_bounds"), stored)


def write_slots(
    stored: Stored,
    repeat: Int32[Array, ""],
    slot: Int32[Array, "B P"],
    new: Stored,
    *,
    choose_narrow: bool = False,
) -> Stored:
    """New rows [B, P, ...] in these slots; those whose slot does not exist are dropped.

    Args:
        stored, repeat, new: arrays [R, B, slots, ...], which layer, and what is written.
        slot: no slot of a row twice.
        choose_narrow: a few rows of an array shorter than a TPU's lanes are written by choosing between old
            and new in every slot. A TPU scatters into such an array in another layout than it is kept in, and
            would turn the whole stack there and back; of a ring this touches one layer's slots instead.
    """
    rows = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]

    def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
        new = as_stored(new, leaf.dtype)
        if not choose_narrow or leaf.shape[-1] >= LANES or slot.shape[1] > MOST_CHOSEN:
            return leaf.at[repeat, rows, slot].set(new, mode="drop")
        chosen = leaf[repeat]
        every = jnp.arange(leaf.shape[2], dtype=jnp.int32)
        for number in range(slot.shape[1]):
            here = jnp.expand_dims(every == slot[:, number, None], tuple(range(2, leaf.ndim - 1)))
            chosen = jnp.where(here, new[:, number, None], chosen)
        return leaf.at[repeat].set(chosen)

    return jax.tree.map(write, stored, new)


def write_entries(
    entries: Stored,
    repeat: Int32[Array, ""],
    new: Stored,
    first: Int32[Array, "B"],
    count: Int32[Array, "B"],
    *,
    columns: Callable[..., Columns],
    **how: Any,
) -> Stored:
    """Writes the first `count` of the new entries [B, P, ...] at first, first + 1, ...; drops the rest.

    Args:
        entries, repeat, new, first, count: as `pallas_kernels.entry_write.write_entries`.
        columns, how: that operation and its settings, for entries that are columns.
    """
    if isinstance(entries, Columns):
        return columns(entries, repeat, new, first, count, **how)
    if isinstance(entries, Fp8Rows):
        return entry_rows.write(entries, repeat, entry_rows.words_of(new), first, count)
    offset = jnp.arange(jax.tree.leaves(new)[0].shape[1], dtype=jnp.int32)
    slot = jnp.where(offset < count[:, None], first[:, None] + offset, num_slots(entries))
    return write_slots(entries, repeat, slot, new)


def piece(stored: Stored, repeat: Int32[Array, ""], start: int | Int32[Array, ""], count: int) -> Stored:
    """Slots start .. start + count - 1 of every row as they are stored, [B, count, ...].

    Raises:
        TypeError: for words, which only kernels read in pieces.
    """
    _refuse_words(stored)

    def cut(leaf: jax.Array) -> jax.Array:
        _, batch, _, width = leaf.shape
        return jax.lax.dynamic_slice(leaf, int32s(repeat, 0, start, 0), (1, batch, count, width))[0]

    return jax.tree.map(cut, stored)


def prefix(
    stored: Stored, repeat: Int32[Array, ""], size: int, dtype: jax.typing.DTypeLike
) -> Float[Array, "B size width"]:
    """The numbers in the first `size` slots of every row."""
    if isinstance(stored, Fp8Rows):
        return entry_rows.prefix(stored, repeat, size, dtype)
    return cache_formats.read(piece(stored, repeat, 0, size), dtype)


def chosen(
    stored: Stored,
    repeat: Int32[Array, ""],
    index: Int32[Array, "B K"],
    size: int,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B K width"]:
    """The numbers in slots by index below `size`.

    Raises:
        TypeError: as `read_slots`.
    """
    if are_numbers(stored, jnp.floating):
        # Out of the prefix: a gradient has the shape of what is gathered from.
        rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        return prefix(stored, repeat, size, dtype).at[rows, index].get(mode="promise_in_bounds")
    return cache_formats.read(read_slots(stored, repeat, index), dtype)


def are_numbers(stored: Stored, dtype: jax.typing.DTypeLike) -> bool:
    """Whether these are plain numbers of this dtype (or kind of dtypes), as a call without a cache makes."""
    return cache_formats.is_plain(stored) and jnp.issubdtype(stored.dtype, dtype)


def _refuse_words(stored: Stored) -> None:
    if isinstance(stored, Fp8Rows):
        raise TypeError("entries kept as rows of words are for kernels; make the cache with kernels='xla'")
