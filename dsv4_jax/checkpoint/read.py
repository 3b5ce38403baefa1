"""The parameters of an opened checkpoint by boxes: a buffer each, filled from the tensors that it touches.

With native weights a parameter keeps the bytes that are stored, next to one another: one array joins the
elements of its tensors and one their scales. That takes tensors of one format, scales that are powers of two,
and blocks that do not straddle the tensors of the official layout; a parameter that breaks one of these is
dequantised, with a warning. Mapped pages are given back after each tensor.
"""

import functools
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from dsv4_jax.boxes import Box, concrete, places, shape_of, size_of
from dsv4_jax.checkpoint.files import CheckpointFiles
from dsv4_jax.checkpoint.held import Blocks, Held, part_boxes
from dsv4_jax.checkpoint.manifest import Manifest
from dsv4_jax.checkpoint.names import Path
from dsv4_jax.checkpoint.storage import Format
from dsv4_jax.checkpoint.tensor_rules import Entry
from dsv4_jax.checkpoint.values import (
    Findings,
    Read,
    checked_scale,
    count_unusable,
    num_nan,
    powers_of_two,
    read_part,
)
from dsv4_jax.checkpoint.write import Progress
from dsv4_jax.parameters import Parameter
from pallas_kernels.formats.blocks import Fp8Blocks, Mxfp4
from pallas_kernels.formats.on_host import fp4_rows, fp8_rows
from pallas_kernels.formats.sizes import FP8_BLOCK

ALIGNMENT = 64
"""Bytes; JAX on a CPU takes over host buffers so aligned instead of copying them."""

LARGEST_SAFE_SCALE = 127 + 118
"""E8M0 byte up to which no product can overflow: 448 < 2^9."""

SMALLEST_SCALE = np.float32(2.0**-127)


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
    groups: dict[Path, list[Entry]] = {}
    for entry in manifest.entries:
        groups.setdefault(entry.spec.path, []).append(entry)
    finish = _Finishing(files, manifest, progress)
    scan = functools.partial(
        read_part, num_experts=manifest.config.n_routed_experts, scan_weights=scan_weights
    )
    held = {}
    for path, entries in groups.items():
        parameter = entries[0].spec.parameter
        if keep_quantized and any(entry.format != "plain" for entry in entries):
            if can_stay(parameter, entries, files.read):
                how: Format = "fp8" if entries[0].format == "fp8" else "fp4"
                shape = (*parameter.leading, *parameter.stored)
                read = functools.partial(_native_box, how, shape, entries, files.read, findings, finish)
                held[path] = Held(shape, how, None, read)
                continue
            findings.dequantized["/".join(map(str, path))] = None
        dtype, shape = parameter.dtype(param_dtype), parameter.shape
        read = functools.partial(_plain_box, dtype, shape, entries, files.read, findings, scan, finish)
        held[path] = Held(shape, "bf16", dtype, read)
    return held


class _Finishing:
    """Gives a tensor's pages back and reports progress, after each part of it that was read; what is read
    once more is no progress."""

    def __init__(self, files: CheckpointFiles, manifest: Manifest, progress: Progress | None) -> None:
        self._files, self._progress = files, progress
        self._total = sum(_num_bytes(entry) for entry in manifest.entries)
        self._done = 0
        self._read: dict[str, int] = {}

    def __call__(self, entry: Entry, num_elements: int) -> None:
        for tensor in (entry.tensor, entry.scale):
            if tensor is not None:
                self._files.drop_pages(tensor.name)
        name, size = entry.tensor.name, int(np.prod(entry.spec.shape, dtype=np.int64))
        before = self._read.get(name, 0)
        self._read[name] = after = min(before + num_elements, size)
        self._done += _num_bytes(entry) * after // size - _num_bytes(entry) * before // size
        if self._progress is not None and after > before:
            self._progress(name, self._done, self._total)


def _num_bytes(entry: Entry) -> int:
    return entry.tensor.num_bytes + (entry.scale.num_bytes if entry.scale is not None else 0)


Finish = Callable[[Entry, int], None]


def _plain_box(
    dtype: np.dtype,
    shape: tuple[int, ...],
    entries: Sequence[Entry],
    read: Read,
    findings: Findings,
    scan: Callable[..., None],
    finish: Finish,
    index: Box,
) -> np.ndarray:
    box = concrete(index, shape)
    buffer = aligned(shape_of(box), dtype)
    for entry, place, part in _touched(entries, box):
        scan(entry, read, part, buffer[place], findings)
        finish(entry, size_of(part))
    return buffer


def _native_box(
    how: Format,
    shape: tuple[int, ...],
    entries: Sequence[Entry],
    read: Read,
    findings: Findings,
    finish: Finish,
    index: Box,
) -> Blocks:
    box = concrete(index, shape)
    numbers, scales = part_boxes(how, box, shape)
    elements = aligned(shape_of(numbers), np.dtype(np.uint8))
    scale = aligned(shape_of(scales), np.dtype(np.uint8))
    for entry, place, part in _touched(entries, box):
        depth = len(entry.spec.index)
        stored = read(entry.tensor.name)
        stored = stored.reshape(*shape[depth:-1], stored.shape[-1])[numbers[depth:]]
        stored_scale = checked_scale(entry, _in_matrices(read, shape[depth:-2]), scales[depth:], findings)
        codes = None if stored_scale is None else _codes(stored_scale)
        if codes is not None:  # None: NaN, said already
            elements[place] = stored.view(np.uint8)
            scale[place] = codes
            if not _finite(stored, codes):
                nan_codes = num_nan(stored) if how == "fp8" else 0
                count_unusable(findings, entry, nan_codes, read(entry.tensor.name).size)
        finish(entry, size_of(part))
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


def _touched(entries: Sequence[Entry], box: Box):
    """(tensor, its place in the box's buffer, its part of the box) for each tensor that a box touches."""
    depth = len(entries[0].spec.index)
    by_index = {entry.spec.index: entry for entry in entries} if depth else {(): entries[0]}
    for index in places(box[:depth]):
        yield by_index[index], tuple(i - part.start for i, part in zip(index, box, strict=False)), box[depth:]


def can_stay(parameter: Parameter, entries: Sequence[Entry], read: Read) -> bool:
    """Whether a parameter's tensors are stored alike, in blocks of the official tensors' own, with scales
    that E8M0 holds. E8M0 scales need not be read for that."""
    formats = {entry.format for entry in entries}
    rows = parameter.stored[-2]
    own_blocks = rows % FP8_BLOCK == 0 or all(entry.spec.shape[-2] == rows for entry in entries)
    if not (formats == {"fp4"} or (formats == {"fp8"} and own_blocks)):
        return False
    scales = [entry.scale for entry in entries if entry.scale is not None]
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


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array that starts at a multiple of `ALIGNMENT` bytes."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
