"""Block-scaled FP8 and FP4 weights to plain arrays, in numpy.

    FP8: weight E4M3FN [.., O, I], scale [.., ceil(O/128), ceil(I/128)]
         W[o, i] = q[o, i] * s[o div 128, i div 128]
    FP4: weight E2M1, two a byte, [.., O, I/2], scale [.., O, I/32]
         W[o, i] = q[o, i] * s[o, i div 32]

Byte k of an FP4 row holds column 2k in its low nibble and 2k + 1 in its high one. A scale byte b
(E8M0) means 2^(b - 127); 0x00 is 2^-127, a float32 subnormal that must not be flushed, and 0xFF is
not a number. Products are formed in float32, where they are exact, and rounded once to the target
dtype; bfloat16 holds the 4 significant bits of E4M3 (2 of E2M1), so that is exact too.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

FP8_BLOCK = 128
FP4_GROUP = 32
E8M0_NAN = 0xFF

_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_FP4_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4_VALUES = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])
# [byte]: both values of a byte, low nibble first, as one 64-bit word
_FP4_PAIRS = np.stack([np.tile(_FP4_VALUES, 16), np.repeat(_FP4_VALUES, 16)], axis=1).view(np.uint64)[:, 0]
_E8M0_VALUES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))


def fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an FP8 weight [.., O, I]; the last blocks may be partial."""
    return (*shape[:-2], -(-shape[-2] // FP8_BLOCK), -(-shape[-1] // FP8_BLOCK))


def fp4_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an FP4 weight of logical shape [.., O, I], I a multiple of 32."""
    return (*shape[:-1], shape[-1] // FP4_GROUP)


def fp4_packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape on disk of an FP4 weight of logical shape [.., O, I]: two values a byte."""
    return (*shape[:-1], shape[-1] // 2)


def scale_values(scale: np.ndarray) -> np.ndarray:
    """Scales as float32: E8M0 bytes decoded, float32 taken as it is.

    Args:
        scale: float8_e8m0fnu or float32, any shape.
    """
    return scale if scale.dtype == np.float32 else _E8M0_VALUES[scale.view(np.uint8)]


def fp8_rows(weight: np.ndarray, scale: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [rows, I]) pieces of one FP8 matrix, one row of blocks at a time.

    Args:
        weight: float8_e4m3fn [O, I].
        scale: float8_e8m0fnu or float32 [ceil(O/128), ceil(I/128)].
    """
    codes, scales = weight.view(np.uint8), scale_values(scale)
    for block in range(scale.shape[0]):
        row = block * FP8_BLOCK
        piece = np.take(_FP8_VALUES, codes[row : row + FP8_BLOCK], mode="clip")
        piece *= np.repeat(scales[block], FP8_BLOCK)[: piece.shape[1]]
        yield row, piece


def fp4_rows(weight: np.ndarray, scale: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [rows, I]) pieces of one FP4 matrix, 128 rows at a time.

    Args:
        weight: int8 or uint8 [O, I/2].
        scale: float8_e8m0fnu or float32 [O, I/32].
    """
    codes, scales = weight.view(np.uint8), scale_values(scale)
    for row in range(0, weight.shape[0], FP8_BLOCK):
        piece = np.take(_FP4_PAIRS, codes[row : row + FP8_BLOCK], mode="clip").view(np.float32)
        piece *= np.repeat(scales[row : row + FP8_BLOCK], FP4_GROUP, axis=1)
        yield row, piece


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
    bottom, right = -(-rows.stop // tall), -(-columns.stop // wide)
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
