"""Which of several processes writes which tensor of a checkpoint."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from dsv4_jax.boxes import Box, at
from dsv4_jax.checkpoint.held import Leaf, holders, part_boxes
from dsv4_jax.checkpoint.names import Path, TensorSpec
from pallas_kernels.formats.weights import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Shares:
    """A writer for every tensor, and what it takes to read it; the same in every process.

    Attributes:
        owners: name of a tensor, or of its scales -> the process that writes it.
        torn: names of tensors of which no process has all. Reading one is a collective: every process reads
            them, in the same order, and the owner alone uses them.
    """

    owners: Mapping[str, int]
    torn: frozenset[str]

    def is_mine(self, name: str) -> bool:
        """Whether this process writes the tensor."""
        return self.owners[name] == jax.process_index()

    def names_to_read(self) -> set[str]:
        """Of the tensors that this process reads: its own, and those that all read."""
        return {name for name in self.owners if name in self.torn or self.is_mine(name)}


def is_spread(flat: Mapping[Path, Leaf]) -> bool:
    """Whether parts of the parameters are on devices of other processes."""
    return any(
        not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(list(flat.values()))
        if isinstance(leaf, jax.Array)
    )


def shares(flat: Mapping[Path, Leaf], specs: Iterable[TensorSpec]) -> Shares:
    """Each tensor goes to a process that has all of it, or, where none has, to any: to the one with the
    fewest bytes so far.

    Args:
        flat: the parameters by path.
        specs: of the tensors, in the order in which they are written.
    """
    bytes_of = [0] * jax.process_count()
    owners: dict[str, int] = {}
    torn = set()
    for spec in specs:
        leaf = flat[spec.path]
        array, box = _array_and_box(leaf, spec)
        able = holders(array, box) if isinstance(array, jax.Array) else []
        owner = min(able or range(len(bytes_of)), key=lambda number: bytes_of[number])
        bytes_of[owner] += int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(array.dtype).itemsize
        for name in filter(None, (spec.name, spec.scale_name)):
            owners[name] = owner
            if not able:
                torn.add(name)
    return Shares(owners, frozenset(torn))


def _array_and_box(leaf: Leaf, spec: TensorSpec) -> tuple[jax.Array | np.ndarray, Box]:
    """The array that holds a tensor's numbers, and its box in it. Scales are split as their numbers are."""
    if not isinstance(leaf, QuantizedWeight):
        return leaf, at(spec.index, leaf.shape)
    shape = tuple(leaf.blocks.shape)
    how = "fp8" if leaf.blocks.format == "fp8" else "fp4"
    return leaf.blocks.data, part_boxes(how, at(spec.index, shape), shape)[0]
