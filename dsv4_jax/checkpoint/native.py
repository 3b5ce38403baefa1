"""Quantised parameters in memory as they are stored: same bytes, next to one another.

A parameter joins many tensors (layers, experts, gate and up), and one array joins their elements and one
their scales. That takes tensors of one format, scales that are powers of two, and blocks that do not
straddle the tensors of the official layout; a parameter that breaks one of these is dequantised, with a
warning.
"""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint.dequantize import (
    FP8_BLOCK,
    fp4_packed_shape,
    fp4_rows,
    fp4_scale_shape,
    fp8_rows,
    fp8_scale_shape,
)
from dsv4_jax.checkpoint.tensor_rules import Entry
from dsv4_jax.checkpoint.values import (
    PIECE_ELEMENTS,
    Findings,
    checked_scale,
    powers_of_two,
    quantized_problem,
)
from dsv4_jax.numerics.formats import Fp8Blocks, Mxfp4
from dsv4_jax.numerics.weights import QuantizedWeight
from dsv4_jax.parameters import Parameter

LARGEST_SAFE_SCALE = 127 + 118
"""E8M0 byte up to which no product can overflow: 448 < 2^9."""

SMALLEST_SCALE = np.float32(2.0**-127)

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]


def can_stay(parameter: Parameter, entries: Sequence[Entry], read: Callable[[str], np.ndarray]) -> bool:
    """Whether a parameter's tensors are stored alike, in blocks of the official tensors' own, with scales
    that E8M0 holds."""
    formats = {entry.format for entry in entries}
    rows = parameter.stored[-2]
    own_blocks = rows % FP8_BLOCK == 0 or all(entry.spec.shape[-2] == rows for entry in entries)
    if not (formats == {"fp4"} or (formats == {"fp8"} and own_blocks)):
        return False
    scales = (read(entry.scale.name) for entry in entries if entry.scale is not None)
    return all(_codes(scale) is not None for scale in scales)


def read_native(
    parameter: Parameter,
    entries: Sequence[Entry],
    read: Callable[[str], np.ndarray],
    findings: Findings,
    allocate: Allocate,
    done: Callable[[Entry], None],
) -> QuantizedWeight:
    """One parameter's elements and scales.

    Args:
        parameter: shape.
        entries: its tensors, for which `can_stay` holds.
        read: name in the files -> stored array.
        findings: receives NaN scales, FP8 NaN and overflow.
        allocate: (shape, dtype) -> array.
        done: called after each tensor.
    """
    fp8 = entries[0].format == "fp8"
    width = parameter.stored if fp8 else fp4_packed_shape(parameter.stored)
    grid = fp8_scale_shape(parameter.stored) if fp8 else fp4_scale_shape(parameter.stored)
    elements = allocate((*parameter.leading, *width), np.dtype(np.uint8))
    scale = allocate((*parameter.leading, *grid), np.dtype(np.uint8))
    for entry in entries:
        stored, stored_scale = read(entry.tensor.name), checked_scale(entry.scale, read, findings)
        codes = None if stored_scale is None else _codes(stored_scale)
        if codes is None:  # NaN, said already
            done(entry)
            continue
        index = entry.spec.index
        elements[index].reshape(stored.shape)[...] = stored.view(np.uint8)
        scale[index].reshape(codes.shape)[...] = codes
        if not _finite(stored, codes):
            where = f"{entry.tensor.path.name}: {entry.tensor.name}"
            findings.problems.append(f"{where}: {quantized_problem(stored)}")
        done(entry)
    if fp8:
        blocks = Fp8Blocks(elements.view(ml_dtypes.float8_e4m3fn), scale)
    else:
        blocks = Mxfp4(elements, scale)
    return QuantizedWeight(blocks, parameter.own)


def _codes(scale: np.ndarray) -> np.ndarray | None:
    """E8M0 bytes of scales; None for float32 ones that are no powers of two in its range."""
    if scale.dtype != np.float32:
        return scale.view(np.uint8)
    if not ((scale >= SMALLEST_SCALE).all() and powers_of_two(scale)):
        return None
    return (np.frexp(scale)[1] + 126).astype(np.uint8)  # frexp: 0.5 * 2^exponent


def _finite(stored: np.ndarray, codes: np.ndarray) -> bool:
    """Whether every element times its scale is a finite float32."""
    fp8 = stored.dtype == ml_dtypes.float8_e4m3fn
    if codes.max() > LARGEST_SAFE_SCALE:
        rows = fp8_rows if fp8 else fp4_rows
        scale = codes.view(ml_dtypes.float8_e8m0fnu)
        with np.errstate(over="ignore", invalid="ignore"):
            return all(
                bool(np.isfinite(piece).all())
                for place in np.ndindex(stored.shape[:-2])
                for _, piece in rows(stored[place], scale[place])
            )
    if not fp8:
        return True
    flat = stored.view(np.uint8).reshape(-1)
    starts = range(0, flat.size, PIECE_ELEMENTS)
    return not any(((flat[s : s + PIECE_ELEMENTS] & 0x7F) == 0x7F).any() for s in starts)
