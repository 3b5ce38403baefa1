"""One parameter of which boxes can be read, and how the boxes of quantised weights are cut."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from dsv4_jax.boxes import Box
from dsv4_jax.checkpoint.storage import Format
from dsv4_jax.errors import ProblemsError
from dsv4_jax.numerics.formats import FP4_GROUP, FP8_BLOCK, Fp8Blocks, Mxfp4

Blocks = Fp8Blocks | Mxfp4

BLOCK: Mapping[Format, tuple[int, int]] = {"fp8": (FP8_BLOCK, FP8_BLOCK), "fp4": (1, FP4_GROUP)}
"""Rows and columns that share a scale."""


@dataclasses.dataclass(frozen=True)
class Held:
    """One parameter, of which boxes can be read.

    Attributes:
        shape: of the axes that a box cuts: those of the parameter, and of a quantised one [*leading, O, I].
        format: 'bf16' stands for plain numbers of any dtype.
        dtype: of plain numbers; None for quantised ones.
        read_box: a box -> an array of that shape, or the quantised array with its elements and scales. What
            it gives may be a view of the parameter: not to be written to.
    """

    shape: tuple[int, ...]
    format: Format
    dtype: np.dtype | None
    read_box: Callable[[Box], np.ndarray | Blocks]


def part_boxes(how: Format, box: Box, shape: tuple[int, ...]) -> tuple[Box, Box]:
    """A box of a quantised weight as a box of its elements as they are stored, and a box of its scales.

    Args:
        how: 'fp8' or 'fp4'.
        box: of [.., O, I].
        shape: [.., O, I] of the whole weight.

    Raises:
        ProblemsError: if the box cuts through a block; the last blocks of an axis may be partial.
    """
    problems = [
        f"axis {axis - 2} of {shape}: {part.start} .. {part.stop} cuts a quantisation block of {block}"
        for axis, part, block in zip(range(2), box[-2:], BLOCK[how], strict=True)
        if part.start % block or (part.stop % block and part.stop != shape[axis - 2])
    ]
    if problems:
        raise ProblemsError(f"no box of {how.upper()} weights", problems)
    scales = [
        slice(part.start // block, -(-part.stop // block))
        for part, block in zip(box[-2:], BLOCK[how], strict=True)
    ]
    columns = box[-1] if how == "fp8" else slice(box[-1].start // 2, box[-1].stop // 2)
    return (*box[:-1], columns), (*box[:-2], *scales)
