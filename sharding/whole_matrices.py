"""Functions of whole matrices whose parts lie on several devices: each device gets some of them whole.

A stack of matrices is split by rows or columns, as parameters are over fsdp. Splitting the work of a function
of whole matrices, such as Muon's iteration, needs another layout: only the axis that numbers the matrices is
split. One all-to-all makes it, each device then has everything that its matrices need, and one all-to-all
gives the results back.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

DimAxes = tuple[tuple[str, ...], ...]
"""Of each dim of a matrix, the mesh axes that it is split over."""


def on_whole_matrices(
    function: Callable[[jax.Array], jax.Array],
    parts: jax.Array,
    axes: DimAxes,
    sizes: Sequence[Sequence[int]],
) -> jax.Array:
    """`function` of whole matrices, inside a shard_map, where this device has a part of each.

    A number of matrices that the devices do not divide is filled up with zero matrices.

    Args:
        function: of [K, *dims]; it treats each of the K matrices alone and keeps the shape.
        parts: [K, *own dims], this device's part of each of K matrices.
        axes: the mesh axes that each dim of a matrix is split over.
        sizes: of those axes, one number an axis.

    Returns:
        This device's part of each result, as `parts`.
    """
    names = tuple(axis for dim in axes for axis in dim)
    shares = [math.prod(each) for each in sizes]
    devices = math.prod(shares)
    if devices == 1:
        return function(parts)
    count, *own = parts.shape
    filled = jnp.pad(parts, ((0, -count % devices), *((0, 0) for _ in own)))
    sent = filled.reshape(devices, -1, *own)
    # [each dim's share, K / devices, *own] <-> [K / devices, *(share, own)]
    received = _exchanged(sent, names).reshape(*shares, -1, *own)
    order = [len(shares)]
    for dim in range(len(own)):
        order += [dim, len(shares) + 1 + dim]
    whole = received.transpose(order)
    results = function(whole.reshape(whole.shape[0], *(a * b for a, b in zip(shares, own, strict=True))))
    back = results.reshape(whole.shape).transpose([order.index(axis) for axis in range(len(order))])
    returned = _exchanged(back.reshape(sent.shape), names)
    return returned.reshape(filled.shape)[:count]


def _exchanged(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """[device to, ...] -> [device from, ...]; devices are counted with the last axis fastest."""
    return jax.lax.all_to_all(x, names, split_axis=0, concat_axis=0, tiled=False)
