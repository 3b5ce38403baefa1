"""Sums over devices of what each of them has a part of, inside a shard_map, and their gradients.

A sum that goes back to rows (`scattered`) is an all_to_all of the parts, in their dtype, and an addition in
float32 in the order of the devices: the same bytes as a reduce-scatter of that dtype. `lax.psum_scatter` is
no such thing on every mesh: compiled for v6e over all sixteen chips of a 4 x 4 slice, over one axis of the
mesh or two, it came out as an all-reduce of all rows and a slice, whatever their number and dtype, and so it
did over two chips where fewer than eight rows were left to each. And an all-reduce of float32 numbers that
come from bfloat16 ones, and become such again, XLA makes in bfloat16; a local addition stays what it is.

A sum that is whole on every device (`whole`) is given to all of them, so the gradient that comes back is
whole there too, and nothing is to be added: differentiated by itself, `lax.psum` would add it up once more.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def scattered(y: Float[Array, "n*t ..."], axes: tuple[str, ...]) -> Float32[Array, "t ..."]:
    """The sum over the devices along `axes` of the rows that are this device's, in the order of the devices.

    Args:
        y: this device's part of all rows.
        axes: of the mesh; none: y itself.
    """
    if not axes:
        return y.astype(jnp.float32)
    devices = lax.psum(1, axes)

    @jax.custom_vjp
    def scatter(y):
        parts = lax.all_to_all(y.reshape(devices, -1, *y.shape[1:]), axes, 0, 0, tiled=True)
        return parts.sum(axis=0, dtype=jnp.float32)

    scatter.defvjp(
        lambda y: (scatter(y), None),
        lambda _, dy: (lax.all_gather(dy.astype(y.dtype), axes, tiled=True),),
    )
    return scatter(y)


def whole(y: Float[Array, "rows ..."], axes: tuple[str, ...]) -> Float[Array, "rows ..."]:
    """The sum over the devices along `axes`, in float32 and then rounded to the dtype of y, on each of them.

    It must leave the shard_map as it is, whole over these axes: its gradient on each device is then the same
    share of the whole one.

    Args:
        y: this device's part.
        axes: of the mesh; none: y itself.
    """
    if not axes:
        return y
    devices = lax.psum(1, axes)

    @jax.custom_vjp
    def add(y):
        narrow, rows = y.dtype != jnp.float32, y.reshape(-1, y.shape[-1])
        if narrow and len(rows) % devices == 0:
            own = scattered(rows, axes).astype(y.dtype)
            return lax.all_gather(own, axes, tiled=True).reshape(y.shape)
        return lax.psum(y.astype(jnp.float32), axes).astype(y.dtype)

    add.defvjp(lambda y: (add(y), None), lambda _, dy: (dy * devices,))
    return add(y)
