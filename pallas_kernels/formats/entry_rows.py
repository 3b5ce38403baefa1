"""Fp8 entries as rows of 32-bit words, which a TPU can copy one by one.

The three arrays of `Fp8Entries` can be streamed; one entry of them cannot be copied, as a row of bytes is no
row in memory. Here an entry is its bytes in order, values, rotated channels, scales, as little-endian words:

    146 words at Dh = 512, Dr = 64:   112 of values | 32 of rotated channels | 2 of scales
    `words`, one row an entry:        the first Dh / 4 = 128
    `rest`:                           the last 18, those of seven entries side by side in a row of 128

so a row is whole in memory, and an entry takes 512 + 512 / 7 = 585.2 bytes instead of 584.

Decoded, channels come in another order, by byte of a word: `planes`. Byte p of word l of a row is channel
4 l + p; behind the values, where words hold pairs of rotated channels, planes 0 and 1 take the halves of
`words`, planes 2 and 3 those of `rest`. Four planes of Dh / 4 lanes are exactly the Dh channels.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.arithmetic import cdiv, int32s, quotient, round_up
from pallas_kernels.formats import e4m3, e8m0
from pallas_kernels.formats.entries import Fp8Entries, scale_bytes
from pallas_kernels.formats.sizes import ENTRY_GROUP
from pallas_kernels.precision import einsum_float32

PLANES = 4  # bytes of a word
GROUP_WORDS = ENTRY_GROUP // PLANES
TILE_ROWS = 8


class Layout(NamedTuple):
    """Where things lie in the words of an entry."""

    num_channels: int  # Dh
    num_rotary: int  # Dr

    @property
    def row(self) -> int:
        """Words of a row: Dh / 4."""
        return self.num_channels // PLANES

    @property
    def values(self) -> int:
        """Words of channels that are not rotated; those of rotated ones follow."""
        return (self.num_channels - self.num_rotary) // PLANES

    @property
    def scales(self) -> int:
        """Words of scales."""
        return scale_bytes(self.num_channels - self.num_rotary) // PLANES

    @property
    def rest(self) -> int:
        """Words of an entry that do not fit into its row."""
        return self.values + self.num_rotary // 2 + self.scales - self.row

    @property
    def entries_a_row(self) -> int:
        """P: so many entries share a row of `rest`."""
        return self.row // self.rest

    def rest_rows(self, size: int) -> int:
        """Rows of `rest` for so many entries; whole tiles, or XLA may store them in another order."""
        return round_up(cdiv(size, self.entries_a_row), TILE_ROWS)

    def problems(self) -> list[str]:
        """Why there is no such layout."""
        still = self.num_channels - self.num_rotary
        rules = {
            f"{still} channels that are not rotated must be a positive multiple of {ENTRY_GROUP}": still > 0
            and still % ENTRY_GROUP == 0,
            f"{self.num_rotary} rotated channels must be a multiple of {PLANES}": self.num_rotary % PLANES
            == 0,
        }
        return [rule for rule, holds in rules.items() if not holds]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "rest"], meta_fields=["num_rotary"]
)
@dataclasses.dataclass(frozen=True)
class Fp8Rows:
    """Entries in fp8, each of them a row of words and a part of a row."""

    words: UInt32[Array, "R B S Dh/4"]
    rest: UInt32[Array, "R B S/P Dh/4"]  # P entries a row, see `Layout`
    num_rotary: int  # Dr

    def entries(self) -> Fp8Entries:
        """The same entries as three arrays."""
        return entries_of(whole(self.words, self.rest, self.layout), self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """[R, B, S, Dh]."""
        return (*self.words.shape[:-1], self.layout.num_channels)

    @property
    def layout(self) -> Layout:
        """Where things lie in the words of an entry."""
        return Layout(PLANES * self.words.shape[-1], self.num_rotary)


def empty(repeats: int, batch: int, size: int, layout: Layout) -> Fp8Rows:
    """A stack of entries that are all zero.

    Raises:
        ValueError: for channels that have no layout.
    """
    if problems := layout.problems():
        raise ValueError("; ".join(problems))

    def zeros(rows: int) -> jax.Array:
        return jnp.zeros((repeats, batch, rows, layout.row), jnp.uint32)

    return Fp8Rows(zeros(size), zeros(layout.rest_rows(size)), layout.num_rotary)


def words_of(entries: Fp8Entries) -> UInt32[Array, "*rows words"]:
    """The bytes of every entry, values, rotated channels, scales, as words."""

    def bytes_of(x: jax.Array) -> jax.Array:
        in_bytes = jax.lax.bitcast_convert_type(x, jnp.uint8)
        return in_bytes.reshape(*x.shape[:-1], -1)

    parts = [bytes_of(x) for x in (entries.values, entries.rotary, entries.scales)]
    whole = jnp.concatenate(parts, axis=-1)
    return jax.lax.bitcast_convert_type(whole.reshape(*whole.shape[:-1], -1, PLANES), jnp.uint32)


def entries_of(words: UInt32[Array, "*rows words"], layout: Layout) -> Fp8Entries:
    """What `words_of` made these of."""
    whole = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)
    still = layout.num_channels - layout.num_rotary
    values, rotary, scales = jnp.split(whole, [still, still + 2 * layout.num_rotary], axis=-1)
    pairs = rotary.reshape(*rotary.shape[:-1], layout.num_rotary, 2)
    return Fp8Entries(
        jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn),
        scales,
        jax.lax.bitcast_convert_type(pairs, jnp.bfloat16),
    )


def whole(
    words: UInt32[Array, "*n S row"], rest: UInt32[Array, "*n S/P row"], layout: Layout
) -> UInt32[Array, "*n S words"]:
    """All words of every entry, side by side."""
    size = words.shape[-2]
    apart = _apart(rest, layout).reshape(*words.shape[:-2], -1, layout.rest)[..., :size, :]
    return jnp.concatenate([words, apart], axis=-1)


def prefix(
    rows: Fp8Rows, repeat: Int32[Array, ""], size: int, dtype: jax.typing.DTypeLike
) -> Float[Array, "B size Dh"]:
    """The first entries of every sequence of one repeat, as numbers, exact in bfloat16 and float32.

    Words are not taken apart into bytes: a TPU would keep four of them in a row of 128 lanes.
    """
    layout = rows.layout

    def cut(x: jax.Array, count: int) -> Int32[Array, "B count row"]:
        piece = jax.lax.dynamic_slice(x, int32s(repeat, 0, 0, 0), (1, x.shape[1], count, x.shape[3]))[0]
        return jax.lax.bitcast_convert_type(piece, jnp.int32)

    words, rest = cut(rows.words, size), cut(rows.rest, layout.rest_rows(size))
    rest = _apart(rest, layout).reshape(rest.shape[0], -1, layout.rest)[:, :size]
    rotated, scales = jnp.split(rest, [layout.row - layout.values], axis=-1)
    between = ((0, 0), (0, 0), (0, layout.values - layout.scales))
    own = jnp.concatenate([jnp.pad(scales, between), rotated], axis=-1)
    order = (plane_order(layout)[:, None] == jnp.arange(layout.num_channels, dtype=jnp.int32)).astype(dtype)
    return einsum_float32("bsp,pc->bsc", planes(words, own, layout).astype(dtype), order).astype(dtype)


def _apart(rest: UInt32[Array, "*rows lanes"], layout: Layout) -> UInt32[Array, "*rows P words"]:
    used = layout.entries_a_row * layout.rest
    return rest[..., :used].reshape(*rest.shape[:-1], layout.entries_a_row, layout.rest)


def write(
    rows: Fp8Rows,
    repeat: Int32[Array, ""],
    new: UInt32[Array, "B N words"],
    first: Int32[Array, "B"],
    count: Int32[Array, "B"],
) -> Fp8Rows:
    """Entries first, first + 1, ... become the first `count` of the new ones; the rest is dropped."""
    layout = rows.layout
    batch, num_new, _ = new.shape
    sequence, offset = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(num_new, dtype=jnp.int32)
    size, together = rows.words.shape[2], layout.entries_a_row
    slot = jnp.where(offset < count[:, None], first[:, None] + offset, size)
    words = rows.words.at[repeat, sequence, slot].set(new[..., : layout.row], mode="drop")
    # Rows of `rest` are read, changed in part, and written whole: a TPU has no fast write of some lanes.
    touched = cdiv(num_new + together - 1, together)
    row = quotient(first, together)[:, None] + jnp.arange(touched, dtype=jnp.int32)
    old = rows.rest.at[repeat, sequence, row].get(mode="clip")
    place = (
        row[..., None] * together + jnp.arange(together, dtype=jnp.int32) - first[:, None, None]
    )  # among the new ones
    fresh = jnp.take_along_axis(
        new[:, None, :, layout.row :], jnp.clip(place, 0, num_new - 1)[..., None], axis=2
    )
    written = (place >= 0) & (place < count[:, None, None])
    changed = jnp.where(written[..., None], fresh, _apart(old, layout)).reshape(*row.shape, -1)
    changed = jnp.pad(changed, ((0, 0), (0, 0), (0, layout.row - changed.shape[-1])))
    rest = rows.rest.at[repeat, sequence, row].set(changed, mode="drop")
    return dataclasses.replace(rows, words=words, rest=rest)


def plane_order(layout: Layout) -> np.ndarray:
    """i32[Dh]: which channel stands at each place of the planes."""
    plane, lane = np.divmod(np.arange(layout.num_channels), layout.row)
    pair = 2 * (lane - layout.values + plane // 2 * (layout.row - layout.values))
    rotary = layout.num_channels - layout.num_rotary + pair + plane % 2
    return np.where(lane < layout.values, PLANES * lane + plane, rotary).astype(np.int32)


def own_words(
    rest: Int32[Array, "K row"], place: Int32[Array, "K row"], layout: Layout
) -> Int32[Array, "K row"]:
    """Inside a kernel: what each of the rows of `rest` holds of one entry, for `planes`.

    `place`, the same in all lanes, says which of the P entries of its row it is.
    """
    own = rest
    for p in range(layout.entries_a_row):
        shift = (layout.values - p * layout.rest) % layout.row
        own = jnp.where(place == p, pltpu.roll(rest, shift, 1) if shift else rest, own)
    return own


def planes(
    words: Int32[Array, "*n row"], own: Int32[Array, "*n row"], layout: Layout
) -> Float[Array, "*n Dh"]:
    """Entries as float32 numbers in `plane_order`.

    Args:
        words: their rows.
        own: their words of `rest`, those of rotated channels in the lanes that such words have in `words`,
            those of scales behind them, around the end: in the first lanes. Other lanes may hold anything.
    """
    first_rotary, last = layout.values, words.ndim - 1
    lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, last)
    group = jax.lax.shift_right_logical(lane, np.int32(GROUP_WORDS.bit_length() - 1))
    exponents = jnp.zeros_like(words)
    for w in range(layout.scales):
        column = jnp.broadcast_to(own[..., w : w + 1], words.shape)
        exponents = jnp.where(jax.lax.shift_right_logical(group, np.int32(2)) == w, column, exponents)
    scale = e8m0.normal_value(jax.lax.shift_right_logical(exponents, 8 * (group & 3)) & 0xFF)

    def plane(p: int) -> jax.Array:
        source = words if p < 2 else own
        half = source << 16 if p % 2 == 0 else source & jnp.int32(-0x10000)
        rotated = jax.lax.bitcast_convert_type(half, jnp.float32)
        value = e4m3.value_in_word(jax.lax.shift_right_logical(words, np.int32(8 * p))) * scale
        return jnp.where(lane < first_rotary, value, rotated)

    return jnp.concatenate([plane(p) for p in range(PLANES)], axis=last)
