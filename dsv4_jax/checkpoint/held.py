"""One parameter by boxes, wherever it lies: on devices, in host memory, or (see `read`) in files.

Saving and converting see nothing else of a parameter, so a whole stack of layers or experts is never in one
host array: of a stack on devices, each tensor is fetched from the shards that it overlaps. A tensor is given
as it is held, dequantised, or rounded to FP8 or FP4.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dsv4_jax.boxes import Box, at, inside, overlap, shape_of, size_of
from dsv4_jax.checkpoint.dequantize import dequantize_into
from dsv4_jax.checkpoint.names import TensorSpec
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.storage import Format
from dsv4_jax.errors import CheckpointError, ProblemsError
from pallas_kernels.formats.blocks import (
    Blocks,
    Fp8Blocks,
    Mxfp4,
    fp4_as_fp8,
    quantize_fp8_blocks,
    quantize_mxfp4,
)
from pallas_kernels.formats.weights import QuantizedWeight

Leaf = jax.Array | np.ndarray | QuantizedWeight

BLOCK: Mapping[Format, tuple[int, int]] = {"fp8": Fp8Blocks.block, "fp4": Mxfp4.block}
"""Rows and columns that share a scale."""


@dataclasses.dataclass(frozen=True)
class Held:
    """One parameter, of which boxes can be read.

    Attributes:
        shape: of the axes that a box cuts: those of the parameter, and of a quantised one [*leading, O, I].
        format: 'plain' numbers have any dtype.
        dtype: of plain numbers; None for quantised ones.
        read_box: a box -> an array of that shape, or the quantised array with its elements and scales. What
            it gives may be a view of the parameter: not to be written to.
    """

    shape: tuple[int, ...]
    format: Format
    dtype: np.dtype | None
    read_box: Callable[[Box], np.ndarray | Blocks]

    def tensor(self, spec: TensorSpec) -> np.ndarray | Blocks:
        """The part of the parameter that one tensor of a checkpoint holds.

        Returns:
            A plain tensor in its shape on disk; a quantised one as [.., O, I], with the leading axes that it
            joins in front.
        """
        box = self.read_box(at(spec.index, self.shape))
        if isinstance(box, np.ndarray):
            return box.reshape(spec.shape)
        return jax.tree.map(lambda array: array[(0,) * len(spec.index)], box)


def in_memory(leaf: Leaf) -> Held:
    """A parameter on devices, possibly split over them, or in host memory."""
    if not isinstance(leaf, QuantizedWeight):
        return Held(tuple(leaf.shape), "plain", np.dtype(leaf.dtype), functools.partial(part, leaf))
    how: Format = "fp8" if leaf.blocks.format == "fp8" else "fp4"
    shape = tuple(leaf.blocks.shape)

    def read_box(box: Box) -> Blocks:
        numbers, scales = part_boxes(how, box, shape)
        return type(leaf.blocks)(part(leaf.blocks.data, numbers), part(leaf.blocks.scale, scales))

    return Held(shape, how, None, read_box)


def part_boxes(how: Format, box: Box, shape: tuple[int, ...]) -> tuple[Box, Box]:
    """A box of a quantised weight as a box of its elements as they are stored, and a box of its scales.

    Args:
        how: 'fp8' or 'fp4'.
        box: of [.., O, I].
        shape: [.., O, I] of the whole weight.

    Raises:
        ProblemsError: if the box cuts through a block; the last blocks of an axis may be partial.
    """
    problems = [
        f"axis {axis - 2} of {shape}: {part.start} .. {part.stop} cuts a quantisation block of {block}"
        for axis, part, block in zip(range(2), box[-2:], BLOCK[how], strict=True)
        if part.start % block or (part.stop % block and part.stop != shape[axis - 2])
    ]
    if problems:
        raise ProblemsError(f"no box of {how.upper()} weights", problems)
    scales = [
        slice(part.start // block, -(-part.stop // block))
        for part, block in zip(box[-2:], BLOCK[how], strict=True)
    ]
    columns = box[-1] if how == "fp8" else slice(box[-1].start // 2, box[-1].stop // 2)
    return (*box[:-1], columns), (*box[:-2], *scales)


def part(array: jax.Array | np.ndarray, box: Box) -> np.ndarray:
    """A box of an array on the host: a view if it lies in one piece in host memory, else a copy of the box.

    A box of which every process has a part only (`holders`) is brought together: a collective, for which all
    processes must ask in the same order.

    Raises:
        ProblemsError: if a part of it is on devices of other processes, of which one has it all.
    """
    if isinstance(array, np.ndarray):
        return array[box]
    shards: dict[tuple[Any, ...], tuple[Box, jax.Array]] = {}
    for shard in array.addressable_shards:
        own = tuple(slice(*s.indices(n)[:2]) for s, n in zip(shard.index, array.shape, strict=True))
        shared = overlap(box, own)
        if shared == box:
            return _fetched(shard.data, inside(box, own))
        if shared is not None:
            shards[tuple((s.start, s.stop) for s in own)] = (own, shard.data)
    target, filled = np.empty(shape_of(box), array.dtype), 0
    for own, data in shards.values():
        shared = overlap(box, own)
        target[inside(shared, box)] = _fetched(data, inside(shared, own))
        filled += size_of(shared)
    if filled != target.size:
        if isinstance(array, jax.Array) and not holders(array, box):
            return _brought_together(array, box)
        missing = f"{target.size - filled} of {target.size} numbers are on devices of other processes"
        raise ProblemsError(f"cannot fetch {box} of an array {array.shape}", [missing])
    return target


def holders(array: jax.Array | np.ndarray, box: Box) -> list[int]:
    """The processes that have all of a box of an array on their own devices; the same answer in each."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return [jax.process_index()]
    boxes = _boxes_by_process(array.sharding, tuple(array.shape))
    return [number for number, own in boxes.items() if sum(map(_size_shared(box), own)) == size_of(box)]


def _size_shared(box: Box) -> Callable[[Box], int]:
    def size(own: Box) -> int:
        shared = overlap(box, own)
        return 0 if shared is None else size_of(shared)

    return size


@functools.lru_cache(maxsize=256)
def _boxes_by_process(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[int, list[Box]]:
    """The different boxes of an array that are on devices of each process."""
    found: dict[int, dict[tuple[Any, ...], Box]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        box = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        found.setdefault(device.process_index, {})[tuple((s.start, s.stop) for s in box)] = box
    return {number: list(boxes.values()) for number, boxes in sorted(found.items())}


def _brought_together(array: jax.Array, box: Box) -> np.ndarray:
    """A box on every device, and from there to the host."""
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(_cut(everywhere)(array, [part.start for part in box], shape_of(box)))


@functools.lru_cache(maxsize=8)
def _cut(sharding: jax.sharding.NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(jax.lax.dynamic_slice, static_argnums=2, out_shardings=sharding)


def _fetched(data: jax.Array, box: Box) -> np.ndarray:
    """A box of an array on one device."""
    if _in_host_memory(data):
        return np.asarray(data)[box]  # a view
    # One program for every size of boxes, and no more of the array than the box crosses to the host.
    return np.asarray(_slice(data, [part.start for part in box], shape_of(box)))


def _in_host_memory(data: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in data.devices())


_slice = jax.jit(jax.lax.dynamic_slice, static_argnums=2)


Pair = tuple[np.ndarray, np.ndarray]
"""A tensor's elements and scales, both as bytes."""


class Pairs:
    """Official tensors in FP8 or FP4: kept as they are held, or rounded to the nearest numbers.

    Args:
        remembering: keep the last one, because its elements and scales are written in turn. Not where reading
            is a collective (`part`): processes remember different ones.
    """

    def __init__(self, remembering: bool = True) -> None:
        self._remembering = remembering
        self._last: tuple[str, Pair] | None = None

    def __call__(self, held: Held, spec: TensorSpec, how: Format) -> Pair:
        """One tensor in a format, 'fp8' or 'fp4'.

        Raises:
            CheckpointError: if the tensor holds NaN or infinity, or FP4 that FP8 does not hold exactly.
        """
        if not self._remembering or self._last is None or self._last[0] != spec.name:
            self._last = None  # before the next one is fetched
            blocks = _in_format(held, spec, how)
            self._last = spec.name, (np.asarray(blocks.data).view(np.uint8), np.asarray(blocks.scale))
        return self._last[1]


def _in_format(held: Held, spec: TensorSpec, how: Format) -> Blocks:
    if held.format not in (how, "fp4"):
        return _nearest(held, spec, how)
    blocks = held.tensor(spec)
    assert isinstance(blocks, Blocks)
    if held.format == how:
        return blocks
    assert isinstance(blocks, Mxfp4)
    try:
        return fp4_as_fp8(blocks)
    except ValueError as refused:
        raise CheckpointError("cannot store FP4 as FP8", [f"{spec.name}: {refused}"]) from refused


def _nearest(held: Held, spec: TensorSpec, how: Format) -> Blocks:
    plain = plain_tensor(held, spec, np.dtype(np.float32))
    if not np.isfinite(plain).all():
        raise CheckpointError("cannot quantise", [f"{spec.name}: holds NaN or infinity"])
    return (_to_fp8 if how == "fp8" else _to_fp4)(plain)


_to_fp8 = jax.jit(quantize_fp8_blocks)
_to_fp4 = jax.jit(quantize_mxfp4)


def plain_tensor(held: Held, spec: TensorSpec, dtype: np.dtype) -> np.ndarray:
    """The values of one tensor of any layout, dequantised if need be.

    Args:
        held: the parameter.
        spec: of a tensor that is one official tensor, or several stacked ones.
        dtype: of the result; bfloat16 or float32 if the parameter is quantised.
    """
    found = held.tensor(spec)
    if isinstance(found, np.ndarray):
        return found.astype(dtype, copy=False)
    target = np.empty((*found.data.shape[:-2], *held.shape[-2:]), dtype)
    dequantize_into(target, found.data, found.scale.view(ml_dtypes.float8_e8m0fnu))
    return target.reshape(spec.shape)


def as_dtype(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of elements or scales in one of the dtypes of `dtype_on_disk`."""
    if dtype == "F32":
        return np.ldexp(np.float32(1), data.astype(np.int32) - 127)
    return data.view(DTYPES[dtype])
