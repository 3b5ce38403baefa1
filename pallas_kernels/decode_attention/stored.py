"""The formats compressed entries are stored in, and what their bytes mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.arithmetic import round_up

GROUP = 64  # channels that share one scale


class Fp8Entries(NamedTuple):
    """Entries with rotated channels in bfloat16 and the others in e4m3; 584 bytes at Dh = 512, Dr = 64.

    There are `scale_bytes` scales: the bytes behind the last group are padding. Without them XLA finds
    another layout for the array, and a copy of it would precede every call.
    """

    values: Float[Array, "R B S Dh-Dr"]  # float8_e4m3fn
    scales: UInt8[Array, "R B S scale_bytes"]  # byte b means 2^(b - 127), 1 <= b <= 254
    rotary: Float[Array, "R B S Dr"]  # bfloat16, the last channels of an entry


Entries = Float[Array, "R B S Dh"] | Fp8Entries


def shape_of(entries: Entries) -> tuple[int, ...]:
    """[R, B, S, Dh] of the entries when decoded."""
    if isinstance(entries, Fp8Entries):
        return (*entries.values.shape[:-1], entries.values.shape[-1] + entries.rotary.shape[-1])
    return entries.shape


def scale_bytes(channels: int) -> int:
    """Bytes of scales of an entry with so many channels that are not rotated: one a group, and padding."""
    return round_up(channels // GROUP, 8)


def scale_of(byte: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    """2^(b - 127): the byte is the exponent field of a float32."""
    return jax.lax.bitcast_convert_type(byte.astype(jnp.int32) << 23, jnp.float32)


def decoded(entries: Entries) -> Array:
    """[R, B, S, Dh]: fp8 entries as float32, others as they are. The definition of the format."""
    if not isinstance(entries, Fp8Entries):
        return entries
    scale = jnp.repeat(scale_of(entries.scales), GROUP, axis=-1)
    still = entries.values.astype(jnp.float32) * scale[..., : entries.values.shape[-1]]
    return jnp.concatenate([still, entries.rotary.astype(jnp.float32)], axis=-1)


def channels_first(entries: Entries) -> tuple[jax.Array, ...]:
    """What a kernel reads: rows as they are, fp8 with entries on the last axis.

    With entries on the lanes a scale is broadcast along sublanes, which costs nothing, and none of the
    three arrays has a padded last axis. XLA lays them out that way by itself, so this moves no data.
    """
    if isinstance(entries, Fp8Entries):
        return tuple(jnp.swapaxes(x, 2, 3) for x in entries)
    return (entries,)


def decoded_tile(
    values: Float[Array, "Dh-Dr N"], scales: UInt8[Array, "scale_bytes N"], rotary: Array, dtype: jnp.dtype
) -> Float[Array, "Dh N"]:
    """A tile of fp8 entries; exact in bfloat16: e4m3 has fewer bits, and the scale is a power of two."""
    grouped = values.astype(dtype).reshape(-1, GROUP, values.shape[1])
    still = grouped * scale_of(scales).astype(dtype)[: grouped.shape[0], None, :]
    return jnp.concatenate([still.reshape(values.shape), rotary.astype(dtype)], axis=0)
