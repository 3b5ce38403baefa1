"""Gradients that devices of a data-parallel mesh exchange in bfloat16, rounded stochastically.

Report, section 3.4.1: gradients are synchronised in bfloat16 with stochastic rounding; the reduction is an
all-to-all and a sum in float32 on the device, so that no sum is rounded. Elsewhere in this package nobody
writes a reduction: a step is one program over all devices, and the compiler adds gradients where it finds
partial sums, in the dtype that they have. To say what travels, the devices must be told apart. Here that is
done with the whole model inside a `shard_map` over "data", which therefore must be the only axis of the mesh:
operations that themselves split experts, heads or tokens over other axes cannot be nested in it.

A device sends 2 bytes for each parameter and receives as many, and then 4 for the sums: 6 instead of the 8 of
an all-reduce in float32.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray, UInt32

from sharding.mesh import AXES

AXIS = "data"
Measured = TypeVar("Measured")


def mesh_problem(sizes: dict[str, int]) -> str | None:
    """What is wrong with a mesh for this exchange; None for one that splits batches alone.

    Args:
        sizes: of the axes that are named.
    """
    others = [f"{axis}={size}" for axis, size in sizes.items() if axis != AXIS and size > 1]
    if others:
        return f"{', '.join(others)} must be 1: gradients are exchanged in bfloat16 over data alone"
    if sizes.get(AXIS, 1) < 2:
        return "data must be at least 2, for gradients to be exchanged"
    return None


def stochastically_rounded(
    x: Float32[Array, "..."], key: PRNGKeyArray | UInt32[Array, "2"]
) -> BFloat16[Array, "..."]:
    """One of the two bfloat16 neighbours of each number, with chances that make their mean the number.

    What bfloat16 can say is kept, and so are infinities and NaN. Numbers beyond its largest may become
    infinite, as by any rounding.
    """
    words = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # The lower half of the word is the share of the way to the next number, of either sign.
    upper = ((words + noise) >> 16).astype(jnp.uint16)
    return jnp.where(jnp.isfinite(x), lax.bitcast_convert_type(upper, jnp.bfloat16), x.astype(jnp.bfloat16))


def exchanged(gradient: jax.Array, key: PRNGKeyArray, devices: int) -> jax.Array:
    """The sum of an array over the devices of the axis, the same bits on each; inside a `shard_map`.

    Args:
        gradient: this device's part of the sum, of any shape and float dtype.
        key: the same on all devices; each draws its own numbers from it.
        devices: of the axis.

    Returns:
        The shape and dtype of `gradient`; summed in float32, in the order of the devices.
    """
    flat = gradient.astype(jnp.float32).reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % devices)).reshape(devices, -1)
    rounded = stochastically_rounded(flat, jax.random.fold_in(key, lax.axis_index(AXIS)))
    # As integers, which no compiler widens on their way.
    words = lax.all_to_all(lax.bitcast_convert_type(rounded, jnp.uint16), AXIS, 0, 0, tiled=True)
    parts = lax.bitcast_convert_type(words, jnp.bfloat16).astype(jnp.float32)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    whole = lax.all_gather(total, AXIS, tiled=True)
    return whole[: math.prod(gradient.shape)].reshape(gradient.shape).astype(gradient.dtype)


def over_data(
    differentiate: Callable[..., tuple[Any, Measured]],
    mesh: Mesh,
    key: PRNGKeyArray,
    whole: tuple,
    batch: Any,
    experts: jax.Array | None,
) -> tuple[Any, Measured]:
    """Gradients and measurements of a batch whose rows are split over the devices of a mesh.

    Args:
        differentiate: (whole, rows of the batch, their experts) -> gradients and what was measured, both
            shares of those of the batch; without a mesh.
        mesh: with one axis larger than 1, "data".
        key: of the rounding, another one for each step.
        whole: what every device has.
        batch: arrays [B, ...]; B must be a multiple of the devices.
        experts: [layers, B, T, Ke] or None.

    Raises:
        ValueError: for another mesh.
    """
    if problem := mesh_problem(dict(mesh.shape)):
        raise ValueError(f"mesh {dict(mesh.shape)}: {problem}")
    devices = mesh.shape[AXIS]

    def own(key: PRNGKeyArray, whole: tuple, batch: Any, experts: jax.Array | None) -> tuple[Any, Measured]:
        gradients, measured = differentiate(whole, batch, experts)
        leaves, structure = jax.tree.flatten(gradients)
        leaves = [exchanged(leaf, jax.random.fold_in(key, at), devices) for at, leaf in enumerate(leaves)]
        return structure.unflatten(leaves), lax.psum(measured, AXIS)

    everywhere, rows = PartitionSpec(), PartitionSpec(AXIS)
    split = jax.shard_map(
        own,
        mesh=mesh,
        axis_names=set(AXES),
        in_specs=(everywhere, everywhere, rows, PartitionSpec(None, AXIS)),
        out_specs=(everywhere, everywhere),
        check_vma=False,  # what is gathered is the same everywhere, which is not found out
    )
    return split(key, whole, batch, experts)
