"""Where a model's arrays live on a mesh: rules from dims to mesh axes, and arrays made box by box.

A rule gives a dim, by its letter, to a mesh axis or to several: {"E": "expert", "V": ("data", "tensor")}.
In one array a mesh axis splits one dim, the first that asks for it; dims without a rule are whole on every
device. Splits are even. `sharding.rules` tells the rest of the language, and has the tables of this project.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.rules import OPTIONAL, Rules, axis_names, rule_for

ALIGNMENT = 64
"""Bytes; JAX on a CPU takes over host buffers so aligned instead of copying them."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of an array that is to be placed.

    Attributes:
        letters: of its dim; of several where an array folds neighbouring dims into one axis.
        sizes: of those dims.
        block: elements that share a scale along this axis, which no split may part.
    """

    letters: tuple[str, ...]
    sizes: tuple[int, ...]
    block: int = 1

    @property
    def size(self) -> int:
        """Number of elements along the axis."""
        return math.prod(self.sizes)


def rule_problems(mesh: Mesh | AbstractMesh, rules: Rules, letters: frozenset[str]) -> list[str]:
    """What is wrong with rules whatever they are used for.

    Args:
        mesh: the devices.
        rules: letter, or path:letter, -> axes of the mesh.
        letters: of all dims that there are.
    """
    problems = [
        f"rule for {key!r}: no dim has this letter" for key in rules if key.split(":")[-1] not in letters
    ]
    return problems + [
        f"rule for {key!r}: the mesh has no axis {name!r}, only {list(mesh.axis_names)}"
        for key, axes in rules.items()
        for axis in axis_names(axes)
        if (name := axis.removesuffix(OPTIONAL)) not in mesh.axis_names
    ]


def sharding_of(
    name: str, axes: Sequence[Axis], mesh: Mesh | AbstractMesh, rules: Rules
) -> tuple[NamedSharding, list[str]]:
    """The sharding of one array, and why it cannot be had.

    Args:
        name: path of the array, for rules of its own and for the problems.
        axes: of the array.
        mesh: the devices.
        rules: letter, or path:letter, -> axes of the mesh; axes that the mesh does not have are skipped.
    """
    by_axis, problems = cuts_of(name, axes, mesh, rules)
    entries = [tuple(each for cut in letters for each in cut) or None for letters in by_axis]
    while entries and entries[-1] is None:
        entries.pop()  # as the compiler spells what comes out of a step: one spelling, one program
    return NamedSharding(mesh, PartitionSpec(*entries)), problems


def cuts_of(
    name: str, axes: Sequence[Axis], mesh: Mesh | AbstractMesh, rules: Rules
) -> tuple[list[list[tuple[str, ...]]], list[str]]:
    """Over which axes of the mesh one array is split: for each of its axes, along each letter that it folds.
    Also why some of what the rules ask for cannot be had; such an axis of the mesh splits nothing.

    Args:
        name, axes, mesh, rules: as for `sharding_of`.
    """
    used: set[str] = set()
    by_axis: list[list[tuple[str, ...]]] = []
    problems: list[str] = []
    for axis in axes:
        by_letter: list[tuple[str, ...]] = []
        for position, letter in enumerate(axis.letters):
            before, own = ways(mesh, [each for cut in by_letter for each in cut]), ()
            for wanted in axis_names(rule_for(rules, name, letter)):
                mesh_axis = wanted.removesuffix(OPTIONAL)
                if mesh_axis in used or mesh.shape.get(mesh_axis, 1) == 1:
                    continue
                problem = _cut_problem(axis, position, before, (*own, mesh_axis), mesh)
                if problem is None:
                    own = (*own, mesh_axis)
                    used.add(mesh_axis)
                elif not wanted.endswith(OPTIONAL):
                    problems.append(f"{name}: {problem}")
            by_letter.append(own)
        by_axis.append(by_letter)
    return by_axis, problems


def ways(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """Into how many parts these axes of a mesh split a dim."""
    return math.prod(mesh.shape[axis] for axis in axes)


def _cut_problem(
    axis: Axis, position: int, before: int, over: tuple[str, ...], mesh: Mesh | AbstractMesh
) -> str | None:
    """Why an axis of an array cannot be cut along the dim at `position` of it, by these axes of the mesh.

    Args:
        axis: of the array.
        position: of the dim among those that the axis folds.
        before: parts that the dims in front of it make. They must be single elements: only then is what a
            device gets one range of the folded axis.
        over: axes of the mesh.
        mesh: the devices.
    """
    letter, size = axis.letters[position], axis.sizes[position]
    parts = ways(mesh, over)
    if size % parts:
        can = [n for n in range(1, size + 1) if size % n == 0]
        near = ", ".join(map(str, sorted(sorted(can, key=lambda n: abs(math.log(n / parts)))[:3])))
        return f"{letter} = {size} cannot be split {parts} ways ({_words(over)}); {near} can"
    if before != math.prod(axis.sizes[:position]):
        return (
            f"{letter} cannot be split ({_words(over)}): its stored matrix folds"
            f" ({' '.join(axis.letters)}), and only the first of them can be cut"
        )
    if axis.size // (before * parts) % axis.block:
        return (
            f"{before * parts} parts ({_words(over)}) of {axis.size} elements would cut"
            f" a quantisation block of {axis.block}"
        )
    return None


def placed(
    read_box: Callable[[tuple[slice, ...]], Any], shape: Sequence[int], sharding: NamedSharding | None
) -> Any:
    """Arrays on their devices, from the boxes that this process's devices hold. Each box is read once.

    On the host there is one box at a time, and none where the device is a CPU: there JAX takes over a buffer
    that `aligned` made (a buffer that is given must therefore never be written again).

    Args:
        read_box: slices of an array of `shape` -> that part, a numpy array or a tree of them whose axes may
            be shorter than the slices by a constant factor (elements and block scales of a quantised array).
        shape: of the whole.
        sharding: None: the default device, not committed to it.

    Returns:
        What `read_box` returns, with whole `jax.Array`s for its arrays.
    """
    if sharding is None:
        return jax.device_put(read_box(tuple(slice(0, size) for size in shape)))
    shape, trees = tuple(shape), []
    for index, devices in own_boxes(shape, sharding):
        box = read_box(index)
        copies = [jax.device_put(box, device) for device in devices]
        del box  # once it is on its devices
        trees += jax.block_until_ready(copies)
    parts = [size // own for size, own in zip(shape, sharding.shard_shape(shape), strict=True)]

    def joined(*arrays: jax.Array) -> jax.Array:
        size = tuple(n * count for n, count in zip(arrays[0].shape, parts, strict=True))
        return jax.make_array_from_single_device_arrays(size, sharding, list(arrays))

    return jax.tree.map(joined, *trees)


def own_boxes(
    shape: Sequence[int], sharding: jax.sharding.Sharding
) -> list[tuple[tuple[slice, ...], list[jax.Device]]]:
    """The different boxes of an array that are this process's, each with its devices that hold it."""
    holders: dict[tuple[tuple[int, int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        holders.setdefault(key, []).append(device)
    return [
        (tuple(slice(start, stop) for start, stop, _ in key), devices) for key, devices in holders.items()
    ]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array that starts at a multiple of `ALIGNMENT` bytes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _words(axes: tuple[str, ...]) -> str:
    return "mesh axis " + " and ".join(axes)
