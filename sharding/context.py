"""Tokens of a row on several devices (`context`): which rows of a neighbour each of them needs, and no more.

A device that has t consecutive tokens of a row computes everything of those tokens. From elsewhere it takes

    window      the W - 1 rows before its own (`LineOverMesh`), from the device before it
    compressor  the m - 1 rows before its own, or 2 m - 1 where a block reads the one before it
                (`CompressOverMesh`), then the entries that all devices made

so (W - 1 + 2 (2 m - 1)) rows and 1 / m of the tokens as entries travel, not every device's t rows. Documents
may end anywhere: which rows make a block is what the lists of `model.span` say. The exchanges are written
out, because the partitioner's own gave wrong gradients of keys (on a mesh whose axes context, expert and
tensor are all larger than 1, with each of its two forms, GSPMD and Shardy).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from sharding.activations import Placement
from sharding.by_device import ByDevice
from sharding.placement import ways


def rows_before(
    x: Float[Array, "b t ..."], count: int, axes: tuple[str, ...], devices: int
) -> Float[Array, "b count ..."]:
    """The `count` rows in front of this device's part of a row, inside a shard_map; zeros in front of the
    first row of all. They come from as many devices as hold them.

    Args:
        x: this device's t rows of each sequence.
        count: of rows, >= 0; may be more than t.
        axes: of the mesh, over which rows are split in order.
        devices: along those axes.
    """
    own, pieces, missing = x.shape[1], [], count
    for hop in range(1, devices):
        if not missing:
            break
        taken = min(own, missing)
        pairs = [(device, device + hop) for device in range(devices - hop)]
        pieces.append(lax.ppermute(x[:, own - taken :], axes, pairs))
        missing -= taken
    pieces.append(jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))
    return jnp.concatenate(pieces[::-1], axis=1)


def line_of(
    kv: Float[Array, "B T Dh"], past: Float[Array, "B before Dh"] | None, *, before: int
) -> Float[Array, "B before+T Dh"]:
    """On one device: the rows of a call behind those before it, which are zeros where `past` is None."""
    if past is None:
        return jnp.pad(kv, ((0, 0), (before, 0), (0, 0)))
    return jnp.concatenate([past, kv], axis=1)


@dataclasses.dataclass(frozen=True)
class LineOverMesh:
    """`line_of` for devices that have some tokens of a row each: every one gets a line of its own tokens.

    Attributes:
        placement: mesh and rules.
    """

    placement: Placement

    def __call__(
        self, kv: Float[Array, "B T Dh"], past: Float[Array, "B before Dh"] | None, *, before: int
    ) -> Float[Array, "B n*before+T Dh"]:
        """The lines of all n devices, one behind the other, for `ByDevice` with tokens; where T is not split,
        n is 1 and it is the line itself.

        Args:
            kv: rows of the call.
            past: rows before the call; None: zeros, which nobody sees.
            before: rows in front of every line, W - 1.
        """
        rows = self.placement.axes_for("B", kv.shape[0])
        axes = self.placement.axes_for("T", kv.shape[1], rows)
        if not axes:
            return line_of(kv, past, before=before)
        devices = ways(self.placement.mesh, axes)

        def own(kv: jax.Array, past: jax.Array | None) -> jax.Array:
            front = rows_before(kv, before, axes, devices)
            if past is not None:
                # Row k in front of device i is row i t + k of what was before the call, while there is one.
                start = jnp.minimum(lax.axis_index(axes) * kv.shape[1], before)
                filled = jnp.pad(past, ((0, 0), (0, before), (0, 0)))
                front = front + lax.dynamic_slice_in_dim(filled, start, before, axis=1)
            return jnp.concatenate([front, kv], axis=1)

        split = jax.shard_map(
            own,
            mesh=self.placement.mesh,
            in_specs=(PartitionSpec(rows or None, axes), PartitionSpec(rows or None)),
            out_specs=PartitionSpec(rows or None, axes),
            check_vma=False,
        )
        return split(kv, past)


@dataclasses.dataclass(frozen=True)
class CompressOverMesh:
    """`compressor.compressor`: each device makes the entries whose last token is its own.

    Attributes:
        operation: on one device.
        by_rows: where every device has whole rows.
        placement: mesh and rules.
    """

    operation: Callable[..., jax.Array]
    by_rows: ByDevice
    placement: Placement

    def __call__(self, kv: jax.Array, *operands: Any, by_tokens: bool = False, **more: Any) -> jax.Array:
        """The entries [B, P, Dc] of all tokens of a row, on every device that has some of them.

        Args:
            kv: [B, T, w, Dc].
            operands: further ones of the operation, in its order.
            by_tokens: the rows of a block are consecutive tokens, and blocks are listed in the order of their
                tokens (`span.blocks_packed`, `span.blocks_in_place`): T may then be split.
            more: operands and settings of the operation by name.
        """
        rows = self.placement.axes_for("B", kv.shape[0])
        axes = self.placement.axes_for("T", kv.shape[1], rows)
        num_blocks = more["is_first"].shape[1]
        if not by_tokens or not axes or not num_blocks:
            return self.by_rows(kv, *operands, **more)
        source = more.pop("source")
        more.pop("previous")
        gate, ape, norm, cos, sin = operands
        ratio, branches, _ = ape.shape
        if source is None:
            place = jnp.arange(num_blocks * ratio, dtype=jnp.int32).reshape(num_blocks, ratio)
            source = jnp.broadcast_to(place, (kv.shape[0], *place.shape))
        devices = ways(self.placement.mesh, axes)
        before = branches * ratio - 1
        of_block = {"cos": cos, "sin": sin, "is_first": more.pop("is_first"), "source": source}

        def own(kv, gate, ape, norm, of_block):
            tokens, here = kv.shape[1], lax.axis_index(axes)
            # Blocks do not overlap, so this many may end among t tokens.
            most = -(-tokens // ratio)
            end = of_block["source"][..., -1]
            edges = jnp.arange(devices, dtype=jnp.int32) * tokens
            first = (end[:, None] < edges[:, None]).sum(axis=-1, dtype=jnp.int32)  # [b, devices]
            number = first[:, here, None] + jnp.arange(most, dtype=jnp.int32)
            number = jnp.minimum(number, num_blocks - 1)
            chosen = {name: _taken(each, number) for name, each in of_block.items()}
            lines = [jnp.concatenate([rows_before(x, before, axes, devices), x], axis=1) for x in (kv, gate)]
            # A place in the line; those of blocks that are not this device's may be any.
            place = chosen["source"] - here * tokens + before
            within = lambda x: jnp.clip(x, 0, before + tokens - 1)  # noqa: E731
            made = self.operation(
                *(*lines, ape, norm, chosen["cos"], chosen["sin"]),
                is_first=chosen["is_first"],
                source=within(place),
                previous=within(place - ratio),
                **more,
            )
            made = lax.all_gather(made, axes, axis=1, tiled=True)
            owner = end // tokens
            behind = jnp.arange(num_blocks, dtype=jnp.int32) - jnp.take_along_axis(first, owner, axis=1)
            return _taken(made, owner * most + jnp.clip(behind, 0, most - 1))

        batch, whole = rows or None, PartitionSpec()
        split = jax.shard_map(
            own,
            mesh=self.placement.mesh,
            in_specs=(*[PartitionSpec(batch, axes)] * 2, whole, whole, PartitionSpec(batch)),
            out_specs=PartitionSpec(batch),
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(kv, gate, ape, norm, of_block)


def _taken(x: jax.Array, number: jax.Array) -> jax.Array:
    """x [b, n, ...] at number [b, k], each within 0 .. n - 1: [b, k, ...]."""
    row = jnp.arange(len(x), dtype=jnp.int32)[:, None]
    return x.at[row, number].get(mode="promise_in_bounds")
