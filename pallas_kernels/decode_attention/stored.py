"""Ring rows and compressed entries of every format as the kernels read them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.arithmetic import quotient
from pallas_kernels.formats import e8m0
from pallas_kernels.formats.entries import Fp8Entries
from pallas_kernels.formats.entry_rows import Fp8Rows
from pallas_kernels.formats.sizes import ENTRY_GROUP
from pallas_kernels.precision import product_precision

Entries = Float[Array, "R B S Dh"] | Fp8Entries | Fp8Rows


def decoded(entries: Entries) -> Float[Array, "R B S Dh"]:
    """FP8 entries as float32, others as they are. The definition of the format."""
    if isinstance(entries, Fp8Rows):
        entries = entries.entries()
    return entries.dequantize(jnp.float32) if isinstance(entries, Fp8Entries) else entries


def channels_first(entries: Entries) -> tuple[jax.Array, ...]:
    """What a kernel reads: rows as they are, fp8 with entries on the last axis.

    With entries on the lanes a scale is broadcast along sublanes, which costs nothing, and none of the
    three arrays has a padded last axis. XLA lays them out that way by itself, so this moves no data.
    """
    if isinstance(entries, Fp8Entries):
        return tuple(jnp.swapaxes(x, 2, 3) for x in entries)
    return (entries,)


def decoded_tile(
    values: Float[Array, "Dh-Dr N"], scales: UInt8[Array, "scale_bytes N"], rotary: Array, dtype: jnp.dtype
) -> Float[Array, "Dh N"]:
    """A tile of fp8 entries; exact in bfloat16: e4m3 has fewer bits, and the scale is a power of two."""
    grouped = values.astype(dtype).reshape(-1, ENTRY_GROUP, values.shape[1])
    still = grouped * e8m0.normal_value(scales).astype(dtype)[: grouped.shape[0], None, :]
    return jnp.concatenate([still.reshape(values.shape), rotary.astype(dtype)], axis=0)


def ring_parts(ring: Entries) -> tuple[jax.Array, ...]:
    """What a kernel reads of a ring: rows as they are; of fp8, scales and rotated channels turned.

    A ring is so short that XLA keeps its values row by row and turns only the two narrow arrays by itself,
    so this moves no data either.
    """
    if isinstance(ring, Fp8Entries):
        return ring.values, jnp.swapaxes(ring.scales, 2, 3), jnp.swapaxes(ring.rotary, 2, 3)
    return (ring,)


def decoded_ring(parts: Sequence[jax.Array], dtype: jnp.dtype) -> Float[Array, "M Dh"]:
    """The rows of one sequence from its `ring_parts`; exact, as `decoded_tile`."""
    if len(parts) == 1:
        return parts[0]
    values, scales, rotary = parts
    still, num_rotary = values.shape[1], rotary.shape[0]
    width, num_groups = still + num_rotary, still // ENTRY_GROUP
    channel = jax.lax.broadcasted_iota(jnp.int32, (num_groups + num_rotary, width), 1)
    # Group by group, then one rotated channel after the other.
    place = jnp.where(channel < still, quotient(channel, ENTRY_GROUP), channel - still + num_groups)
    ones = (place == jax.lax.broadcasted_iota(jnp.int32, place.shape, 0)).astype(dtype)
    factors = _turned(e8m0.normal_value(scales)[:num_groups].astype(dtype), ones[:num_groups])
    turned = _turned(rotary.astype(dtype), ones[num_groups:])
    # Channels that are not there have no factor, and the others no rotated value: nothing is rounded.
    whole = jnp.pad(values.astype(jnp.float32), ((0, 0), (0, num_rotary)))
    return (whole * factors + turned).astype(dtype)


def _turned(x: Float[Array, "n M"], ones: Float[Array, "n Dh"]) -> Float32[Array, "M Dh"]:
    """Each channel's one row of x, as a column: every sum has one term that is not zero."""
    return jax.lax.dot_general(
        x,
        ones,
        (((0,), (0,)), ((), ())),
        precision=product_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
