"""Products with weights whose outputs, or what they sum over, are split over devices.

Each device multiplies its part of the weight, which never moves: rows of x are brought together over the axes
that the weight is split over, and what comes out goes back to rows by all_to_all (the compiler, left to
itself, gathers it whole) or stays for the next product. In decode that is 0.25 to 1 MiB an exchange instead
of the weights.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.formats.weights import QuantizedWeight, Weight, is_quantized
from sharding.activations import Placement
from sharding.placement import Axis, cuts_of, ways
from sharding.sums import scattered, whole

Letters = tuple[tuple[str, int], ...]
"""Letters that the rules may split; of outputs with the places of their dims, else with their sizes."""


@dataclasses.dataclass(frozen=True)
class LinearOverMesh:
    """`block_matmul.linear`, or with `grouped` `block_matmul.grouped_linear`, over a mesh.

    Attributes:
        linear: the operation on one device.
        placement: mesh and rules.
        grouped: x and the weight share their first dim of groups, [*tokens, G, D] and [G, O, D].
        by_device: `linear` cannot be partitioned by the compiler, because it may run a kernel.
    """

    linear: Callable[..., jax.Array]
    placement: Placement
    grouped: bool
    by_device: bool

    def __call__(
        self,
        x: Float[Array, "*tokens D"],
        weight: Weight,
        *,
        out: Letters = (),
        over: Letters = (),
        by_rows: bool = False,
    ) -> Float[Array, "..."]:
        """x weight^T over the last axis of both.

        Args:
            x: [*tokens, D]; of three or more dims the first two are rows B and tokens T, of two the first is
                rows of tokens.
            weight: [*out, D].
            out: letters of output dims, and which ones they are; what comes out is split along them.
            over: letters of the first dims that are folded into what is summed over, and their sizes. Partial
                sums are added in float32, after each was rounded to the dtype of x (`sharding.sums`).
            by_rows: what comes out is split along rows again, by all axes, and whole along its outputs.
        """
        by_letter = self.axes(weight, out, over)
        cut = tuple(axis for axes in by_letter for axis in axes)
        if not cut and not self.by_device:
            return self.linear(x, weight)
        mesh, num_tokens = self.placement.mesh, x.ndim - 1 - self.grouped
        rows = self.placement.axes_for("B", x.shape[0], cut)
        tokens: tuple[Any, ...] = (rows or None,)
        if num_tokens > 1:
            tokens += (self.placement.axes_for("T", x.shape[1], (*cut, *rows)) or None,)
        tokens += (None,) * (num_tokens - len(tokens))
        divides = x.shape[0] // ways(mesh, rows) % ways(mesh, cut) == 0
        scatters = bool(over) and divides
        # Rows of training are whole over the axes that split its heads: nothing is to be brought together.
        apart = bool(out) and divides and {*rows, *cut} == {*self.placement.axes_for("B", x.shape[0])}
        outputs: list[Any] = [None] * (len(weight.shape) - 1)
        for (_, place), axes in zip(out, by_letter, strict=False):
            outputs[place] = axes or None
        every = (*rows, *cut) or None
        if by_rows and apart:
            outputs = [None] * len(outputs)
        result = PartitionSpec(every if scatters or (by_rows and apart) else tokens[0], *tokens[1:], *outputs)
        groups = (by_letter[0] or None,) if self.grouped and out else (None,) * self.grouped
        held = (weight.blocks, weight.repeat) if is_quantized(weight) else (weight, None)

        def own(x: jax.Array, numbers: Any, repeat: Any) -> jax.Array:
            parts = [ways(mesh, axes) for axes in by_letter]
            if apart and cut:
                x = self._together(x, by_letter)
            y = self.linear(x, _part(weight, numbers, repeat, out, over, parts))
            if by_rows and apart:
                for (_, place), axes in zip(out, by_letter, strict=True):
                    if axes:
                        y = lax.all_to_all(y, axes, 0, num_tokens + place, tiled=True)
            if not over or not cut:
                return y
            return scattered(y, cut).astype(y.dtype) if scatters else whole(y, cut)

        split = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(
                PartitionSpec(every, *tokens[1:])
                if apart
                else PartitionSpec(*tokens, *groups, (cut or None) if over else None),
                _weight_spec(weight, out, over, by_letter),
                PartitionSpec(),
            ),
            out_specs=result,
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(x, *held)

    def _together(self, x: jax.Array, by_letter: Sequence[tuple[str, ...]]) -> jax.Array:
        """All rows for a device's part of the weight, from rows that are split over all axes, in their order.
        Of groups a device gets its own alone: those are exchanged before anything is copied."""
        first, *later = by_letter
        minor = tuple(axis for axes in later for axis in axes)
        if not (first and self.grouped):
            return lax.all_gather(x, (*first, *minor), tiled=True)
        x = lax.all_to_all(x, first, x.ndim - 2, 0, tiled=True)
        if not minor:
            return x
        parts = x.reshape(ways(self.placement.mesh, first), -1, *x.shape[1:])
        return lax.all_gather(parts, minor, axis=1, tiled=True).reshape(-1, *x.shape[1:])

    def axes(self, weight: Weight, out: Letters = (), over: Letters = ()) -> list[tuple[str, ...]]:
        """The mesh axes that a weight is split over along each letter, as its parameter was placed."""
        rules = self.placement.table.parameters
        cuts, _ = cuts_of("", _placed_axes(weight, out, over), self.placement.mesh, rules)
        if over:
            return cuts[-1][: len(over)]
        by_place = [cut for by_letter in cuts for cut in by_letter]
        return [by_place[place] for _, place in out]


def _placed_axes(weight: Weight, out: Letters, over: Letters) -> list[Axis]:
    """The axes of the arrays that hold a weight, by the letters of its product; others have no letter.

    Together they have a letter for each dim of the weight, in order, but for those that `over` folds.
    """
    letters = dict((place, letter) for letter, place in out)
    named = [letters.get(place, "") for place in range(len(weight.shape) - 1)]
    dims = list(zip(named, weight.shape, strict=False))
    num_leading, block = len(dims), (1, 1)
    if is_quantized(weight):
        num_leading, block = len(weight.leading), weight.blocks.block
    rows, held = dims[num_leading:], dims[:num_leading]
    folded = over or (("", weight.shape[-1]),)
    rest = weight.shape[-1] // math.prod(size for _, size in folded)
    columns = (*folded, ("", rest)) if rest > 1 else folded
    folded_axes = [each for each in zip((rows, columns), block, strict=True) if each[0]]
    return [
        *(Axis((letter,), (size,)) for letter, size in held),
        *(Axis(*zip(*parts, strict=True), n) for parts, n in folded_axes),
    ]


def _weight_spec(
    weight: Weight, out: Letters, over: Letters, by_letter: Sequence[tuple[str, ...]]
) -> PartitionSpec:
    """Of the arrays that hold the weight."""
    cut = tuple(axis for axes in by_letter for axis in axes)
    last = (cut or None) if over else None
    num_leading = len(weight.leading) if is_quantized(weight) else weight.ndim - 1
    leading: list[Any] = [None] * num_leading
    rows: tuple[str, ...] = ()
    for (_, place), axes in zip(out, by_letter, strict=False):
        if place < num_leading:
            leading[place] = axes or None
        else:
            rows += axes
    if not is_quantized(weight):
        return PartitionSpec(*leading, last)
    stack = () if weight.repeat is None else (None,)
    return PartitionSpec(*stack, *leading, rows or None, last)


def _part(
    weight: Weight, numbers: Any, repeat: Any, out: Letters, over: Letters, parts: Sequence[int]
) -> Weight:
    """A device's part of the weight."""
    if not is_quantized(weight):
        return numbers
    dims = list(weight.dims)
    if over:
        dims[-1] //= math.prod(parts)
    for (_, place), count in zip(out, parts, strict=False):
        if place >= len(weight.leading):
            dims[place - len(weight.leading)] //= count
    return QuantizedWeight(numbers, tuple(dims), repeat)
