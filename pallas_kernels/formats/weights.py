"""Weights that stay in memory as the checkpoint stores them (report, sections 3.4 and 5.2.1)."""

import dataclasses
import functools
import math
from types import EllipsisType

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.formats.blocks import Blocks, Format


@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks", "repeat"], meta_fields=["dims"])
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A parameter held in FP8 or FP4: a tree of arrays in the place where a plain model has one array.

    Block scales belong to the matrix [O, I] of the checkpoint, so that matrix is what is held; `dims` are the
    axes that a plain parameter has instead of O and I. Axes before those (layers, experts, gate and up) are
    axes of the arrays, and slicing, scanning or placing them works as for any tree. Not trainable.

    Attributes:
        blocks: elements and scales, [*leading, O, I].
        dims: the last axes of the plain parameter.
        repeat: i32[], or None. With it this is one weight of a stack: `blocks` has the repeats R as one more
            axis in front, and is sliced only by who cannot read it in place.
    """

    blocks: Blocks
    dims: tuple[int, ...]
    repeat: Int32[Array, ""] | None = None

    def at(self, repeat: Int32[Array, ""]) -> "QuantizedWeight":
        """One weight of this stack, left where it lies."""
        return dataclasses.replace(self, repeat=repeat)

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the axes before O and I, without the one that `repeat` selects in."""
        return self.blocks.scale.shape[0 if self.repeat is None else 1 : -2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain parameter."""
        return (*self.leading, *self.dims)

    @property
    def ndim(self) -> int:
        """Axes of the plain parameter."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Numbers held, scales not counted."""
        return math.prod(self.shape)

    def __getitem__(self, key: EllipsisType) -> "QuantizedWeight":
        """Itself: a parameter's value is read as `parameter[...]`."""
        if key is not Ellipsis:
            raise TypeError(f"a quantised weight has no element [{key!r}]; dequantize() it first")
        return self

    def reshape(self, *shape: int) -> "QuantizedWeight":
        """The plain parameter's last axes merged or split; leading axes stay as they are, and -1 is one axis.

        Raises:
            ValueError: if the shape does not keep the leading axes, or has another size.
        """
        leading = self.leading
        known = math.prod(n for n in shape if n != -1)
        full = tuple(self.size // known if n == -1 else n for n in shape)
        if full[: len(leading)] != leading or math.prod(full) != self.size:
            raise ValueError(f"a quantised weight {self.shape} with leading {leading} cannot become {shape}")
        return dataclasses.replace(self, dims=full[len(leading) :])

    def dequantize(self, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
        """The plain parameter; exact in bfloat16 and float32."""
        own = self.blocks
        if self.repeat is not None:
            own = jax.tree.map(lambda stack: stack[self.repeat], own)
        return own.dequantize(dtype).reshape(self.shape)


Weight = Float[Array, "..."] | QuantizedWeight


def is_quantized(leaf: object) -> bool:
    """For `jax.tree` functions that should see a quantised weight as one leaf."""
    return isinstance(leaf, QuantizedWeight)


def plain(weight: Weight, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    """A weight as an array of this dtype."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.astype(dtype)


def format_of(weight: Weight) -> Format:
    """Which numbers a weight is held in."""
    return weight.blocks.format if isinstance(weight, QuantizedWeight) else "plain"


def matrices(weight: Weight) -> Float[Array, "..."] | Blocks:
    """What a kernel takes: a plain weight itself, or the blocks [*leading, O, I] of a quantised one."""
    return weight.blocks if isinstance(weight, QuantizedWeight) else weight
