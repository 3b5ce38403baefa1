"""Arrays of block-scaled 8-bit and 4-bit numbers (report, section 5.2.1, and the released checkpoints).

Elements are E4M3 (FP8) or E2M1 (FP4, two a byte, low nibble first); each block of them shares a power of two,
stored as an E8M0 byte b that means 2^(b - 127). A scale is the smallest power of two that keeps its block's
largest magnitude on the element grid, found from the bits of a float32: exactly, and never by a cast to an
E8M0 type, which would round to nearest. Elements are rounded to nearest even and saturate.

    format     elements          block       scale
    Fp8Blocks  [.., O, I]        128 x 128   [.., ceil(O/128), ceil(I/128)]   weights
    Fp8Groups  [.., C]           1 x g       [.., C/g]                        activations, cache entries
    Mxfp4      [.., C/2] bytes   1 x 32      [.., ceil(C/32)]                 expert weights, indexer keys

All of them are pytrees whose leaves have the leading axes in common, so they are sliced, scanned and placed
like one array, and say the `shape` of the numbers they stand for. Leaves may be numpy arrays.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats import e2m1, e4m3, e8m0
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK

Format = Literal["plain", "fp8", "mxfp4"]
"""Of a weight or an index key: numbers of a float dtype, or one of the formats here."""

_data = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])


@functools.partial(_data, data_fields=["elements", "scale"])
@dataclasses.dataclass(frozen=True)
class Fp8Blocks:
    """Matrices in FP8 with one scale for every 128 x 128 block; the last may be partial."""

    elements: Float[Array, "*stack O I"]  # float8_e4m3fn
    scale: UInt8[Array, "*stack O_blocks I_blocks"]  # E8M0
    format: ClassVar[Format] = "fp8"
    block: ClassVar[tuple[int, int]] = (FP8_BLOCK, FP8_BLOCK)  # rows and columns that share a scale

    @property
    def data(self) -> Float[Array, "*stack O I"]:
        """The array that is not the scales."""
        return self.elements

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., O, I]."""
        return self.elements.shape

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*stack O I"]:
        """elements * scale; exact in float32 and bfloat16 down to their smallest numbers."""
        rows, columns = self.elements.shape[-2:]
        scale = _spread(e8m0.value(self.scale))
        return (e4m3.value_of(self.elements) * scale[..., :rows, :columns]).astype(dtype)


@functools.partial(_data, data_fields=["elements", "scale"])
@dataclasses.dataclass(frozen=True)
class Fp8Groups:
    """Vectors in FP8 with one scale for every g consecutive channels; g follows from the shapes."""

    elements: Float[Array, "*rows C"]  # float8_e4m3fn
    scale: UInt8[Array, "*rows groups"]  # E8M0

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., C]."""
        return self.elements.shape

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*rows C"]:
        """elements * scale; exact in float32 and bfloat16."""
        group = self.elements.shape[-1] // self.scale.shape[-1]
        elements = e4m3.value_of(self.elements).reshape(*self.scale.shape, group)
        scaled = elements * e8m0.value(self.scale)[..., None]
        return scaled.astype(dtype).reshape(self.elements.shape)


@functools.partial(_data, data_fields=["packed", "scale"])
@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Vectors in FP4, two channels a byte, with one scale for every 32 channels; the last may be partial."""

    packed: UInt8[Array, "*rows C/2"]
    scale: UInt8[Array, "*rows ceil(C/32)"]  # E8M0
    format: ClassVar[Format] = "mxfp4"
    block: ClassVar[tuple[int, int]] = (1, FP4_GROUP)

    @property
    def data(self) -> UInt8[Array, "*rows C/2"]:
        """The array that is not the scales."""
        return self.packed

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., C]."""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*rows C"]:
        """E2M1 * scale; exact in float32 and bfloat16."""
        channels = self.shape[-1]
        packed = padded(self.packed, self.scale.shape[-1] * FP4_GROUP // 2)
        values = e2m1.value(e2m1.unpack(packed)).reshape(*self.scale.shape, FP4_GROUP)
        scaled = (values * e8m0.value(self.scale)[..., None]).astype(dtype)
        return scaled.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :channels]

    def halves(
        self, dtype: jax.typing.DTypeLike
    ) -> tuple[Float[Array, "*rows C/2"], Float[Array, "*rows C/2"]]:
        """The even and the odd channels, as `dequantize` gives them, which interleaves them at some cost."""
        width = self.packed.shape[-1]
        packed = padded(self.packed, self.scale.shape[-1] * FP4_GROUP // 2)

        def scaled(half: jax.Array) -> jax.Array:
            numbers = half.astype(jnp.float32) * e2m1.OF_PLACED
            grouped = numbers.reshape(*self.scale.shape, -1) * e8m0.value(self.scale)[..., None]
            return grouped.astype(dtype).reshape(packed.shape)[..., :width]

        even, odd = e2m1.halves(packed)
        return scaled(even), scaled(odd)


Blocks = Fp8Blocks | Mxfp4
"""What a quantised weight matrix can be."""


def format_of(matrices: jax.Array | Blocks) -> Format:
    """Which numbers a weight is held in."""
    return matrices.format if isinstance(matrices, Blocks) else "plain"


# ---- for loops over stacks of weights: codes of scales 1 .. 254 ------------------------------------------


def fp8_numbers(
    codes: UInt8[Array, "*stack O I"], scale: UInt8[Array, "*stack O_blocks I_blocks"]
) -> Float[Array, "*stack O I"]:
    """float32 numbers of FP8 blocks whose elements are given as bytes, without NaN."""
    rows, columns = codes.shape[-2:]
    scales = _spread(e8m0.normal_value(scale))[..., :rows, :columns]
    return e4m3.halves(codes).astype(jnp.float32) * e4m3.OF_HALF * scales


def mxfp4_numbers(
    packed: UInt8[Array, "*rows C/2"], scale: UInt8[Array, "*rows C/32"]
) -> Float[Array, "*rows C"]:
    """float32 numbers of whole FP4 groups."""
    placed = e2m1.interleaved_halves(packed.reshape(*scale.shape, FP4_GROUP // 2, 1))
    scaled = placed.astype(jnp.float32) * e2m1.OF_PLACED * e8m0.normal_value(scale)[..., None, None]
    return scaled.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


# ---- quantisation ----------------------------------------------------------------------------------------


def quantize_fp8_groups(x: Float[Array, "*rows C"], group: int) -> Fp8Groups:
    """s = 2^ceil(log2(max(max|x|, 1e-4) / 448)) for every `group` channels; elements E4M3(x / s).

    Raises:
        ValueError: if the channels are not whole groups.
    """
    groups = _grouped(x, group)
    code = e8m0.code_above(jnp.maximum(jnp.abs(groups).max(axis=-1), e4m3.SMALLEST_MAX) / e4m3.MAX)
    return Fp8Groups(e4m3.rounded(groups / e8m0.value(code)[..., None]).reshape(x.shape), code)


def quantize_mxfp4(x: Float[Array, "*rows C"]) -> Mxfp4:
    """s = 2^ceil(log2(max(max|x|, 6 * 2^-126) / 6)) for every 32 channels; elements E2M1(x / s).

    Raises:
        ValueError: if the channels are not whole groups.
    """
    groups = _grouped(x, FP4_GROUP)
    code = e8m0.code_above(jnp.maximum(jnp.abs(groups).max(axis=-1), e2m1.SMALLEST_MAX) / e2m1.MAX)
    codes = e2m1.code(groups / e8m0.value(code)[..., None])
    return Mxfp4(e2m1.pack(codes.reshape(x.shape)), code)


def quantize_fp8_blocks(x: Float[Array, "*stack O I"]) -> Fp8Blocks:
    """As `quantize_fp8_groups`, with one scale for every 128 x 128 block."""
    *stack, rows, columns = x.shape
    more = [(0, 0)] * len(stack) + [(0, -rows % FP8_BLOCK), (0, -columns % FP8_BLOCK)]
    whole = jnp.pad(x.astype(jnp.float32), more)
    tall, wide = whole.shape[-2] // FP8_BLOCK, whole.shape[-1] // FP8_BLOCK
    blocks = whole.reshape(*stack, tall, FP8_BLOCK, wide, FP8_BLOCK)
    largest = jnp.abs(blocks).max(axis=(-3, -1))
    code = e8m0.code_above(jnp.maximum(largest, e4m3.SMALLEST_MAX) / e4m3.MAX)
    elements = e4m3.rounded(blocks / e8m0.value(code)[..., :, None, :, None])
    return Fp8Blocks(elements.reshape(whole.shape)[..., :rows, :columns], code)


def fp4_as_fp8(weight: Mxfp4) -> Fp8Blocks:
    """The same numbers in FP8 with 128 x 128 blocks, without any rounding.

    A block's new scale is its largest FP4 scale / 2^6. With 2^r the ratio of that largest scale to an
    element's own, the element becomes value * 2^(6 - r), which E4M3 holds up to r = 14 (zeros always).

    Args:
        weight: [.., O, I / 2] packed, concrete (the values decide whether it can be done), whole groups.

    Raises:
        ValueError: if a group with nonzero values lies too far below its block's largest scale, or that scale
            is too small to be divided; names the blocks.
    """
    *stack, rows, half = weight.packed.shape
    columns = 2 * half
    groups = FP8_BLOCK // FP4_GROUP
    tall, wide = cdiv(rows, FP8_BLOCK), cdiv(columns, FP8_BLOCK)
    values = e2m1.value(e2m1.unpack(weight.packed))
    used = jnp.any(values.reshape(*weight.scale.shape, FP4_GROUP) != 0, axis=-1)

    none = [(0, 0)] * len(stack)
    padding = [*none, (0, tall * FP8_BLOCK - rows), (0, wide * groups - weight.scale.shape[-1])]
    exponent = jnp.where(used, weight.scale.astype(jnp.int32), -1)
    blocks = jnp.pad(exponent, padding, constant_values=-1).reshape(*stack, tall, FP8_BLOCK, wide, groups)
    largest = blocks.max(axis=(-3, -1))
    fits = ((blocks < 0) | (largest[..., :, None, :, None] - blocks <= 14)).all(axis=(-3, -1))
    fits &= (largest < 0) | (largest >= 6)
    if not bool(fits.all()):
        bad = [tuple(int(i) for i in block) for block in jnp.argwhere(~fits)]
        raise ValueError(
            f"{len(bad)} blocks of 128 x 128 hold FP4 scales more than 2^14 apart, or too small, for FP8: "
            f"{', '.join(map(str, bad[:5]))}{' ...' if len(bad) > 5 else ''}"
        )
    code = jnp.maximum(largest - 6, 0)
    by_group = jnp.repeat(jnp.repeat(code, FP8_BLOCK, axis=-2), groups, axis=-1)
    by_group = by_group[..., :rows, : weight.scale.shape[-1]]
    shift = jnp.where(used, exponent - by_group, 0)
    moved = values * jnp.repeat(e8m0.value(shift + e8m0.BIAS), FP4_GROUP, axis=-1)
    return Fp8Blocks(moved.astype(jnp.float8_e4m3fn), code.astype(jnp.uint8))


def padded(x: jax.Array, width: int) -> jax.Array:
    """x with zeros behind its last axis, up to a width."""
    if x.shape[-1] == width:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _grouped(x, group):
    if x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} channels are not whole groups of {group}")
    return x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _spread(scale):
    """Each block's scale for each of its 128 x 128 numbers."""
    return jnp.repeat(jnp.repeat(scale, FP8_BLOCK, axis=-2), FP8_BLOCK, axis=-1)
