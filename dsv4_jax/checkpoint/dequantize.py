"""Block-scaled FP8 and FP4 weights of files to plain arrays, in numpy.

Products are formed in float32, where they are exact (`pallas_kernels.formats.on_host`), and rounded once to
the target dtype; bfloat16 holds the 4 significant bits of E4M3 (2 of E2M1), so that is exact too.
"""

import ml_dtypes
import numpy as np

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats.on_host import (
    fp4_packed_shape,
    fp4_rows,
    fp4_scale_shape,
    fp8_rows,
    fp8_scale_shape,
)
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK


def dequantize_into(target: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> bool:
    """Writes the dequantised weight into `target`; extra memory is 128 rows in float32.

    Args:
        target: float32 or bfloat16 [.., O, I], written in place.
        weight: float8_e4m3fn [.., O, I], or int8 / uint8 [.., O, I/2].
        scale: float8_e8m0fnu or float32, blocks of 128 x 128 or groups of 1 x 32.

    Returns:
        Whether every value written is finite: a NaN code or scale, or an overflow, makes it False.

    Raises:
        ValueError: shapes that do not belong together.
    """
    fp8 = weight.dtype == ml_dtypes.float8_e4m3fn
    shape = target.shape
    expected = (shape, fp8_scale_shape(shape)) if fp8 else (fp4_packed_shape(shape), fp4_scale_shape(shape))
    if (weight.shape, scale.shape) != expected or (not fp8 and shape[-1] % FP4_GROUP):
        raise ValueError(
            f"weight {weight.dtype} {weight.shape} with scale {scale.shape} does not fill {shape}"
        )
    everything = slice(0, shape[-2]), slice(0, shape[-1])
    parts = [dequantize_part(target[m], weight[m], scale[m], *everything) for m in np.ndindex(shape[:-2])]
    return all(parts)


def dequantize_part(
    target: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    rows: slice,
    columns: slice,
    first_block: tuple[int, int] = (0, 0),
) -> bool:
    """As `dequantize_into`, for some rows and columns of one matrix.

    Args:
        target: float32 or bfloat16 of the size of that part.
        weight: the stored matrix, as there.
        scale: of the blocks that the part touches, or of more.
        rows, columns: of the part, in numbers; they may begin and end inside blocks.
        first_block: row and column of the first block that `scale` has.
    """
    fp8 = weight.dtype == ml_dtypes.float8_e4m3fn
    tall, wide = (FP8_BLOCK, FP8_BLOCK) if fp8 else (1, FP4_GROUP)
    top, left = rows.start // tall, columns.start // wide
    bottom, right = cdiv(rows.stop, tall), cdiv(columns.stop, wide)
    of_scale = scale[
        top - first_block[0] : bottom - first_block[0], left - first_block[1] : right - first_block[1]
    ]
    in_byte = 1 if fp8 else 2
    of_weight = weight[top * tall : bottom * tall, left * wide // in_byte : right * wide // in_byte]
    start, stop = columns.start - left * wide, columns.stop - left * wide
    finite = True
    with np.errstate(over="ignore", invalid="ignore"):
        for row, piece in (fp8_rows if fp8 else fp4_rows)(of_weight, of_scale):
            above = max(rows.start - top * tall - row, 0)  # rows of the first block that are not wanted
            values = piece[above : rows.stop - top * tall - row, start:stop]
            place = row + above - (rows.start - top * tall)
            target[place : place + len(values)] = values
            finite = finite and bool(np.isfinite(values).all())
    return finite
