"""Meshes of this project: five axes, always all of them, and a spelling for people.

data     batch rows; parameters are copied
fsdp     batch rows; parameters are split, and gathered where they are used
expert   routed experts; batch rows too
tensor   output groups of attention heads, the experts' width, the vocabulary
context  tokens of a row

An axis that nobody asked for has size 1. Programs name every axis, so that the same program text serves every
mesh, and a spec that forgets an axis shows at once.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "expert", "tensor", "context")


class MeshError(ValueError):
    """A mesh that cannot be.

    Args:
        what: one sentence saying what was refused.
        problems: every broken rule with the offending value, and meshes close by that would do.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.what, self.problems = what, tuple(problems)
        super().__init__(f"{what}: " + "; ".join(problems))


_PART = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*([+-]?\w+)\s*")


def parse(text: str) -> dict[str, int]:
    """Sizes of the axes that a spelling such as "expert=8,tensor=2" names.

    Raises:
        MeshError: for anything else than axis=size parts between commas, axes that there are not or that come
            twice, and sizes that are no integers >= 1; all problems at once.
    """
    sizes: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if not found:
            problems.append(f"{part.strip()!r} is not axis=size")
            continue
        axis, size = found.groups()
        if axis not in AXES:
            problems.append(f"there is no axis {axis!r}, only {', '.join(AXES)}")
        elif axis in sizes:
            problems.append(f"axis {axis} is named twice")
        elif not size.isdecimal() or int(size) < 1:
            problems.append(f"{axis}={size}: the size must be an integer >= 1")
        sizes.setdefault(axis, int(size) if size.isdecimal() else 1)
    if problems:
        raise MeshError(f"no mesh {text!r}", [*problems, "a mesh is spelled like expert=8,tensor=2"])
    return sizes


def spelled(mesh: Mesh) -> str:
    """How a person would write a mesh: its axes larger than 1, or "data=1" for one device."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "data=1"


def mesh_of(given: str | Mapping[str, int] | Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with all five axes that a spelling, sizes, or another mesh stand for.

    Axes are laid out so that neighbours on the last axes are neighbours on the chips' links, where JAX knows
    them.

    Args:
        given: "expert=8,tensor=2", {"expert": 8, "tensor": 2}, or a mesh with some of the axes, whose order
            of devices is kept.
        devices: to take the first so many of; None: all that JAX has. Not for a given mesh.

    Raises:
        MeshError: for bad spellings, axes that there are not, more devices than there are, and, with several
            processes, fewer; it names meshes close by that would do.
    """
    if isinstance(given, Mesh):
        return _with_all_axes(given)
    if isinstance(given, str):
        sizes = parse(given)
    else:
        sizes = parse(",".join(f"{axis}={size}" for axis, size in given.items()) or "data=1")
    everything = list(jax.devices() if devices is None else devices)
    count = math.prod(sizes.values())
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    several = len({device.process_index for device in everything}) > 1
    if count > len(everything) or (several and count < len(everything)):
        wish = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        rule = f"{wish} takes {count} devices, and there are {len(everything)}"
        near = [f"try {each}" for each in _nearest(sizes, len(everything))]
        if count < len(everything):
            rule += ", all of which several processes must use"
        raise MeshError(f"no mesh {wish!r} here", [rule, *near])
    chosen = everything[:count]
    if count < len(everything):
        return Mesh(np.array(chosen).reshape(shape), AXES)
    # Any split of any slice: an axis of 8 takes half of one side of 4 x 4 chips besides all of the other.
    return Mesh(mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True), AXES)


def described(given: str) -> AbstractMesh:
    """A mesh of devices that nobody has at hand, for shapes, bytes and plans.

    Args:
        given: a spelling, "expert=16,tensor=2".

    Raises:
        MeshError: for a bad spelling.
    """
    sizes = parse(given)
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, (AxisType.Auto,) * len(AXES))


def _with_all_axes(mesh: Mesh) -> Mesh:
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise MeshError("no mesh of this project", [f"there are no axes {unknown}, only {', '.join(AXES)}"])
    if mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}:
        return mesh
    own = [axis for axis in AXES if axis in mesh.axis_names]
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in own])
    return Mesh(devices.reshape([mesh.shape.get(axis, 1) for axis in AXES]), AXES)


def _nearest(sizes: Mapping[str, int], available: int) -> list[str]:
    """Spellings with the same axes for exactly so many devices, at most three, the closest first."""
    axes = list(sizes)

    def splits(count: int, left: int) -> list[tuple[int, ...]]:
        if left == 1:
            return [(count,)]
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        return [(n, *rest) for n in divisors for rest in splits(count // n, left - 1)]

    def distance(candidate: tuple[int, ...]) -> float:
        return sum(abs(math.log(n / sizes[axis])) for axis, n in zip(axes, candidate, strict=True))

    found = sorted(splits(available, len(axes)), key=distance)[:3]
    return [",".join(f"{axis}={n}" for axis, n in zip(axes, each, strict=True)) for each in found]
