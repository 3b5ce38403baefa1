"""The formats index keys are stored in, and what their bytes mean.

An entry takes 2 Di bytes in bf16, Di + 4 in fp8 and Di / 2 + Di / 32 in mxfp4: 256, 132 and 68 at Di = 128.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.low_precision import GROUP, e2m1_codes, e2m1_value


class Fp8Keys(NamedTuple):
    """e4m3 numbers with one float32 scale an entry; an entry that is not finite has a NaN scale."""

    values: Float[Array, "... S Di"]  # float8_e4m3fn
    scales: Float32[Array, "... S 1"]


class Mxfp4Keys(NamedTuple):
    """Packed e2m1 numbers, the even one of a pair in the low four bits; one e8m0 scale for 32 numbers."""

    values: UInt8[Array, "... S pairs"]
    scales: UInt8[Array, "... S groups"]  # byte b means 2^(b - 127), 255 means NaN


Keys = Float[Array, "... S Di"] | Fp8Keys | Mxfp4Keys
Format = Literal["plain", "fp8", "mxfp4"]


def format_of(keys: Keys) -> Format:
    """Which format a key operand is in."""
    return "fp8" if isinstance(keys, Fp8Keys) else "mxfp4" if isinstance(keys, Mxfp4Keys) else "plain"


def shape_of(keys: Keys) -> tuple[int, ...]:
    """[..., S, Di] of the keys when decoded."""
    values = keys.values if isinstance(keys, Fp8Keys | Mxfp4Keys) else keys
    return (*values.shape[:-1], values.shape[-1] * (2 if isinstance(keys, Mxfp4Keys) else 1))


def decoded(keys: Keys) -> Array:
    """[..., S, Di]: quantised keys as float32, others as they are. The definition of both formats."""
    if isinstance(keys, Fp8Keys):
        return keys.values.astype(jnp.float32) * keys.scales
    if isinstance(keys, Mxfp4Keys):
        scales = jax.lax.bitcast_convert_type(keys.scales, jnp.float8_e8m0fnu).astype(jnp.float32)
        return e2m1_value(e2m1_codes(keys.values)) * jnp.repeat(scales, GROUP, axis=-1)
    return keys
