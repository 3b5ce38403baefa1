"""Compressed entries, indexer keys or window rows of one layer, read where they lie in their stack."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.numerics import cache_formats, cache_storage
from dsv4_jax.numerics.cache_formats import Stored


class Entries(NamedTuple):
    """One layer's entries inside their stack: `pallas_kernels.held_rows.HeldRows`."""

    stack: Stored  # [R, B, S, width] in the cache's format
    repeat: Int32[Array, ""]

    @property
    def size(self) -> int:
        """S, the capacity."""
        return cache_storage.num_slots(self.stack)

    def are_numbers(self, dtype: jax.typing.DTypeLike) -> bool:
        """Whether the stack is an array of this dtype."""
        return cache_storage.are_numbers(self.stack, dtype)

    def piece(self, start: int | Int32[Array, ""], count: int) -> Stored:
        """Entries start .. start + count - 1 of every row, as `cache_storage.piece`."""
        return cache_storage.piece(self.stack, self.repeat, start, count)

    def prefix(self, size: int, dtype: jax.typing.DTypeLike) -> Float[Array, "B size width"]:
        """The first `size` entries of every row, as `cache_storage.prefix`."""
        return cache_storage.prefix(self.stack, self.repeat, size, dtype)

    def chosen(
        self, index: Int32[Array, "B K"], size: int, dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B K width"]:
        """Entries by index below `size`, as `cache_storage.chosen`."""
        return cache_storage.chosen(self.stack, self.repeat, index, size, dtype)

    def at_positions(
        self, position: Int32[Array, "B P"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B P width"]:
        """Rows of a ring, whose slot is position mod M; any row for a position that it does not hold."""
        rows = cache_storage.read_slots(self.stack, self.repeat, position % self.size)
        return cache_formats.read(rows, dtype)

    def products(
        self, q: Float[Array, "B N width"], start: int | Int32[Array, ""], count: int
    ) -> Float32[Array, "B N count"]:
        """q . row for rows start .. start + count - 1, in float32."""
        return cache_formats.products(q, self.piece(start, count))
