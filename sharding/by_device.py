"""Operations whose rows do not meet: each device runs them on its own rows of the batch, and nothing moves.

The compiler cannot partition a kernel at all, and of plain XLA it gathers what is indexed by row. Here every
device has its part before the operation starts, by the family's own table of what may be split.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.splits import Splits, letters
from sharding.activations import Placement

SECOND = "*"
"""The second of the dims that a starred word stands for."""


@dataclasses.dataclass(frozen=True)
class ByDevice:
    """An operation of which every device has some rows, and perhaps some heads.

    Attributes:
        operation: on one device; its first operands are `names`, in order, or given by name.
        placement: mesh and rules.
        splits: the dims of its operands and results, from the `SPLITS` of its family.
        rows: the letter of the operation's rows: B, or the first of the `tokens`.
        heads: the letter that the rules for G split as well, or none.
        tokens: the letter that the rules for T split as well, or none: T itself, whose dims `W-1+T` are then
            lines of each device one behind the other (`context.LineOverMesh`), or * for the second of the
            token dims where there are two.

    Raises:
        ValueError: for rows and heads that the table does not let devices share freely.
    """

    operation: Callable[..., Any]
    placement: Placement
    splits: Splits
    rows: str
    heads: str = ""
    tokens: str = ""

    def __post_init__(self) -> None:
        if whole := {self.rows, self.heads} - {"", *self.splits.free.split()}:
            free = self.splits.free or "nothing"
            raise ValueError(f"{', '.join(sorted(whole))} must be whole on every device; {free} may be split")

    def __call__(self, *operands: Any, **more: Any) -> Any:
        """The operation of whole arrays; operands that are None stay None.

        An operand that is whole on several devices gets the sum of their gradients.

        Args:
            operands: in the order of the table, or by its names; arrays, or pytrees of them whose leaves have
                the same leading dims.
            more: what else the operation takes, the same on every device.

        Raises:
            ValueError: without an operand that has rows, or heads if they are to be split.
        """
        arguments = self.splits.arguments
        names = list(arguments)
        given = dict(zip(names, operands, strict=False))
        given |= {name: more.pop(name) for name in names if name in more}
        axes = {self.rows: self.placement.axes_for("B", self._size(given, arguments, self.rows))}
        if self.tokens and (size := self._found(given, arguments, self.tokens)) is not None:
            axes[self.tokens] = self.placement.axes_for("T", size, axes[self.rows])
        if self.heads:
            size = self._size(given, arguments, self.heads)
            used = [axis for each in axes.values() for axis in each]
            axes[self.heads] = self.placement.axes_for("G", size, used)
        in_specs = tuple(_specs(arguments[name], value, axes) for name, value in given.items())
        results = tuple(_result(dims, axes) for dims in self.splits.results)
        positional = [name for name in names[: len(operands)] if name in given]
        named = [name for name in given if name not in positional]

        def own(*parts: Any) -> Any:
            return self.operation(
                *parts[: len(positional)], **dict(zip(named, parts[len(positional) :], strict=True)), **more
            )

        split = jax.shard_map(
            own,
            mesh=self.placement.mesh,
            in_specs=in_specs,
            out_specs=results[0] if len(results) == 1 else results,
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(*given.values())

    def _size(self, given: dict[str, Any], arguments: Mapping[str, Any], letter: str) -> int:
        """Of the dim with this letter, from the first operand that has one."""
        size = self._found(given, arguments, letter)
        if size is None:
            raise ValueError(f"no operand has a dim {letter}")
        return size

    def _found(self, given: dict[str, Any], arguments: Mapping[str, Any], letter: str) -> int | None:
        """Likewise; None where no operand has one."""
        for name, value in given.items():
            dims = arguments[name]
            parts = [(dims, value)] if isinstance(dims, str) else list(zip(dims, value, strict=True))
            for words, part in parts:
                for leaf in jax.tree.leaves(part):
                    at = _place(words, letter, jnp.ndim(leaf))
                    if at is not None:
                        return leaf.shape[at]
        return None


def _place(words: str, letter: str, rank: int) -> int | None:
    """Where a letter is in an array of this rank; None for arrays without it, scalars among them."""
    dims = words.split()
    starred = [i for i, each in enumerate(dims) if each.startswith("*")]
    if letter == SECOND:
        return starred[0] + 1 if starred and rank > len(dims) else None
    for number, word in enumerate(dims):
        if letter in letters(word) or word.endswith(f"+{letter}"):
            behind = bool(starred) and starred[0] < number
            at = number + (rank - len(dims)) * behind
            return at if 0 <= at < rank else None
    return None


def _specs(dims: Any, value: Any, axes: dict[str, tuple[str, ...]]) -> Any:
    """A spec for every leaf of an operand."""
    if not isinstance(dims, str):
        return type(value)(*(_specs(each, part, axes) for each, part in zip(dims, value, strict=True)))
    return jax.tree.map(lambda leaf: _spec(dims, jnp.ndim(leaf), axes), value)


def _result(dims: Any, axes: dict[str, tuple[str, ...]]) -> Any:
    if not isinstance(dims, str):
        return type(dims)(*(_result(each, axes) for each in dims))
    return _spec(dims, len(dims.split()) + (SECOND in axes and "*" in dims), axes)


def _spec(words: str, rank: int, axes: dict[str, tuple[str, ...]]) -> PartitionSpec:
    entries: list[Any] = [None] * rank
    for letter, split in axes.items():
        at = _place(words, letter, rank)
        if at is not None and split:
            entries[at] = split
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)
