"""The numpy twin of `blocks.py`, for tensors of files: shapes of scales, and matrices decoded row by row.

    FP8: weight E4M3FN [.., O, I], scale [.., ceil(O/128), ceil(I/128)]
         W[o, i] = q[o, i] * s[o div 128, i div 128]
    FP4: weight E2M1, two a byte, [.., O, I/2], scale [.., O, I/32]
         W[o, i] = q[o, i] * s[o, i div 32]

Products are formed in float32, where they are exact (subnormal scales are not flushed here, see `e8m0`).
"""

from collections.abc import Iterator

import numpy as np

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats import e2m1, e4m3, e8m0
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK


def fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an FP8 weight [.., O, I]; the last blocks may be partial."""
    return (*shape[:-2], cdiv(shape[-2], FP8_BLOCK), cdiv(shape[-1], FP8_BLOCK))


def fp4_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an FP4 weight of logical shape [.., O, I], I a multiple of 32."""
    return (*shape[:-1], shape[-1] // FP4_GROUP)


def fp4_packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in memory and on disk of an FP4 weight of logical shape [.., O, I]: two values a byte."""
    return (*shape[:-1], shape[-1] // 2)


def fp8_rows(weight: np.ndarray, scale: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [rows, I]) pieces of one FP8 matrix, one row of blocks at a time.

    Args:
        weight: float8_e4m3fn [O, I].
        scale: float8_e8m0fnu or float32 [ceil(O/128), ceil(I/128)].
    """
    codes, scales = weight.view(np.uint8), e8m0.values_on_host(scale)
    for block in range(scale.shape[0]):
        row = block * FP8_BLOCK
        piece = np.take(e4m3.VALUES, codes[row : row + FP8_BLOCK], mode="clip")
        piece *= np.repeat(scales[block], FP8_BLOCK)[: piece.shape[1]]
        yield row, piece


def fp4_rows(weight: np.ndarray, scale: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [rows, I]) pieces of one FP4 matrix, 128 rows at a time.

    Args:
        weight: int8 or uint8 [O, I/2].
        scale: float8_e8m0fnu or float32 [O, I/32].
    """
    codes, scales = weight.view(np.uint8), e8m0.values_on_host(scale)
    for row in range(0, weight.shape[0], FP8_BLOCK):
        piece = np.take(e2m1.PAIRS, codes[row : row + FP8_BLOCK], mode="clip").view(np.float32)
        piece *= np.repeat(scales[row : row + FP8_BLOCK], FP4_GROUP, axis=1)
        yield row, piece
