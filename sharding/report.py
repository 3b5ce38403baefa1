"""What each device holds: one row an array, from shapes and specs alone. No device is needed."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Held:
    """One array on a mesh.

    Attributes:
        path: of the array.
        shape: of the whole.
        dtype: of its numbers; 4-bit numbers lie two in a uint8.
        spec: mesh axes of each of its dims; dims behind the last entry are whole.
        copies: devices that hold the same part.
        bytes_a_device: of the part that a device holds.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: PartitionSpec
    copies: int
    bytes_a_device: int


def held(
    path: str,
    shape: Sequence[int],
    dtype: np.typing.DTypeLike,
    spec: PartitionSpec,
    axis_sizes: Mapping[str, int],
) -> Held:
    """The row of one array.

    Args:
        path: of the array.
        shape: of the whole.
        dtype: of its numbers.
        spec: mesh axes of its dims.
        axis_sizes: of the mesh.

    Raises:
        ValueError: if its parts would not be even.
    """
    parts = [math.prod(axis_sizes[axis] for axis in axes_of(entry)) for entry in spec]
    if uneven := [
        f"dim {dim} of {path} {tuple(shape)} cannot be split {count} ways"
        for dim, count in enumerate(parts)
        if shape[dim] % count
    ]:
        raise ValueError("; ".join(uneven))
    dtype, count = np.dtype(dtype), math.prod(parts)
    num_bytes = math.prod(shape) * dtype.itemsize
    copies = math.prod(axis_sizes.values()) // count
    return Held(path, tuple(shape), dtype, spec, copies, num_bytes // count)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def total(rows: Iterable[Held]) -> int:
    """Bytes of all rows on one device."""
    return sum(row.bytes_a_device for row in rows)


def lines(rows: Iterable[Held]) -> list[str]:
    """One line a row, for golden files and logs: path, dtype and shape, spec, copies, bytes a device."""
    return [
        f"{row.path} {row.dtype}{list(row.shape)} {spelled(row.spec)} x{row.copies} {row.bytes_a_device}"
        for row in rows
    ]


def spelled(spec: PartitionSpec) -> str:
    """A spec in one word, such as P(-,expert,fsdp+tensor)."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return "P(" + ",".join("+".join(axes_of(entry)) or "-" for entry in entries) + ")"
