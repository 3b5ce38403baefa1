"""How arrays of narrow entries lie in memory: entries as columns."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
"""Elements of the last axis of a tile. A shorter last axis is padded to it."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stored"], meta_fields=["turned"])
@dataclasses.dataclass(frozen=True)
class Columns:
    """The arrays of a stored format, some of them with the entries on the last axis, [R, B, C, S].

    Kernels read narrow arrays that way, and XLA's own layout for them is the same. As the shape of the array
    it holds for every program alike: none turns the array when it begins or ends.

    Attributes:
        stored: a tree of arrays [R, B, C, S] where turned and [R, B, S, C] where not.
        turned: which of its leaves are, in their order.
    """

    stored: Any
    turned: tuple[bool, ...]

    @property
    def rows(self) -> Any:
        """The same tree with every array [R, B, S, C], as operations take it. Moves nothing on a TPU."""
        return self._changed(lambda leaf: jnp.swapaxes(leaf, -1, -2))

    @property
    def size(self) -> int:
        """S."""
        leaf = jax.tree.leaves(self.stored)[0]
        return leaf.shape[-1 if self.turned[0] else -2]

    def _changed(self, turn: Callable[[jax.Array], jax.Array]) -> Any:
        leaves, tree = jax.tree.flatten(self.stored)
        pairs = zip(leaves, self.turned, strict=True)
        return jax.tree.unflatten(tree, [turn(leaf) if turned else leaf for leaf, turned in pairs])


def columns_of(rows: Any, keep_rows: tuple[int, ...] = ()) -> Columns:
    """The arrays [R, B, S, C] of a tree, turned, but for those of these numbers."""
    turned = tuple(number not in keep_rows for number in range(len(jax.tree.leaves(rows))))
    return Columns(Columns(rows, turned).rows, turned)
