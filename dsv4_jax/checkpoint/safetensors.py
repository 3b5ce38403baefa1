"""The safetensors format, read strictly: header rules, offsets, number formats.

    [8 bytes: n, little-endian] [n bytes: JSON header] [data]
    header: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ..}

Offsets count from the first data byte and must tile the data exactly. The public library's numpy
front end has no BF16 or FP8, and accepts repeated keys and empty tensors; nothing ambiguous passes.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv4_jax.errors import CheckpointError
from dsv4_jax.reading.stored_file import StoredFile, refusal
from dsv4_jax.reading.strict_json import JsonError, parse_json, repeated_keys, shown

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F16": "<f2",
        "F32": "<f4",
        "F64": "<f8",
        "I8": "i1",
        "I16": "<i2",
        "I32": "<i4",
        "I64": "<i8",
        "U8": "u1",
        "U16": "<u2",
        "U32": "<u4",
        "U64": "<u8",
    }.items()
}
"""Every readable and writable safetensors dtype and its numpy form. FP4 is packed in I8 or U8."""

_KNOWN_UNSUPPORTED = frozenset("BOOL C64 F4 F6_E2M3 F6_E3M2 F8_E4M3FNUZ F8_E5M2FNUZ".split())

MAX_HEADER_BYTES = 100_000_000  # the limit of the public library
MAX_TENSORS = 1_000_000  # V4-Pro has 149,782 in all its shards
MAX_RANK = 8
MAX_NAME_LENGTH = 512
_MAX_INTEGER = 2**63 - 1

_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

_FOREIGN_STARTS = {
    b"version https://git-lfs.github.com": (
        "is a git-LFS pointer, not the data; download the real files (git lfs pull)"
    ),
    b"PK\x03\x04": "is a zip archive (a PyTorch pickle?), not safetensors",
    b"\x80\x02": "is a Python pickle, not safetensors; it is never opened",
    b"GGUF": "is a GGUF file, not safetensors",
    b"<": "is an HTML or XML page, not safetensors; download the real file",
    b"{": "starts with JSON instead of a header length; download the real file",
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, end) of the file `path`."""

    name: str
    dtype: str  # safetensors name, a key of DTYPES
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Header:
    """The validated header of one file: tensors by name in the order of their bytes."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def is_tensor_name(name: str) -> bool:
    """Whether `name` is words of letters, digits, `_` and `-` joined by dots (no space, `../`)."""
    return len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def num_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of a dtype in DTYPES."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Validated tensors of one safetensors file, in the order of their bytes; no data is read.

    Raises:
        CheckpointError: with every broken rule, each naming the file and the tensor.
    """
    return load_header(path).tensors


def load_header(path: str | Path) -> Header:
    """As `read_header`, with the metadata."""
    with StoredFile(Path(path)) as file:
        return header_of(file)


def header_of(file: StoredFile) -> Header:
    """As `load_header`, of a file that is open."""
    path, size = file.path, file.identity.size
    document, data_start = _read_document(file)
    file.check_unchanged()
    try:
        parsed = parse_json(document, max_depth=3, max_items=MAX_TENSORS * (MAX_RANK + 4))
    except JsonError as error:
        raise refusal(path, f"the header {error}") from None
    if not isinstance(parsed, dict):
        raise refusal(path, f"the header is {shown(parsed)}, expected an object")

    problems = [f"{path.name}: tensor {shown(key)} occurs twice" for key in repeated_keys(parsed)]
    metadata = parsed.pop("__metadata__", {})
    problems += _metadata_problems(path, metadata)
    if not 0 < len(parsed) <= MAX_TENSORS:
        problems.append(f"{path.name}: has {len(parsed)} tensors, expected 1 to {MAX_TENSORS}")
        raise CheckpointError(f"{path} cannot be used", problems)

    tensors = []
    for name, entry in parsed.items():
        found = _entry_problems(name, entry)
        problems += [f"{path.name}: tensor {shown(name)}: {problem}" for problem in found]
        if not found:
            begin, end = (data_start + offset for offset in entry["data_offsets"])
            tensors.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, begin, end))
    if len(tensors) == len(parsed):  # with an unreadable entry, its bytes would look like a hole
        tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
        problems += _layout_problems(path, tensors, data_start, size)
    if problems:
        raise CheckpointError(f"{path} cannot be used", problems)
    return Header(path, {t.name: t for t in tensors}, dict(metadata), data_start)


def _read_document(file: StoredFile) -> tuple[bytes, int]:
    """The header's JSON and the byte where the data starts."""
    size = file.identity.size
    start = file.read(0, min(size, 64))
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > MAX_HEADER_BYTES:
        for signature, problem in _FOREIGN_STARTS.items():
            if start.startswith(signature):
                raise refusal(file.path, problem)
    if size < 8:
        found = f"has only {size} bytes" if size else "is empty"
        raise refusal(file.path, f"{found}, expected at least 8; download it again")
    if length > MAX_HEADER_BYTES:
        raise refusal(
            file.path, f"claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted"
        )
    if 8 + length > size:
        raise refusal(
            file.path,
            f"is truncated: expected at least {8 + length} bytes for the header, found {size}; "
            "download it again",
        )
    document = file.read(8, length)
    if not document.startswith(b"{"):
        raise refusal(file.path, f"the header starts with {shown(document[:8])}, expected '{{'")
    return document, 8 + length


def _metadata_problems(path: Path, metadata: object) -> list[str]:
    if not isinstance(metadata, dict):
        return [f"{path.name}: __metadata__ is {shown(metadata)}, expected an object of strings"]
    problems = [f"{path.name}: __metadata__ key {shown(key)} occurs twice" for key in repeated_keys(metadata)]
    problems += [
        f"{path.name}: __metadata__ {shown(key)} is {shown(value)}, expected a string"
        for key, value in metadata.items()
        if not isinstance(value, str)
    ]
    return problems


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INTEGER  # type: a bool is an int


def _entry_problems(name: str, entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is {shown(entry)}, expected an object"]
    problems = []
    if not is_tensor_name(name):
        problems.append("the name is not words of letters, digits, '_' and '-' joined by dots")
    problems += [f"key {shown(key)} occurs twice" for key in repeated_keys(entry)]
    if entry.keys() != _FIELDS:
        if missing := sorted(_FIELDS - entry.keys()):
            problems.append(f"lacks {', '.join(missing)}")
        if extra := sorted(entry.keys() - _FIELDS):
            problems.append(f"has unknown keys {shown(extra)}")

    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype_fine = isinstance(dtype, str) and dtype in DTYPES
    if "dtype" in entry and not dtype_fine:
        known = isinstance(dtype, str) and dtype in _KNOWN_UNSUPPORTED
        problems.append(f"dtype {shown(dtype)} is {'not supported' if known else 'unknown'}")
    shape_fine = isinstance(shape, list) and len(shape) <= MAX_RANK and all(map(_is_size, shape))
    if "shape" in entry and not shape_fine:
        problems.append(f"shape {shown(shape)} is not a list of at most {MAX_RANK} integers in [0, 2^63)")
    elif shape_fine and 0 in shape:
        problems.append(f"shape {shape} is empty; no tensor of a checkpoint is")
        shape_fine = False
    offsets_fine = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))
    if "data_offsets" in entry and not offsets_fine:
        problems.append(f"data_offsets {shown(offsets)} is not two integers in [0, 2^63)")
    elif offsets_fine and offsets[0] > offsets[1]:
        problems.append(f"data_offsets {offsets} begin after their end")
        offsets_fine = False
    if dtype_fine and shape_fine and offsets_fine:
        expected, found = num_bytes(dtype, shape), offsets[1] - offsets[0]
        if expected > _MAX_INTEGER:
            problems.append(f"shape {shape} of {dtype} overflows: more than 2^63 bytes")
        elif expected != found:
            problems.append(
                f"shape {shape} of {dtype} takes {expected} bytes, data_offsets {offsets} hold {found}"
            )
    return problems


def _layout_problems(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> list[str]:
    """Holes, overlaps and a wrong file size, given tensors sorted by position."""
    problems, previous, cursor = [], None, data_start
    for tensor in tensors:
        problem = None
        if tensor.start > cursor:
            problem = f"{tensor.start - cursor} bytes before it belong to no tensor"
        elif previous is not None and (tensor.start, tensor.end) == (previous.start, previous.end):
            problem = f"has the same bytes as {shown(previous.name)}"
        elif tensor.start < cursor:
            problem = f"overlaps {shown(previous.name)} by {cursor - tensor.start} bytes"
        if problem is not None:
            problems.append(f"{path.name}: tensor {shown(tensor.name)}: {problem}")
        if tensor.end > cursor:
            previous, cursor = tensor, tensor.end
    if cursor > size:
        problems.append(
            f"{path.name}: is truncated: expected {cursor} bytes, found {size} "
            f"(the last tensor is {shown(previous.name)}); download it again"
        )
    elif cursor < size:
        problems.append(
            f"{path.name}: has {size - cursor} trailing bytes: expected {cursor} bytes, "
            f"found {size}; download it again"
        )
    return problems
