"""FP8 window rows and compressed entries as three arrays, which XLA reads anywhere and kernels stream."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.arithmetic import cdiv, round_up
from pallas_kernels.formats import e4m3, e8m0
from pallas_kernels.formats.bits import bfloat16_value, bits
from pallas_kernels.formats.blocks import padded, quantize_fp8_groups
from pallas_kernels.formats.sizes import ENTRY_GROUP

SCALE_BYTES = 8
"""An entry's scales are padded to whole multiples of it: 7 and one pad byte at Dh = 512, Dr = 64."""


class Fp8Entries(NamedTuple):
    """Entries, or the rows of a ring, with rotated channels in bfloat16 and the others in E4M3.

    584 bytes at Dh = 512, Dr = 64.

    There are `scale_bytes` scales: the bytes behind the last group are padding, any. Without them XLA finds
    another layout for the array, and a copy of it would precede every call.
    """

    values: Float[Array, "R B S Dh-Dr"]  # float8_e4m3fn, or their bits
    scales: UInt8[Array, "R B S scale_bytes"]  # byte b means 2^(b - 127), 1 <= b <= 254
    rotary: Float[Array, "R B S Dr"]  # bfloat16, or their bits; the last channels of an entry

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., Dh]."""
        return (*self.values.shape[:-1], self.values.shape[-1] + self.rotary.shape[-1])

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*rows Dh"]:
        """The numbers; exact in float32 and bfloat16."""
        values, scales, rotary = bits(self)
        still, width = values.shape[-1], self.shape[-1]
        scale = jnp.repeat(e8m0.value(scales), ENTRY_GROUP, axis=-1)[..., :still]
        values = e4m3.value(padded(values, width)) * padded(scale, width)
        rotary = bfloat16_value(jnp.pad(rotary, [(0, 0)] * (rotary.ndim - 1) + [(still, 0)]))
        # A choice is one loop over the result; joining the two parts would first make each of them.
        return jnp.where(jnp.arange(width, dtype=jnp.int32) < still, values, rotary).astype(dtype)


def scale_bytes(channels: int) -> int:
    """Bytes of scales of an entry with so many channels that are not rotated: one a group, and padding."""
    return round_up(cdiv(channels, ENTRY_GROUP), SCALE_BYTES)


def quantize_entries(x: Float[Array, "*rows Dh"], num_rotary: int) -> Fp8Entries:
    """The nearest entries: FP8 by 64 channels, the last `num_rotary` channels bfloat16.

    A last group of channels may be smaller than 64.
    """
    still = x.shape[-1] - num_rotary
    whole = padded(x[..., :still], cdiv(still, ENTRY_GROUP) * ENTRY_GROUP)
    quantised = quantize_fp8_groups(whole, ENTRY_GROUP)
    return Fp8Entries(
        quantised.elements[..., :still],
        padded(quantised.scale, scale_bytes(still)),
        x[..., still:].astype(jnp.bfloat16),
    )
