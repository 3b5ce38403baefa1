"""What plain XLA asks of rows that a cache holds: it never sees how they are stored."""

from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Float32, Int32


class HeldRows(Protocol):
    """Entries, index keys or recent rows of one layer, inside their stack; a pytree.

    Whoever holds them slices or gathers what is stored first and decodes after, so that the work follows the
    rows asked for and not the capacity.
    """

    @property
    def stack(self) -> Any:
        """[R, B, S, width] as it is stored: what kernels read in place."""

    @property
    def repeat(self) -> Int32[Array, ""]:
        """Which of the R layers this one is."""

    @property
    def size(self) -> int:
        """S, the capacity."""

    def are_numbers(self, dtype: jax.typing.DTypeLike) -> bool:
        """Whether the stack is an array of this dtype, which kernels for whole sequences take as it is."""

    def prefix(self, size: int, dtype: jax.typing.DTypeLike) -> Float[Array, "B size width"]:
        """The first `size` rows of every sequence."""

    def chosen(
        self, index: Int32[Array, "B K"], size: int, dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B K width"]:
        """Rows by index below `size`."""

    def at_positions(
        self, position: Int32[Array, "B P"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B P width"]:
        """Of a ring, whose slot is position mod S: the rows at these positions, any row for one not held."""

    def products(
        self, q: Float[Array, "B N width"], start: int | Int32[Array, ""], count: int
    ) -> Float32[Array, "B N count"]:
        """q . row for rows start .. start + count - 1."""
