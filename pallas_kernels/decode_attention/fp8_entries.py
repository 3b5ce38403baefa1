"""Fp8 entries as three arrays, which XLA reads anywhere and kernels stream."""

from typing import NamedTuple

from jaxtyping import Array, Float, UInt8

from pallas_kernels.arithmetic import round_up

GROUP = 64  # channels that share one scale


class Fp8Entries(NamedTuple):
    """Entries, or the rows of a ring, with rotated channels in bfloat16 and the others in e4m3.

    584 bytes at Dh = 512, Dr = 64.

    There are `scale_bytes` scales: the bytes behind the last group are padding, any. Without them XLA finds
    another layout for the array, and a copy of it would precede every call.
    """

    values: Float[Array, "R B S Dh-Dr"]  # float8_e4m3fn
    scales: UInt8[Array, "R B S scale_bytes"]  # byte b means 2^(b - 127), 1 <= b <= 254
    rotary: Float[Array, "R B S Dr"]  # bfloat16, the last channels of an entry


def scale_bytes(channels: int) -> int:
    """Bytes of scales of an entry with so many channels that are not rotated: one a group, and padding."""
    return round_up(channels // GROUP, 8)
