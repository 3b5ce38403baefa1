"""Where activations and caches live on a mesh: constraints that keep the compiler from guessing.

Left alone, the partitioner hands activations the splits of the weights they meet, and moves residual streams
back and forth. The streams, and whatever starts a new region, are therefore pinned by name of their dims.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.host_values import put
from sharding.rules import OPTIONAL, RuleTable


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with the rules by which a model uses it; hashable, a key of compiled programs.

    Attributes:
        mesh: with all axes of `sharding.mesh.AXES`.
        table: the rules.
    """

    mesh: Mesh | AbstractMesh
    table: RuleTable

    def axes_for(self, letter: str, size: int, without: Sequence[str] = ()) -> tuple[str, ...]:
        """The mesh axes that a dim of an activation is split over: those of its rule, in order, while their
        devices divide its size.

        Args:
            letter: of the dim.
            size: of the dim.
            without: mesh axes that another dim of the array is split over.
        """
        wanted = self.table.activations.get(letter, ())
        taken: tuple[str, ...] = ()
        for axis in (wanted,) if isinstance(wanted, str) else wanted:
            axis = axis.removesuffix(OPTIONAL)
            over = math.prod(self.mesh.shape[each] for each in (*taken, axis))
            if axis not in without and self.mesh.shape[axis] > 1 and size % over == 0:
                taken = (*taken, axis)
        return taken

    def spec(self, dims: str, shape: Sequence[int], first: str = "") -> PartitionSpec:
        """The spec of an array.

        Args:
            dims: a letter for each of its first dims, such as "B T D"; dims without a rule are whole.
            shape: of the array; dims behind those of `dims` are whole.
            first: letters that choose their mesh axes before the others do; the rest go in order.
        """
        letters = dims.split()
        chosen: dict[str, tuple[str, ...]] = {}
        for letter in sorted(letters, key=lambda each: each not in first.split()):
            used = [axis for axes in chosen.values() for axis in axes]
            chosen[letter] = self.axes_for(letter, shape[letters.index(letter)], used)
        return PartitionSpec(*(chosen[letter] or None for letter in letters))

    def put(self, x: jax.typing.ArrayLike, dims: str) -> jax.Array:
        """An array of the host, the same in every process, on the devices, split as `spec` says. Those like
        it that come out of a step are split so too, and the step is compiled once."""
        return put(x, NamedSharding(self.mesh, self.spec(dims, jnp.shape(x))))

    def pinned(self, x: jax.Array, dims: str, first: str = "") -> jax.Array:
        """The same array, inside a compiled program split as `spec` says."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(dims, x.shape, first)))
