"""Boxes: the parts of an array in which parameters are read, drawn, placed and written.

A box is a slice for every axis, as `jax.sharding.Sharding.devices_indices_map` gives one to each device. A
tensor of a checkpoint is a box of its parameter, the part of a parameter that a device holds is another, and
what one needs of the other is where they overlap. Nothing here touches an array.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from dsv4_jax.errors import ProblemsError

Box = tuple[slice, ...]
"""One slice an axis, with a start, a stop beyond it, and no step."""

PIECE_ELEMENTS = 1 << 20
"""Large arrays are converted, looked at and drawn in pieces of so many numbers, which costs a few MB."""


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of an array."""
    return tuple(slice(0, size) for size in shape)


def at(place: Sequence[int], shape: Sequence[int]) -> Box:
    """The box of the elements whose first indices are `place`; those axes stay, with size 1."""
    return (*(slice(i, i + 1) for i in place), *whole(shape[len(place) :]))


def concrete(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that an index of slices means in an array of this shape.

    Raises:
        ProblemsError: another number of slices than axes, steps, or slices that are empty or reach outside.
    """
    problems = []
    if len(index) != len(shape):
        problems.append(f"{len(index)} slices for the {len(shape)} axes of shape {tuple(shape)}")
    box = []
    for axis, (part, size) in enumerate(zip(index, shape, strict=False)):
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start < stop <= size:
            problems.append(f"axis {axis}: {part} is not a range inside 0 .. {size} without a step")
        box.append(slice(start, stop))
    if problems:
        raise ProblemsError("no box of an array", problems)
    return tuple(box)


def shape_of(box: Box) -> tuple[int, ...]:
    """Sizes of a box's axes."""
    return tuple(part.stop - part.start for part in box)


def size_of(box: Box) -> int:
    """Number of elements in a box."""
    return math.prod(shape_of(box))


def places(box: Box) -> Iterator[tuple[int, ...]]:
    """The indices of all elements of a box, in order."""
    return itertools.product(*(range(part.start, part.stop) for part in box))


def overlap(first: Box, second: Box) -> Box | None:
    """What two boxes of one array share; None if that is nothing."""
    shared = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True)
    )
    return shared if all(part.start < part.stop for part in shared) else None


def inside(box: Box, outer: Box) -> Box:
    """A box of an array as a box of the part `outer` of that array, which contains it."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))


def pieces(shape: Sequence[int]) -> Iterator[Box]:
    """Boxes of at most `PIECE_ELEMENTS` that make up an array: runs of its elements in C order."""
    rest = math.prod(shape[1:])
    if len(shape) > 1 and rest > PIECE_ELEMENTS:
        for i in range(shape[0]):
            yield from ((slice(i, i + 1), *piece) for piece in pieces(shape[1:]))
        return
    step = max(1, PIECE_ELEMENTS // rest)
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])), *whole(shape[1:]))


def runs(sizes: Sequence[int], box: Box) -> list[slice]:
    """The ranges that a box covers of the one axis into which its axes are folded.

    All have the same length, and in order they are the elements of the box.

    Args:
        sizes: of the axes that are folded.
        box: a slice for each of them.
    """
    cut = [axis for axis, size in enumerate(sizes) if box[axis] != slice(0, size)]
    last = cut[-1] if cut else 0  # the axes behind it are whole
    unit = math.prod(sizes[last + 1 :])
    found = []
    for place in places(box[:last]):
        first = 0
        for i, size in zip(place, sizes, strict=False):
            first = first * size + i
        first *= sizes[last]
        found.append(slice((first + box[last].start) * unit, (first + box[last].stop) * unit))
    return found
