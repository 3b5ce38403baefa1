"""Stacks of experts' matrices in every format: shapes, rules, meaning."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.low_precision import (
    BLOCK,
    GROUP,
    decode_fp8_blocks,
    decode_mxfp4,
    e2m1_codes,
    e2m1_value,
    e8m0_value,
)

Format = Literal["plain", "fp8", "mxfp4"]


class Stack(NamedTuple):
    """Matrices [S, ..., N, K] behind one another, output dimension N first."""

    values: Float[Array, "S *which N K"] | UInt8[Array, "S *which N half"]
    scale: UInt8[Array, "S *which row_blocks column_blocks"] | None = None

    @property
    def format(self) -> Format:
        """The dtype says it."""
        if self.values.dtype == jnp.uint8:
            return "mxfp4"
        return "fp8" if self.values.dtype == jnp.float8_e4m3fn else "plain"

    @property
    def shape(self) -> tuple[int, ...]:
        """[S, ..., N, K] when decoded."""
        *lead, width = self.values.shape
        return (*lead, 2 * width if self.format == "mxfp4" else width)

    def problems(self, name: str) -> list[str]:
        """Every rule the format breaks, for an argument `name` and its `name_scale`."""
        values, scale = self.values, self.scale
        described = f"{name} {values.dtype}{list(values.shape)}"
        if self.format == "plain":
            floats = (jnp.float32, jnp.bfloat16, jnp.float16)
            rules = {
                f"{described} must be float32, bfloat16, float16, float8_e4m3fn or uint8": values.dtype
                in floats,
                f"{name}_scale must be None for {described}": scale is None,
            }
            return [rule for rule, holds in rules.items() if not holds]
        if values.ndim < 2:
            return []  # the op says which shape it wants
        *lead, rows, width = self.shape
        wanted = [*lead, cdiv(rows, BLOCK), cdiv(width, BLOCK)]
        if self.format == "mxfp4":
            wanted = [*lead, rows, width // GROUP]
        got = "None" if scale is None else f"{scale.dtype}{list(scale.shape)}"
        rules = {
            f"{described} must hold whole groups of {GROUP} numbers": self.format == "fp8"
            or width % GROUP == 0,
            f"{name}_scale {got} must be uint8{wanted} for {described}": scale is not None
            and scale.dtype == jnp.uint8
            and list(scale.shape) == wanted,
        }
        return [rule for rule, holds in rules.items() if not holds]

    def one(self, index: jax.Array) -> Float[Array, "*which N K"]:
        """One matrix, or pair of them, out of the stack: quantised ones as float32, others as they are."""
        at = lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False)  # noqa: E731
        if self.format == "plain":
            return at(self.values)
        if self.format == "mxfp4":
            return decode_mxfp4(at(self.values), at(self.scale))
        # As bytes before the slice: XLA:CPU would slice eight-bit floats by way of another type.
        bytes_ = lax.bitcast_convert_type(self.values, jnp.uint8)
        return decode_fp8_blocks(at(bytes_), at(self.scale))


def decoded(stack: Stack) -> Array:
    """All of a stack: quantised ones as float32, others as they are. The definition of the formats."""
    if stack.format == "mxfp4":
        return e2m1_value(e2m1_codes(stack.values)) * jnp.repeat(e8m0_value(stack.scale), GROUP, axis=-1)
    if stack.format == "fp8":
        rows, columns = stack.values.shape[-2:]
        scales = jnp.repeat(jnp.repeat(e8m0_value(stack.scale), BLOCK, axis=-2), BLOCK, axis=-1)
        return stack.values.astype(jnp.float32) * scales[..., :rows, :columns]
    return stack.values
