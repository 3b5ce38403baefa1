"""Block-scaled 8-bit and 4-bit numbers (report, section 5.2.1; formats of the released checkpoints).

Elements are E4M3 (FP8) or E2M1 (FP4, two a byte, low nibble first); each block of them shares a power of two,
stored as an E8M0 byte b that means 2^(b - 127). A scale is the smallest power of two that keeps its block's
largest magnitude on the element grid, found from the bits of a float32: exactly, and never by a cast to an
E8M0 type, which would round to nearest. Elements are rounded to nearest even and saturate.

    format     elements          block       scale
    Fp8Blocks  [.., O, I]        128 x 128   [.., ceil(O/128), ceil(I/128)]   weights
    Fp8Groups  [.., C]           1 x g       [.., C/g]                        activations, cache entries
    Mxfp4      [.., C/2] bytes   1 x 32      [.., C/32]                       expert weights, indexer keys
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import low_precision

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_BLOCK = 128
FP4_GROUP = 32
FP8_FLOOR = 1e-4
"""Smallest largest-magnitude of an FP8 group: scales stay at or above 2^-22."""
FP4_FLOOR = 6 * 2.0**-126
"""The same for FP4: scales are normal float32 numbers."""
E8M0_NAN = 0xFF

_data = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])


@functools.partial(_data, data_fields=["elements", "scale"])
@dataclasses.dataclass(frozen=True)
class Fp8Blocks:
    """Matrices in FP8 with one scale for every 128 x 128 block; the last may be partial."""

    elements: Float[Array, "*stack O I"]  # float8_e4m3fn
    scale: UInt8[Array, "*stack O_blocks I_blocks"]  # E8M0

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*stack O I"]:
        """elements * scale; exact in float32 and bfloat16 down to their smallest numbers."""
        rows, columns = self.elements.shape[-2:]
        scale = scale_value(self.scale)
        scale = jnp.repeat(jnp.repeat(scale, FP8_BLOCK, axis=-2), FP8_BLOCK, axis=-1)
        return (fp8_value(self.elements) * scale[..., :rows, :columns]).astype(dtype)


@functools.partial(_data, data_fields=["elements", "scale"])
@dataclasses.dataclass(frozen=True)
class Fp8Groups:
    """Vectors in FP8 with one scale for every g consecutive channels; g follows from the shapes."""

    elements: Float[Array, "*rows C"]  # float8_e4m3fn
    scale: UInt8[Array, "*rows groups"]  # E8M0

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*rows C"]:
        """elements * scale; exact in float32 and bfloat16."""
        group = self.elements.shape[-1] // self.scale.shape[-1]
        elements = fp8_value(self.elements).reshape(*self.scale.shape, group)
        scaled = elements * scale_value(self.scale)[..., None]
        return scaled.astype(dtype).reshape(self.elements.shape)


@functools.partial(_data, data_fields=["packed", "scale"])
@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Vectors in FP4, two channels a byte, with one scale for every 32 channels."""

    packed: UInt8[Array, "*rows C/2"]
    scale: UInt8[Array, "*rows C/32"]  # E8M0

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*rows C"]:
        """E2M1 * scale; exact in float32 and bfloat16."""
        values = e2m1_value(unpack_nibbles(self.packed)).reshape(*self.scale.shape, FP4_GROUP)
        scaled = (values * scale_value(self.scale)[..., None]).astype(dtype)
        return scaled.reshape(*self.packed.shape[:-1], 2 * self.packed.shape[-1])


# ---- scales ----------------------------------------------------------------------------------------------


def scale_code(ratio: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """E8M0 byte of 2^ceil(log2 ratio), for positive normal float32 `ratio` of at most 2^127."""
    bits = jax.lax.bitcast_convert_type(ratio.astype(jnp.float32), jnp.int32)
    # The biased exponent, one more if anything follows the leading bit.
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).astype(jnp.uint8)


def scale_value(code: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2^(code - 127) in float32. Code 255 gives NaN; code 0 is the subnormal 2^-127."""
    code = code.astype(jnp.int32)
    bits = jnp.where(code == 0, 1 << 22, code << 23)
    bits = jnp.where(code == E8M0_NAN, 0x7FC00000, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# ---- E4M3 ------------------------------------------------------------------------------------------------


def e4m3_value(code: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The number behind each byte, NaN included: in integer arithmetic, several times as fast as a cast."""
    value = low_precision.e4m3_halves(code).astype(jnp.float32) * low_precision.E4M3_OF_HALF
    return jnp.where(code & 0x7F == 0x7F, jnp.nan, value)


def fp8_value(elements: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """FP8 elements in float32, by way of their bits, so that numbers rounded to FP8 stay rounded.

    On a GPU XLA takes a cast to FP8 and one back for no cast at all (seen on an H200, jax 0.11.2).
    """
    return e4m3_value(jax.lax.bitcast_convert_type(elements, jnp.uint8))


# ---- E2M1 ------------------------------------------------------------------------------------------------


def e2m1_code(x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Sign and magnitude bits (0 .. 15) of the nearest E2M1 number, ties to even, saturating at 6."""
    size = jnp.minimum(jnp.abs(x), E2M1_MAX)
    # The grid is 0, 0.5 .. 2 in halves, 2 .. 4 in ones, 4 .. 6 in twos; codes count its points.
    code = jnp.where(
        size < 2, jnp.round(size * 2), jnp.where(size < 4, jnp.round(size) + 2, jnp.round(size / 2) + 4)
    )
    return code.astype(jnp.uint8) | (jnp.signbit(x).astype(jnp.uint8) << 3)


def e2m1_value(code: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The number behind each 4-bit code."""
    bits = code.astype(jnp.int32)
    exponent, fraction = (bits >> 1) & 3, bits & 1
    # A normal number's float32 bits: exponent 1 is 2^0. Exponent 0 holds 0 and 0.5.
    normal = jax.lax.bitcast_convert_type(((exponent + 126) << 23) | (fraction << 22), jnp.float32)
    size = jnp.where(exponent == 0, 0.5 * fraction.astype(jnp.float32), normal)
    return jnp.where(bits & 8, -size, size)


def e2m1_halves(
    packed: UInt8[Array, "*rows C/2"],
) -> tuple[Float32[Array, "*rows C/2"], Float32[Array, "*rows C/2"]]:
    """The numbers in the low and in the high nibbles: even and odd channels."""
    even, odd = (
        half.astype(jnp.float32) * low_precision.E2M1_OF_HALF for half in low_precision.e2m1_halves(packed)
    )
    return even, odd


def pack_nibbles(codes: UInt8[Array, "*rows C"]) -> UInt8[Array, "*rows C/2"]:
    """Two codes a byte: byte k holds code 2k in its low nibble and 2k + 1 in its high one."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: UInt8[Array, "*rows C/2"]) -> UInt8[Array, "*rows C"]:
    """The inverse of `pack_nibbles`."""
    both = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


# ---- quantisation ----------------------------------------------------------------------------------------


def quantize_fp8_groups(x: Float[Array, "*rows C"], group: int) -> Fp8Groups:
    """s = 2^ceil(log2(max(max|x|, 1e-4) / 448)) for every `group` channels; elements E4M3(x / s).

    Raises:
        ValueError: if the channels are not whole groups.
    """
    groups = _grouped(x, group)
    code = scale_code(jnp.maximum(jnp.abs(groups).max(axis=-1), FP8_FLOOR) / E4M3_MAX)
    return Fp8Groups(_e4m3(groups / scale_value(code)[..., None]).reshape(x.shape), code)


def quantize_mxfp4(x: Float[Array, "*rows C"]) -> Mxfp4:
    """s = 2^ceil(log2(max(max|x|, 6 * 2^-126) / 6)) for every 32 channels; elements E2M1(x / s).

    Raises:
        ValueError: if the channels are not whole groups.
    """
    groups = _grouped(x, FP4_GROUP)
    code = scale_code(jnp.maximum(jnp.abs(groups).max(axis=-1), FP4_FLOOR) / E2M1_MAX)
    codes = e2m1_code(groups / scale_value(code)[..., None])
    return Mxfp4(pack_nibbles(codes.reshape(x.shape)), code)


def quantize_fp8_blocks(x: Float[Array, "*stack O I"]) -> Fp8Blocks:
    """As `quantize_fp8_groups`, with one scale for every 128 x 128 block."""
    *stack, rows, columns = x.shape
    more = [(0, 0)] * len(stack) + [(0, -rows % FP8_BLOCK), (0, -columns % FP8_BLOCK)]
    padded = jnp.pad(x.astype(jnp.float32), more)
    tall, wide = padded.shape[-2] // FP8_BLOCK, padded.shape[-1] // FP8_BLOCK
    blocks = padded.reshape(*stack, tall, FP8_BLOCK, wide, FP8_BLOCK)
    largest = jnp.abs(blocks).max(axis=(-3, -1))
    code = scale_code(jnp.maximum(largest, FP8_FLOOR) / E4M3_MAX)
    elements = _e4m3(blocks / scale_value(code)[..., :, None, :, None])
    return Fp8Blocks(elements.reshape(padded.shape)[..., :rows, :columns], code)


def _grouped(x, group):
    if x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} channels are not whole groups of {group}")
    return x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _e4m3(x):
    # The cast itself does not saturate: beyond 464 it gives NaN.
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


# ---- FP4 to FP8 ------------------------------------------------------------------------------------------


def fp4_as_fp8(weight: Mxfp4) -> Fp8Blocks:
    """The same numbers in FP8 with 128 x 128 blocks, without any rounding.

    A block's new scale is its largest FP4 scale / 2^6. With 2^r the ratio of that largest scale to an
    element's own, the element becomes value * 2^(6 - r), which E4M3 holds up to r = 14 (zeros always).

    Args:
        weight: [.., O, I / 2] packed, concrete (the values decide whether it can be done).

    Raises:
        ValueError: if a group with nonzero values lies too far below its block's largest scale, or that scale
            is too small to be divided; names the blocks.
    """
    *stack, rows, half = weight.packed.shape
    columns = 2 * half
    groups = FP8_BLOCK // FP4_GROUP
    tall, wide = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    values = e2m1_value(unpack_nibbles(weight.packed))
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
    moved = values * jnp.repeat(scale_value(shift + 127), FP4_GROUP, axis=-1)
    return Fp8Blocks(moved.astype(jnp.float8_e4m3fn), code.astype(jnp.uint8))
