"""Stacks of experts' matrices in every format, as the products of this family read them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats.blocks import (
    Blocks,
    Format,
    Fp8Blocks,
    Mxfp4,
    format_of,
    fp8_numbers,
    mxfp4_numbers,
)
from pallas_kernels.formats.on_host import fp4_scale_shape, fp8_scale_shape
from pallas_kernels.formats.sizes import FP4_GROUP

Matrices = Float[Array, "S *which N K"] | Blocks
"""A stack of matrices as callers hold it."""


class Stack(NamedTuple):
    """Matrices [S, ..., N, K] behind one another, output dimension N first: the arrays of `Matrices`."""

    values: Float[Array, "S *which N K"] | UInt8[Array, "S *which N half"]
    scale: UInt8[Array, "S *which row_blocks column_blocks"] | None = None

    @classmethod
    def of(cls, matrices: Matrices) -> "Stack":
        """The arrays of these matrices."""
        return cls(matrices.data, matrices.scale) if isinstance(matrices, Blocks) else cls(matrices)

    @property
    def format(self) -> Format:
        """The dtype says it."""
        if self.values.dtype == jnp.uint8:
            return "mxfp4"
        return "fp8" if self.values.dtype == jnp.float8_e4m3fn else "plain"

    @property
    def matrices(self) -> Matrices:
        """What these are the arrays of."""
        if self.format == "plain":
            return self.values
        return (Mxfp4 if self.format == "mxfp4" else Fp8Blocks)(self.values, self.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """[S, ..., N, K] when decoded."""
        return self.matrices.shape

    def one(self, index: jax.Array) -> Float[Array, "*which N K"]:
        """One matrix, or pair of them, out of the stack: quantised ones as float32, others as they are."""
        at = lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False)  # noqa: E731
        if self.format == "plain":
            return at(self.values)
        if self.format == "mxfp4":
            return mxfp4_numbers(at(self.values), at(self.scale))
        # As bytes before the slice: XLA:CPU would slice eight-bit floats by way of another type.
        bytes_ = lax.bitcast_convert_type(self.values, jnp.uint8)
        return fp8_numbers(at(bytes_), at(self.scale))


def problems(name: str, matrices: Matrices) -> list[str]:
    """Every rule that the arrays of an argument `name` break."""
    form = format_of(matrices)
    values, scale = Stack.of(matrices)
    described = f"{name} {values.dtype}{list(values.shape)}"
    if form == "plain":
        known = values.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        return [] if known else [f"{described} must be float32, bfloat16, float16, Fp8Blocks or Mxfp4"]
    if values.ndim < 2:
        return []  # the op says which shape it wants
    dtype = jnp.dtype(jnp.uint8 if form == "mxfp4" else jnp.float8_e4m3fn)
    shape = matrices.shape
    wanted = list(fp4_scale_shape(shape) if form == "mxfp4" else fp8_scale_shape(shape))
    got = f"{scale.dtype}{list(scale.shape)}"
    rules = {
        f"{described} must be {dtype} in {type(matrices).__name__}": values.dtype == dtype,
        f"{described} must hold whole groups of {FP4_GROUP} numbers": form == "fp8"
        or shape[-1] % FP4_GROUP == 0,
        f"scale of {name} {got} must be uint8{wanted} for {described}": scale.dtype == jnp.uint8
        and list(scale.shape) == wanted,
    }
    return [rule for rule, holds in rules.items() if not holds]


def decoded(stack: Stack) -> Float[Array, "S *which N K"]:
    """All of a stack: quantised matrices as float32, others as they are."""
    return stack.values if stack.format == "plain" else stack.matrices.dequantize(jnp.float32)
