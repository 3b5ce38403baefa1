"""Products with weights whose outputs, or what they sum over, are split over devices.

Each device multiplies its part of the weight, which never moves: rows of x are brought together over the axes
that the weight is split over, and the compiler moves what comes out to where the next operation wants it. In
decode that is a few hundred kilobytes a layer instead of the weights.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.formats.weights import QuantizedWeight, Weight, is_quantized
from sharding.activations import Placement
from sharding.rules import OPTIONAL, axis_names

Letter = tuple[str, int]
"""A letter that the rules may split, and for outputs the place of its dim among them, or else its size."""


@dataclasses.dataclass(frozen=True)
class LinearOverMesh:
    """`block_matmul.linear`, or with `grouped` `block_matmul.grouped_linear`, over a mesh.

    Attributes:
        linear: the operation on one device.
        placement: mesh and rules.
        grouped: x and the weight share their first dim of groups, [*tokens, G, D] and [G, O, D].
        by_device: `linear` cannot be partitioned by the compiler, because it may run a kernel.
    """

    linear: Callable[..., jax.Array]
    placement: Placement
    grouped: bool
    by_device: bool

    def __call__(
        self,
        x: Float[Array, "*tokens D"],
        weight: Weight,
        *,
        out: Letter | None = None,
        over: Letter | None = None,
    ) -> Float[Array, "..."]:
        """x weight^T over the last axis of both.

        Args:
            x: [*tokens, D]; of three or more dims the first two are rows B and tokens T, of two the first is
                rows of tokens.
            weight: [*out, D].
            out: the letter of an output dim, and which one it is; what comes out is split along it.
            over: the letter of a dim that is a first factor of what is summed over, and its size. Partial
                sums are added in float32, after each was rounded to the dtype of x.
        """
        cut = self.axes(weight, out, over)
        if not cut and not self.by_device:
            return self.linear(x, weight)
        mesh, num_tokens = self.placement.mesh, x.ndim - 1 - self.grouped
        rows = self.placement.axes_for("B", x.shape[0], cut)
        tokens = (rows or None,)
        if num_tokens > 1:
            tokens += (self.placement.axes_for("T", x.shape[1], (*cut, *rows)) or None,)
        tokens += (None,) * (num_tokens - len(tokens))
        parts = math.prod(mesh.shape[axis] for axis in cut)
        local_rows = x.shape[0] // math.prod(mesh.shape[axis] for axis in rows)
        scatters = over is not None and local_rows % parts == 0
        seen = (cut,) if self.grouped else ()
        last = cut if over is not None else None
        outputs: list[Any] = [None] * (len(weight.shape) - 1)
        if out is not None:
            outputs[out[1]] = cut or None
        summed = PartitionSpec((*rows, *cut) if scatters else tokens[0], *tokens[1:], *outputs)
        spec = _weight_spec(weight, out, last, cut)
        held = (weight.blocks, weight.repeat) if is_quantized(weight) else (weight, None)

        def own(x: jax.Array, numbers: Any, repeat: Any) -> jax.Array:
            part = _part(weight, numbers, repeat, out, over, parts)
            y = self.linear(x, part)
            if over is None or not cut:
                return y
            wide = y.astype(jnp.float32)
            if scatters:
                return lax.psum_scatter(wide, cut, scatter_dimension=0, tiled=True).astype(y.dtype)
            return lax.psum(wide, cut).astype(y.dtype)

        split = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(PartitionSpec(*tokens, *seen, last), spec, PartitionSpec()),
            out_specs=summed if over is not None else PartitionSpec(*tokens, *outputs),
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(x, *held)

    def axes(self, weight: Weight, out: Letter | None, over: Letter | None) -> tuple[str, ...]:
        """The mesh axes that a weight is split over along its letter: those that its parameter was placed
        with, as `sharding.placement` decides it."""
        if out is None and over is None:
            return ()
        letter, number = out or over
        size = weight.shape[number] if out is not None else number
        block = 1
        whole = size if out is not None else weight.shape[-1]
        if is_quantized(weight) and (out is None or number >= len(weight.leading)):
            block = weight.blocks.block[0 if out is not None else 1]
            whole = math.prod(weight.dims[:-1]) if out is not None else weight.dims[-1]
        taken: tuple[str, ...] = ()
        for axis in axis_names(self.placement.table.parameters.get(letter, ())):
            axis = axis.removesuffix(OPTIONAL)
            parts = math.prod(self.placement.mesh.shape[each] for each in (*taken, axis))
            if self.placement.mesh.shape[axis] > 1 and size % parts == 0 and whole // parts % block == 0:
                taken = (*taken, axis)
        return taken


def _weight_spec(weight: Weight, out: Letter | None, last: Any, cut: tuple[str, ...]) -> PartitionSpec:
    """Of the arrays that hold the weight."""
    if not is_quantized(weight):
        entries: list[Any] = [None] * (weight.ndim - 1)
        if out is not None:
            entries[out[1]] = cut or None
        return PartitionSpec(*entries, last or None)
    leading: list[Any] = [None] * len(weight.leading)
    outputs = None
    if out is not None and out[1] < len(leading):
        leading[out[1]] = cut or None
    elif out is not None:
        outputs = cut or None
    stack = () if weight.repeat is None else (None,)
    return PartitionSpec(*stack, *leading, outputs, last or None)


def _part(
    weight: Weight, numbers: Any, repeat: Any, out: Letter | None, over: Letter | None, parts: int
) -> Weight:
    """A device's part of the weight."""
    if not is_quantized(weight):
        return numbers
    dims = list(weight.dims)
    if over is not None:
        dims[-1] //= parts
    elif out is not None and out[1] >= len(weight.leading):
        dims[out[1] - len(weight.leading)] //= parts
    return QuantizedWeight(numbers, tuple(dims), repeat)
