"""The parameters of an opened checkpoint by boxes: a buffer each, filled from the tensors that it touches.

With native weights a parameter keeps the bytes that are stored, next to one another: one array joins the
elements of its tensors and one their scales. That takes tensors of one format, scales that are powers of two,
and blocks that do not straddle the tensors of the official layout; a parameter that breaks one of these is
dequantised, with a warning.

Values are looked at on the way: scales, hash tables and all float32 and float16 tensors always, bfloat16
weights when asked. Work goes on in pieces of a few MB, and mapped pages are given back after each tensor.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np

from dsv4_jax.boxes import Box, concrete, pieces, places, runs, shape_of, size_of
from dsv4_jax.checkpoint.dequantize import dequantize_part
from dsv4_jax.checkpoint.expected import StoredTensor
from dsv4_jax.checkpoint.files import CheckpointFiles, Progress
from dsv4_jax.checkpoint.held import BLOCK, Held, part_boxes
from dsv4_jax.checkpoint.manifest import Manifest
from dsv4_jax.checkpoint.names import Path
from dsv4_jax.checkpoint.storage import Format
from dsv4_jax.parameters import Parameter
from pallas_kernels.formats import e8m0
from pallas_kernels.formats.blocks import Blocks, Fp8Blocks, Mxfp4
from pallas_kernels.formats.on_host import fp4_rows, fp8_rows
from pallas_kernels.formats.sizes import FP8_BLOCK
from sharding.placement import aligned

Read = Callable[[str], np.ndarray]
"""Name in the files -> stored array."""

Finish = Callable[[StoredTensor, int], None]
"""Called with a tensor and the number of its elements that were read now."""

LARGEST_SAFE_SCALE = 127 + 118
"""E8M0 byte up to which no product can overflow: 448 < 2^9."""

SMALLEST_SCALE = np.float32(2.0**-127)


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


def where(tensor: StoredTensor) -> str:
    """A tensor's file and name, with which sentences about it begin."""
    return f"{tensor.info.path.name}: {tensor.info.name}"


def read_part(
    tensor: StoredTensor,
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
        tensor: the tensor, matched with its header.
        read: gives its stored values.
        part: box of the parameter's axes `tensor.spec.dims`; anything, through quantisation blocks too.
        target: writable, C-contiguous, of the box's shape.
        findings: receives problems (values that are not usable) and what is odd but harmless.
        num_experts: E, the bound of the hash tables' tensors.
        scan_weights: look for NaN and infinity in bfloat16 tensors too.
    """
    name, spec = where(tensor), tensor.spec
    if tensor.scale is not None:
        _dequantize(tensor, read, part, target, findings)
        return
    stored = read(tensor.info.name)
    if spec.kind == "table":
        _copy_table(stored, part, target, findings, name, num_experts)
        return
    scan = scan_weights or stored.dtype != ml_dtypes.bfloat16 or spec.kind != "matrix"
    bad = _copy_floats(stored.reshape(spec.dims)[part], target, scan)
    findings.count(name, bad, f"of {stored.size} values are NaN or infinite")
    if stored.dtype == np.float16 and target.dtype == ml_dtypes.bfloat16:
        findings.rounded[tensor.info.name] = None
    if spec.parameter.role in ("selection_bias", "mixing_gate"):
        findings.look_for_zeros(tensor.info.name, target)


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


def checked_scale(tensor: StoredTensor, read: Read, part: Box, findings: Findings) -> np.ndarray | None:
    """A box of the block scales of a tensor as stored; None if not usable, which `findings` then says."""
    assert tensor.scale is not None
    info, stored = tensor.scale, read(tensor.scale.name)
    scale = stored[part]
    bad, what = bad_scales(scale)
    if bad:
        findings.count(f"{info.path.name}: {info.name}", bad, f"of {stored.size} {what}")
        return None
    if scale.dtype == np.float32 and not powers_of_two(scale):
        findings.inexact_scales[info.name] = None
    findings.look_for_zeros(info.name, scale if scale.dtype == np.float32 else scale.view(np.uint8))
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


def _dequantize(tensor: StoredTensor, read: Read, part: Box, target: np.ndarray, findings: Findings) -> None:
    """Fills `target` from the blocks that a part touches."""
    ends = list(itertools.accumulate(tensor.spec.folds, initial=0))
    axes = list(itertools.pairwise(ends))
    dims = tensor.spec.dims
    ranges = [runs(dims[a:b], part[a:b]) for a, b in axes]  # of each axis of the stored matrices
    blocks = [1] * (len(axes) - 2) + list(BLOCK[tensor.format])
    bounds = [slice(r[0].start, r[-1].stop) for r in ranges]
    scales = tuple(slice(r.start // n, -(-r.stop // n)) for r, n in zip(bounds, blocks, strict=True))
    scale = checked_scale(tensor, read, scales, findings)
    if scale is None:
        return
    stored = read(tensor.info.name)
    first = (scales[-2].start, scales[-1].start)
    filled = target.reshape([len(r) * (r[0].stop - r[0].start) for r in ranges])
    for matrix in itertools.product(*(_indices(r) for r in ranges[:-2])):
        goal = filled[tuple(position for position, _ in matrix)]
        weight = stored[tuple(index for _, index in matrix)]
        scale_of = scale[tuple(index - s.start for (_, index), s in zip(matrix, scales, strict=False))]
        for (top, rows), (left, columns) in itertools.product(*map(_placed, ranges[-2:])):
            cut = goal[top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]
            if not dequantize_part(cut, weight, scale_of, rows, columns, first):
                codes = num_nan(weight[rows, columns]) if tensor.format == "fp8" else 0
                count_unusable(findings, tensor, codes, stored.size)


def count_unusable(findings: Findings, tensor: StoredTensor, nan_codes: int, size: int) -> None:
    """Notes a quantised tensor with products that are not finite, because of NaN codes or of overflow."""
    if nan_codes:
        findings.count(where(tensor), nan_codes, f"of {size} {NAN_CODES}")
    else:
        findings.count(where(tensor), 1, OVERFLOW)


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


def stored_parameters(
    files: CheckpointFiles,
    manifest: Manifest,
    param_dtype: np.dtype,
    findings: Findings,
    *,
    keep_quantized: bool,
    scan_weights: bool,
    progress: Progress | None = None,
) -> dict[Path, Held]:
    """Every parameter of a checkpoint, of which boxes can be read while the files are open.

    Args:
        files: the open files.
        manifest: what they hold.
        param_dtype: of matrices that are held as plain numbers.
        findings: receives what reading finds; nothing but float32 scales is read before a box is.
        keep_quantized: hold FP8 and FP4 weights as they are stored, where that can be.
        scan_weights: look for NaN and infinity in bfloat16 weights too.
        progress: called after each tensor, or part of one, with (its name, bytes read, bytes of all tensors).
    """
    groups: dict[Path, list[StoredTensor]] = {}
    for tensor in manifest.tensors:
        groups.setdefault(tensor.spec.path, []).append(tensor)
    finish = _Finishing(files, manifest, progress)
    scan = functools.partial(
        read_part, num_experts=manifest.config.n_routed_experts, scan_weights=scan_weights
    )
    held = {}
    for path, tensors in groups.items():
        parameter = tensors[0].spec.parameter
        if keep_quantized and any(tensor.format != "plain" for tensor in tensors):
            if can_stay(parameter, tensors, files.read):
                how: Format = "fp8" if tensors[0].format == "fp8" else "fp4"
                shape = (*parameter.leading, *parameter.stored)
                read = functools.partial(_native_box, how, shape, tensors, files.read, findings, finish)
                held[path] = Held(shape, how, None, read)
                continue
            findings.dequantized["/".join(map(str, path))] = None
        dtype, shape = parameter.dtype(param_dtype), parameter.shape
        read = functools.partial(_plain_box, dtype, shape, tensors, files.read, findings, scan, finish)
        held[path] = Held(shape, "plain", dtype, read)
    return held


class _Finishing:
    """Gives a tensor's pages back and reports progress, after each part of it that was read; what is read
    once more is no progress."""

    def __init__(self, files: CheckpointFiles, manifest: Manifest, progress: Progress | None) -> None:
        self._files, self._progress = files, progress
        self._total = sum(_num_bytes(tensor) for tensor in manifest.tensors)
        self._done = 0
        self._read: dict[str, int] = {}

    def __call__(self, tensor: StoredTensor, num_elements: int) -> None:
        for info in (tensor.info, tensor.scale):
            if info is not None:
                self._files.drop_pages(info.name)
        name, size = tensor.info.name, int(np.prod(tensor.spec.shape, dtype=np.int64))
        before = self._read.get(name, 0)
        self._read[name] = after = min(before + num_elements, size)
        self._done += _num_bytes(tensor) * after // size - _num_bytes(tensor) * before // size
        if self._progress is not None and after > before:
            self._progress(name, self._done, self._total)


def _num_bytes(tensor: StoredTensor) -> int:
    return tensor.info.num_bytes + (tensor.scale.num_bytes if tensor.scale is not None else 0)


def _plain_box(
    dtype: np.dtype,
    shape: tuple[int, ...],
    tensors: Sequence[StoredTensor],
    read: Read,
    findings: Findings,
    scan: Callable[..., None],
    finish: Finish,
    index: Box,
) -> np.ndarray:
    box = concrete(index, shape)
    buffer = aligned(shape_of(box), dtype)
    for tensor, place, part in _touched(tensors, box):
        scan(tensor, read, part, buffer[place], findings)
        finish(tensor, size_of(part))
    return buffer


def _native_box(
    how: Format,
    shape: tuple[int, ...],
    tensors: Sequence[StoredTensor],
    read: Read,
    findings: Findings,
    finish: Finish,
    index: Box,
) -> Blocks:
    box = concrete(index, shape)
    numbers, scales = part_boxes(how, box, shape)
    elements = aligned(shape_of(numbers), np.dtype(np.uint8))
    scale = aligned(shape_of(scales), np.dtype(np.uint8))
    for tensor, place, part in _touched(tensors, box):
        depth = len(tensor.spec.index)
        stored = read(tensor.info.name)
        stored = stored.reshape(*shape[depth:-1], stored.shape[-1])[numbers[depth:]]
        stored_scale = checked_scale(tensor, _in_matrices(read, shape[depth:-2]), scales[depth:], findings)
        codes = None if stored_scale is None else _codes(stored_scale)
        if codes is not None:  # None: NaN, said already
            elements[place] = stored.view(np.uint8)
            scale[place] = codes
            if not _finite(stored, codes):
                nan_codes = num_nan(stored) if how == "fp8" else 0
                count_unusable(findings, tensor, nan_codes, read(tensor.info.name).size)
        finish(tensor, size_of(part))
    if how == "fp8":
        return Fp8Blocks(elements.view(ml_dtypes.float8_e4m3fn), scale)
    return Mxfp4(elements, scale)


def _in_matrices(read: Read, leading: tuple[int, ...]) -> Read:
    """Scales of a tensor that joins several matrices, one grid for each of them."""

    def grids(name: str) -> np.ndarray:
        stored = read(name)
        count = int(np.prod(leading, dtype=np.int64))
        return stored.reshape(*leading, stored.size // count // stored.shape[-1], stored.shape[-1])

    return grids


def _touched(tensors: Sequence[StoredTensor], box: Box):
    """(tensor, its place in the box's buffer, its part of the box) for each tensor that a box touches."""
    depth = len(tensors[0].spec.index)
    by_index = {tensor.spec.index: tensor for tensor in tensors} if depth else {(): tensors[0]}
    for index in places(box[:depth]):
        yield by_index[index], tuple(i - part.start for i, part in zip(index, box, strict=False)), box[depth:]


def can_stay(parameter: Parameter, tensors: Sequence[StoredTensor], read: Read) -> bool:
    """Whether a parameter's tensors are stored alike, in blocks of the official tensors' own, with scales
    that E8M0 holds. E8M0 scales need not be read for that."""
    formats = {tensor.format for tensor in tensors}
    rows = parameter.stored[-2]
    own_blocks = rows % FP8_BLOCK == 0 or all(tensor.spec.shape[-2] == rows for tensor in tensors)
    if not (formats == {"fp4"} or (formats == {"fp8"} and own_blocks)):
        return False
    scales = [tensor.scale for tensor in tensors if tensor.scale is not None]
    return all(scale.dtype != "F32" or _codes(read(scale.name)) is not None for scale in scales)


def _codes(scale: np.ndarray) -> np.ndarray | None:
    """E8M0 bytes of scales; None for float32 ones that are no powers of two in its range."""
    if scale.dtype != np.float32:
        return scale.view(np.uint8)
    if not ((scale >= SMALLEST_SCALE).all() and powers_of_two(scale)):
        return None
    return (np.frexp(scale)[1] + 126).astype(np.uint8)  # frexp: 0.5 * 2^exponent


def _finite(stored: np.ndarray, codes: np.ndarray) -> bool:
    """Whether every element times its scale is a finite float32; `stored` begins where a block does."""
    fp8 = stored.dtype == ml_dtypes.float8_e4m3fn
    if codes.max() <= LARGEST_SAFE_SCALE:
        return not (fp8 and num_nan(stored))
    rows = fp8_rows if fp8 else fp4_rows
    scale = codes.view(ml_dtypes.float8_e8m0fnu)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            bool(np.isfinite(piece).all())
            for place in np.ndindex(stored.shape[:-2])
            for _, piece in rows(stored[place], scale[place])
        )
