"""Momentum orthogonalised matrix by matrix, in batches of equal shape, on one device or on a mesh.

Report, Algorithm 1, and section 3.4.1 for what many devices do. The optimiser made of it is `muon`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from dsv4_jax.training.newton_schulz import orthogonalized
from sharding.report import axes_of
from sharding.whole_matrices import on_whole_matrices

KeyPath = tuple[Any, ...]
"""Of a leaf, as `jax.tree_util` gives it."""


@dataclasses.dataclass(frozen=True)
class Matrices:
    """How an array is read as matrices: [*stack, *rows, *columns].

    Attributes:
        num_stack: axes at the front that number matrices.
        num_rows: axes after them that fold into rows; all others fold into columns.
        sections: sizes of parts of the first axis of rows that are matrices of their own; empty: one.
    """

    num_stack: int
    num_rows: int = 1
    sections: tuple[int, ...] = ()

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """(how many, rows, columns) of the matrices in an array of this shape, an entry a section.

        Raises:
            ValueError: for a shape that cannot be read so.
        """
        own = shape[self.num_stack :]
        firsts = self.sections or own[:1]
        if not 0 < self.num_rows < len(own) or sum(firsts) != own[0]:
            raise ValueError(f"an array of {shape} cannot be read as {self}")
        rest, columns = math.prod(own[1 : self.num_rows]), math.prod(own[self.num_rows :])
        return [(math.prod(shape[: self.num_stack]), first * rest, columns) for first in firsts]

    def stacks(self, array: jax.Array) -> list[jax.Array]:
        """The matrices as [K, *own axes], an entry a section."""
        flat = array.reshape(-1, *array.shape[self.num_stack :])
        if not self.sections:
            return [flat]
        ends = [sum(self.sections[: number + 1]) for number in range(len(self.sections))]
        return [flat[:, end - size : end] for size, end in zip(self.sections, ends, strict=True)]


Reading = Callable[[KeyPath, Any], Matrices | None]
"""Path and leaf (an array, or something with its shape) -> how Muon reads it; None: AdamW's."""

Layout = Callable[[KeyPath, Any], NamedSharding]
"""Path and leaf -> where the leaf lies."""

ELEMENTS_TOGETHER = 2**28
"""On a device, of matrices of equal shape that are exchanged and treated in one batch: enough to fill any
chip, while a model's large parameters are still treated one after the other, in the same memory."""


class MuonState(NamedTuple):
    """What Muon remembers: M of every leaf, float32."""

    momentum: Any


def scale_by_muon(
    momentum: float,
    update_rms: float,
    matrices: Reading,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    layout: Layout | None = None,
) -> optax.GradientTransformation:
    """Gradients to orthogonalised updates O: positive, without rate and decay, in the gradients' dtype.

    Matrices of equal shape go through the iteration together, whichever leaves they come from.

    On a mesh the momentum lies where its parameter does. Matrices that are split by rows or columns are
    exchanged, all of one shape and split in one all-to-all, so that each device has some of them whole; what
    it computes is exchanged back. Devices that hold copies of a matrix compute copies of its update.

    Args:
        momentum: mu.
        update_rms: gamma.
        matrices: how each leaf is read; it must say so for all of them.
        compute_dtype: of the products, and of what is exchanged.
        layout: where each leaf lies, all on one mesh; None: on one device, or the compiler's affair.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates)
        kept = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, gradients)
        mixed = jax.tree.map(lambda m, g: momentum * m + g, kept, gradients)
        found, structure = jax.tree_util.tree_flatten_with_path(mixed)
        leaves = [leaf for _, leaf in found]
        readings = [matrices(path, leaf) for path, leaf in found]
        if layout is None:
            results = _updates(leaves, readings, [()] * len(leaves), {}, compute_dtype)
        else:
            placed = [layout(path, leaf) for path, leaf in found]
            results = _updates_on_mesh(leaves, readings, placed, compute_dtype)
        scaled = jax.tree.map(
            lambda o, g: (update_rms * o).astype(g.dtype), structure.unflatten(results), updates
        )
        return scaled, MuonState(kept)

    return optax.GradientTransformation(init, update)


def _updates_on_mesh(
    leaves: list[jax.Array], readings: list[Matrices], placed: list[NamedSharding], compute_dtype: Any
) -> list[jax.Array]:
    """`_updates` of whole arrays, run by each device on its own parts."""
    if not leaves:
        return []
    mesh, specs = placed[0].mesh, [sharding.spec for sharding in placed]
    splits = [
        tuple(axes_of(entry) for entry in (*spec, *[None] * (leaf.ndim - len(spec))))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]

    def own(*parts: jax.Array) -> list[jax.Array]:
        return _updates(list(parts), readings, splits, mesh.shape, compute_dtype)

    # Copies on several devices are computed alike, which cannot be checked.
    return jax.shard_map(own, mesh=mesh, in_specs=tuple(specs), out_specs=specs, check_vma=False)(*leaves)


def _updates(
    leaves: list[jax.Array],
    readings: list[Matrices],
    splits: list[tuple[tuple[str, ...], ...]],
    mesh_shape: Mapping[str, int],
    compute_dtype: Any,
) -> list[jax.Array]:
    """U V^T sqrt(max(n, m)) of every matrix in the leaves; this device's parts of them.

    Args:
        leaves: float32, parts of arrays.
        readings: of each leaf.
        splits: of each axis of each leaf, the mesh axes that it is split over; () for what is whole.
        mesh_shape: sizes of the mesh axes.
        compute_dtype: as in `scale_by_muon`.
    """
    batches: dict[tuple[Any, ...], list[tuple[int, jax.Array]]] = {}
    filled: dict[tuple[Any, ...], int] = {}  # elements so far
    for number, (leaf, reading, split) in enumerate(zip(leaves, readings, splits, strict=True)):
        axes = split[reading.num_stack :]
        if reading.sections and axes and axes[0]:
            raise ValueError(f"{reading} is parted by {axes[0]}: sections must be whole on every device")
        stacks = zip(reading.stacks(leaf), reading.shapes(leaf.shape), strict=True)
        for stack, shape in stacks:
            if any(axes):  # folded once they are whole
                key = (stack.shape[1:], reading.num_rows, axes)
            else:
                stack, key = stack.reshape(shape), (shape[1:], 1, ())
            before, filled[key] = filled.get(key, 0), filled.get(key, 0) + stack.size
            full = filled[key] // ELEMENTS_TOGETHER if before else 0
            batches.setdefault((*key, full), []).append((number, stack))
    results: list[list[jax.Array]] = [[] for _ in leaves]
    for (_, num_rows, axes, _), batch in batches.items():
        sizes = [[mesh_shape[axis] for axis in dim] for dim in axes]
        together = jnp.concatenate([stack.astype(compute_dtype) for _, stack in batch])

        def whole(stack: jax.Array, num_rows: int = num_rows) -> jax.Array:
            (folded,) = Matrices(1, num_rows).shapes(stack.shape)
            matrices = orthogonalized(stack.reshape(folded), compute_dtype)
            return matrices.astype(compute_dtype).reshape(stack.shape)

        shares = [math.prod(each) for each in sizes] or [1] * (together.ndim - 1)
        sides = [own * share for own, share in zip(together.shape[1:], shares, strict=True)]
        longer = max(math.prod(sides[:num_rows]), math.prod(sides[num_rows:]))
        found = on_whole_matrices(whole, together, axes, sizes).astype(jnp.float32) * math.sqrt(longer)
        start = 0
        for number, stack in batch:
            results[number].append(found[start : start + len(stack)])
            start += len(stack)
    return [
        _leaf(stacks, reading, leaf.shape)
        for stacks, reading, leaf in zip(results, readings, leaves, strict=True)
    ]


def _leaf(stacks: list[jax.Array], reading: Matrices, shape: tuple[int, ...]) -> jax.Array:
    """An array from the stacks that `Matrices.stacks` made of it, folded or not."""
    own = shape[reading.num_stack + 1 :]
    parts = [stack.reshape(len(stack), -1, *own) for stack in stacks]
    return jnp.concatenate(parts, axis=1).reshape(shape)
