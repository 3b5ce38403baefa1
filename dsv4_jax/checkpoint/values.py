"""Reading a part of one tensor into its place in a box, looking at its values on the way.

Scales, hash tables and all float32 and float16 tensors are always scanned; bfloat16 weights when asked. Work
goes on in pieces of a few MB, so a tensor costs no memory beyond its mapped pages.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from dsv4_jax.boxes import Box, pieces, runs
from dsv4_jax.checkpoint.dequantize import dequantize_part
from dsv4_jax.checkpoint.held import BLOCK
from dsv4_jax.checkpoint.tensor_rules import Entry
from pallas_kernels.formats import e8m0

Read = Callable[[str], np.ndarray]
"""Name in the files -> stored array."""


@dataclasses.dataclass
class Findings:
    """What reading found so far. A tensor may be read in several parts: what they have adds up."""

    counts: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    zero: dict[str, bool] = dataclasses.field(default_factory=dict)
    inexact_scales: dict[str, None] = dataclasses.field(default_factory=dict)
    dequantized: dict[str, None] = dataclasses.field(default_factory=dict)
    rounded: dict[str, None] = dataclasses.field(default_factory=dict)

    def count(self, where: str, number: int, what: str) -> None:
        """Notes values that are not usable: '<where>: <number> <what>' in the end; 0 is nothing to note."""
        if number:
            self.counts[where, what] = self.counts.get((where, what), 0) + number

    def look_for_zeros(self, name: str, values: np.ndarray) -> None:
        """Notes whether all of a tensor is zero."""
        self.zero[name] = self.zero.get(name, True) and not values.any()

    @property
    def problems(self) -> list[str]:
        """Why the tensors cannot be used, one sentence for each tensor and reason."""
        counted = {where for where, what in self.counts if what != OVERFLOW}
        return [
            f"{where}: {what}" if what == OVERFLOW else f"{where}: {number} {what}"
            for (where, what), number in self.counts.items()
            if what != OVERFLOW or where not in counted
        ]

    def warnings(self) -> list[str]:
        """What is odd but harmless, one sentence for all the tensors that it concerns."""
        result = []
        for found, what in (
            ([name for name, all_zero in self.zero.items() if all_zero], "all zero"),
            (self.inexact_scales, "scales other than powers of two; dequantised all the same"),
            (self.rounded, "stored as F16, rounded to bfloat16; float32 would hold them exactly"),
            (self.dequantized, "stored in ways that share no array with others; dequantised"),
        ):
            if found:
                names = list(found)
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                result.append(f"{', '.join(names[:3])}{more}: {what}")
        return result


OVERFLOW = "values times scales overflow"


def where(entry: Entry) -> str:
    """A tensor's file and name, with which sentences about it begin."""
    return f"{entry.tensor.path.name}: {entry.tensor.name}"


def read_part(
    entry: Entry,
    read: Read,
    part: Box,
    target: np.ndarray,
    findings: Findings,
    *,
    num_experts: int,
    scan_weights: bool,
) -> None:
    """Fills `target` with a part of the tensor's values in the target's dtype, dequantised if need be.

    Args:
        entry: the tensor, matched with its header.
        read: gives its stored values.
        part: box of the parameter's axes `entry.spec.dims`; anything, through quantisation blocks too.
        target: writable, C-contiguous, of the box's shape.
        findings: receives problems (values that are not usable) and what is odd but harmless.
        num_experts: E, the bound of the hash tables' entries.
        scan_weights: look for NaN and infinity in bfloat16 tensors too.
    """
    name, spec = where(entry), entry.spec
    if entry.scale is not None:
        _dequantize(entry, read, part, target, findings)
        return
    stored = read(entry.tensor.name)
    if spec.kind == "table":
        _copy_table(stored, part, target, findings, name, num_experts)
        return
    scan = scan_weights or stored.dtype != ml_dtypes.bfloat16 or spec.kind != "matrix"
    bad = _copy_floats(stored.reshape(spec.dims)[part], target, scan)
    findings.count(name, bad, f"of {stored.size} values are NaN or infinite")
    if stored.dtype == np.float16 and target.dtype == ml_dtypes.bfloat16:
        findings.rounded[entry.tensor.name] = None
    if spec.parameter.role in ("selection_bias", "mixing_gate"):
        findings.look_for_zeros(entry.tensor.name, target)


def _copy_floats(source: np.ndarray, target: np.ndarray, scan: bool) -> int:
    """Converts in pieces; gives the number of non-finite results if `scan`."""
    bad = 0
    for piece in pieces(source.shape):
        with np.errstate(over="ignore", invalid="ignore"):
            target[piece] = source[piece]
        if scan:  # of the result: narrowing float32 may overflow what was finite
            bad += num_non_finite(target[piece])
    return bad


def num_non_finite(values: np.ndarray) -> int:
    """How many of float numbers are NaN or infinite."""
    if values.dtype == ml_dtypes.bfloat16:  # by bits: numpy's own test is slow for this dtype
        return int(np.count_nonzero((values.view(np.uint16) & 0x7F80) == 0x7F80))
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def _copy_table(
    stored: np.ndarray, part: Box, target: np.ndarray, findings: Findings, name: str, num_experts: int
) -> None:
    """int64 or int32 [V, Ke] to int32: every row must name Ke different experts."""
    rows = stored[part[0]]
    outside = int(((rows < 0) | (rows >= num_experts)).sum())
    ordered = np.sort(rows, axis=-1)
    repeated = int((ordered[:, 1:] == ordered[:, :-1]).any(axis=-1).sum())
    if part[1].start == 0:  # whole rows are looked at: once, if their columns are read apart
        findings.count(name, outside, f"of {stored.size} expert numbers are outside 0 .. {num_experts - 1}")
        if not outside:
            findings.count(name, repeated, f"of {len(stored)} tokens name an expert twice")
    if not outside:
        target[...] = rows[:, part[1]]


def checked_scale(entry: Entry, read: Read, part: Box, findings: Findings) -> np.ndarray | None:
    """A box of the block scales of a tensor as stored; None if not usable, which `findings` then says."""
    assert entry.scale is not None
    tensor, stored = entry.scale, read(entry.scale.name)
    scale = stored[part]
    bad, what = bad_scales(scale)
    if bad:
        findings.count(f"{tensor.path.name}: {tensor.name}", bad, f"of {stored.size} {what}")
        return None
    if scale.dtype == np.float32 and not powers_of_two(scale):
        findings.inexact_scales[tensor.name] = None
    findings.look_for_zeros(tensor.name, scale if scale.dtype == np.float32 else scale.view(np.uint8))
    return scale


def bad_scales(scale: np.ndarray) -> tuple[int, str]:
    """How many block scales are not usable, float32 or E8M0 codes, and what those are."""
    if scale.dtype == np.float32:
        bad = ~(np.isfinite(scale) & (scale > 0))
        return int(np.count_nonzero(bad)), "scales are NaN, infinite, zero or negative"
    return int(np.count_nonzero(scale.view(np.uint8) == e8m0.NAN)), "scales are NaN (E8M0 byte 0xFF)"


def powers_of_two(scale: np.ndarray) -> bool:
    """Whether every float32 scale is one."""
    mantissa, _ = np.frexp(scale)
    return bool((mantissa == 0.5).all())


def _dequantize(entry: Entry, read: Read, part: Box, target: np.ndarray, findings: Findings) -> None:
    """Fills `target` from the blocks that a part touches."""
    ends = list(itertools.accumulate(entry.spec.folds, initial=0))
    axes = list(itertools.pairwise(ends))
    dims = entry.spec.dims
    ranges = [runs(dims[a:b], part[a:b]) for a, b in axes]  # of each axis of the stored matrices
    blocks = [1] * (len(axes) - 2) + list(BLOCK[entry.format])
    bounds = [slice(r[0].start, r[-1].stop) for r in ranges]
    scales = tuple(slice(r.start // n, -(-r.stop // n)) for r, n in zip(bounds, blocks, strict=True))
    scale = checked_scale(entry, read, scales, findings)
    if scale is None:
        return
    stored = read(entry.tensor.name)
    first = (scales[-2].start, scales[-1].start)
    filled = target.reshape([len(r) * (r[0].stop - r[0].start) for r in ranges])
    for matrix in itertools.product(*(_indices(r) for r in ranges[:-2])):
        goal = filled[tuple(position for position, _ in matrix)]
        weight = stored[tuple(index for _, index in matrix)]
        scale_of = scale[tuple(index - s.start for (_, index), s in zip(matrix, scales, strict=False))]
        for (top, rows), (left, columns) in itertools.product(*map(_placed, ranges[-2:])):
            cut = goal[top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]
            if not dequantize_part(cut, weight, scale_of, rows, columns, first):
                codes = num_nan(weight[rows, columns]) if entry.format == "fp8" else 0
                count_unusable(findings, entry, codes, stored.size)


def count_unusable(findings: Findings, entry: Entry, nan_codes: int, size: int) -> None:
    """Notes a quantised tensor with products that are not finite, because of NaN codes or of overflow."""
    if nan_codes:
        findings.count(where(entry), nan_codes, f"of {size} {NAN_CODES}")
    else:
        findings.count(where(entry), 1, OVERFLOW)


NAN_CODES = "values are NaN (FP8 byte 0x7F or 0xFF)"


def num_nan(stored: np.ndarray) -> int:
    """How many FP8 numbers are NaN."""
    codes = stored.view(np.uint8)
    return sum(int(np.count_nonzero((codes[piece] & 0x7F) == 0x7F)) for piece in pieces(codes.shape))


def _indices(ranges: list[slice]) -> Iterator[tuple[int, int]]:
    """(position in the box, index in the axis) of every element."""
    return enumerate(index for r in ranges for index in range(r.start, r.stop))


def _placed(ranges: list[slice]) -> Iterator[tuple[int, slice]]:
    """(first position in the box, range in the axis)."""
    position = 0
    for r in ranges:
        yield position, r
        position += r.stop - r.start
