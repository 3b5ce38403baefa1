"""Compressed entries, indexer keys or window rows of one layer, read where they lie in their stack.

Whatever the format, the stored bytes are sliced or gathered first and decoded after: the work follows the
rows asked for, not the capacity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.model.cache import num_slots, read_ring
from dsv4_jax.numerics import cache_formats
from dsv4_jax.numerics.cache_formats import Stored
from pallas_kernels.arithmetic import int32s
from pallas_kernels.decode_attention import Fp8Rows, fp8_rows


class Entries(NamedTuple):
    """One layer's entries inside their stack: `pallas_kernels.held_rows.HeldRows`."""

    stack: Stored  # [R, B, S, width] in the cache's format
    repeat: Int32[Array, ""]

    @property
    def size(self) -> int:
        """S, the capacity."""
        return num_slots(self.stack)

    def piece(self, start: int | Int32[Array, ""], count: int) -> Stored:
        """Entries start .. start + count - 1 of every row as they are stored, [B, count, ...].

        Raises:
            TypeError: for `Fp8Rows`, which only kernels read in pieces.
        """
        self._refuse_rows()

        def cut(leaf: jax.Array) -> jax.Array:
            _, batch, _, width = leaf.shape
            return jax.lax.dynamic_slice(leaf, int32s(self.repeat, 0, start, 0), (1, batch, count, width))[0]

        return jax.tree.map(cut, self.stack)

    def prefix(self, size: int, dtype: jax.typing.DTypeLike) -> Float[Array, "B size width"]:
        """The first `size` entries of every row."""
        if isinstance(self.stack, Fp8Rows):
            return fp8_rows.prefix(self.stack, self.repeat, size, dtype)
        return cache_formats.read(self.piece(0, size), dtype)

    def chosen(
        self, index: Int32[Array, "B K"], size: int, dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B K width"]:
        """Entries by index below `size`.

        Raises:
            TypeError: for `Fp8Rows`, which only kernels choose from.
        """
        self._refuse_rows()
        rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        if cache_formats.is_plain(self.stack) and jnp.issubdtype(self.stack.dtype, jnp.floating):
            # Out of the prefix: a gradient has the shape of what is gathered from.
            return self.prefix(size, dtype).at[rows, index].get(mode="promise_in_bounds")
        picked = jax.tree.map(
            lambda leaf: leaf.at[self.repeat, rows, index].get(mode="promise_in_bounds"), self.stack
        )
        return cache_formats.read(picked, dtype)

    def at_positions(
        self, position: Int32[Array, "B P"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B P width"]:
        """Rows of a ring (`cache.read_ring`)."""
        return cache_formats.read(read_ring(self.stack, self.repeat, position), dtype)

    def products(
        self, q: Float[Array, "B N width"], start: int | Int32[Array, ""], count: int
    ) -> Float32[Array, "B N count"]:
        """q . row for rows start .. start + count - 1, in float32."""
        return cache_formats.products(q, self.piece(start, count))

    def _refuse_rows(self) -> None:
        if isinstance(self.stack, Fp8Rows):
            raise TypeError(
                "entries kept as rows of words are for kernels; make the cache with kernels='xla'"
            )
