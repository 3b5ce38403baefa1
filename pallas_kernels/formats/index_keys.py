"""The formats that index keys are stored in (report, section 2.3.4).

A key takes 2 Di bytes in bfloat16, Di + 4 as `Fp8Keys` and Di / 2 + Di / 32 as `Mxfp4`: 256, 132 and 68 at
Di = 128.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.formats import e4m3
from pallas_kernels.formats.bits import bits
from pallas_kernels.formats.blocks import Format, Mxfp4


class Fp8Keys(NamedTuple):
    """E4M3 numbers with one float32 scale a key; a key that is not finite has a NaN scale."""

    values: Float[Array, "... S Di"]  # float8_e4m3fn, or their bits
    scales: Float32[Array, "... S 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., S, Di]."""
        return self.values.shape

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "... S Di"]:
        """values * scale, float32 products rounded to the dtype."""
        return (e4m3.value(bits(self.values)) * self.scales).astype(dtype)


Keys = Float[Array, "... S Di"] | Fp8Keys | Mxfp4


def format_of(keys: Keys) -> Format:
    """Which format a key operand is in."""
    return "fp8" if isinstance(keys, Fp8Keys) else "mxfp4" if isinstance(keys, Mxfp4) else "plain"


def decoded(keys: Keys) -> Float[Array, "... S Di"]:
    """Quantised keys as float32, others as they are. The definition of both formats."""
    return keys.dequantize(jnp.float32) if isinstance(keys, Fp8Keys | Mxfp4) else keys
