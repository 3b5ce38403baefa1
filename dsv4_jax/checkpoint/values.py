"""Reading one tensor into its place in a parameter, looking at its values on the way.

Scales, hash tables and all float32 and float16 tensors are always scanned; bfloat16 weights when asked. Work
goes on in pieces of a few MB, so a tensor costs no memory beyond its mapped pages.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint.dequantize import E8M0_NAN, dequantize_into
from dsv4_jax.checkpoint.names import TensorSpec
from dsv4_jax.checkpoint.safetensors import TensorInfo
from dsv4_jax.checkpoint.tensor_rules import Entry

PIECE_ELEMENTS = 1 << 20


@dataclasses.dataclass
class Findings:
    """What reading found so far."""

    problems: list[str] = dataclasses.field(default_factory=list)
    all_zero: list[str] = dataclasses.field(default_factory=list)
    inexact_scales: list[str] = dataclasses.field(default_factory=list)
    dequantized: list[str] = dataclasses.field(default_factory=list)
    rounded: list[str] = dataclasses.field(default_factory=list)

    def warnings(self) -> list[str]:
        """What is odd but harmless, one sentence for all the tensors that it concerns."""
        result = []
        for held, what in (
            (self.all_zero, "all zero"),
            (self.inexact_scales, "scales other than powers of two; dequantised all the same"),
            (self.rounded, "stored as F16, rounded to bfloat16; float32 would hold them exactly"),
            (self.dequantized, "stored in ways that share no array with others; dequantised"),
        ):
            if held:
                more = f" and {len(held) - 3} more" if len(held) > 3 else ""
                result.append(f"{', '.join(held[:3])}{more}: {what}")
        return result


def place_in(parameter: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The part of a parameter that a tensor fills, as a view with the tensor's shape on disk."""
    return parameter[spec.index].reshape(spec.shape)


def read_entry(
    entry: Entry,
    read: Callable[[str], np.ndarray],
    target: np.ndarray,
    findings: Findings,
    *,
    num_experts: int,
    scan_weights: bool,
) -> None:
    """Fills `target` with the tensor's values in the target's dtype.

    Args:
        entry: the tensor, matched with its header.
        read: name in the files -> stored array.
        target: writable, of shape `entry.spec.shape`, C-contiguous in its last two dims.
        findings: receives problems (values that are not usable) and what is odd but harmless.
        num_experts: E, the bound of the hash tables' entries.
        scan_weights: look for NaN and infinity in bfloat16 tensors too.
    """
    name = f"{entry.tensor.path.name}: {entry.tensor.name}"
    stored = read(entry.tensor.name)
    if entry.scale is not None:
        scale = checked_scale(entry.scale, read, findings)
        if scale is not None and not dequantize_into(target, stored, scale):
            findings.problems.append(f"{name}: {quantized_problem(stored)}")
        return
    if entry.spec.kind == "table":
        _copy_table(stored, target, findings, name, num_experts)
    else:
        scan = scan_weights or stored.dtype != ml_dtypes.bfloat16 or entry.spec.kind != "matrix"
        bad = _copy_floats(stored, target, scan)
        if bad:
            findings.problems.append(f"{name}: {bad} of {stored.size} values are NaN or infinite")
        if stored.dtype == np.float16 and target.dtype == ml_dtypes.bfloat16:
            findings.rounded.append(entry.tensor.name)
        if entry.spec.parameter.role in ("selection_bias", "mixing_gate") and not target.any():
            findings.all_zero.append(entry.tensor.name)


def checked_scale(
    tensor: TensorInfo, read: Callable[[str], np.ndarray], findings: Findings
) -> np.ndarray | None:
    """Block scales as stored, or None if they are not usable, which `findings` then says."""
    scale = read(tensor.name)
    problem = scale_problem(scale)
    if problem is not None:
        findings.problems.append(f"{tensor.path.name}: {tensor.name}: {problem}")
        return None
    if scale.dtype == np.float32 and not powers_of_two(scale):
        findings.inexact_scales.append(tensor.name)
    if not scale.view(np.uint8).any():
        findings.all_zero.append(tensor.name)
    return scale


def _copy_floats(stored: np.ndarray, target: np.ndarray, scan: bool) -> int:
    """Converts in pieces; gives the number of non-finite results if `scan`."""
    bad = 0
    for place in np.ndindex(stored.shape[:-2]):
        source, part = np.atleast_2d(stored[place]), np.atleast_2d(target[place])
        rows = max(1, PIECE_ELEMENTS // source.shape[-1])
        for row in range(0, source.shape[0], rows):
            piece = part[row : row + rows]
            with np.errstate(over="ignore", invalid="ignore"):
                piece[...] = source[row : row + rows]
            if scan:  # of the result: narrowing float32 may overflow what was finite
                bad += num_non_finite(piece)
    return bad


def num_non_finite(values: np.ndarray) -> int:
    """How many of float numbers are NaN or infinite."""
    if values.dtype == ml_dtypes.bfloat16:  # by bits: numpy's own test is slow for this dtype
        return int(np.count_nonzero((values.view(np.uint16) & 0x7F80) == 0x7F80))
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def _copy_table(
    stored: np.ndarray, target: np.ndarray, findings: Findings, name: str, num_experts: int
) -> None:
    """int64 or int32 [V, Ke] to int32: every row must name Ke different experts."""
    outside = int(((stored < 0) | (stored >= num_experts)).sum())
    if outside:
        findings.problems.append(
            f"{name}: {outside} of {stored.size} expert numbers are outside 0 .. {num_experts - 1}"
        )
        return
    target[...] = stored
    ordered = np.sort(target, axis=-1)
    repeated = int((ordered[:, 1:] == ordered[:, :-1]).any(axis=-1).sum())
    if repeated:
        findings.problems.append(f"{name}: {repeated} of {len(stored)} tokens name an expert twice")


def scale_problem(scale: np.ndarray) -> str | None:
    """What is wrong with block scales: float32, or E8M0 codes."""
    if scale.dtype == np.float32:
        bad = int((~(np.isfinite(scale) & (scale > 0))).sum())
        return f"{bad} of {scale.size} scales are NaN, infinite, zero or negative" if bad else None
    bad = int((scale.view(np.uint8) == E8M0_NAN).sum())
    return f"{bad} of {scale.size} scales are NaN (E8M0 byte 0xFF)" if bad else None


def powers_of_two(scale: np.ndarray) -> bool:
    """Whether every float32 scale is one."""
    mantissa, _ = np.frexp(scale)
    return bool((mantissa == 0.5).all())


def quantized_problem(stored: np.ndarray) -> str:
    """Why a quantised tensor does not give finite numbers."""
    if stored.dtype == ml_dtypes.float8_e4m3fn:
        codes = int(((stored.view(np.uint8) & 0x7F) == 0x7F).sum())
        if codes:
            return f"{codes} of {stored.size} values are NaN (FP8 byte 0x7F or 0xFF)"
    return "values times scales overflow"
