"""Index keys of every format as the kernels see them: operands, block specs, products with a tile.

Quantised keys never exist decoded in HBM. What has a last axis shorter than the 128 lanes is taken with the
entries last: mxfp4 as [.., Di / 2, S], scales as [.., 1, S] and [.., Di / 32, S]. XLA lays such arrays out
that way by itself, so the transposition moves nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.formats import e2m1, e8m0
from pallas_kernels.formats.blocks import Format, Mxfp4
from pallas_kernels.formats.index_keys import Fp8Keys, Keys
from pallas_kernels.formats.sizes import FP4_GROUP
from pallas_kernels.precision import product_precision


def operands(keys: Keys) -> tuple[jax.Array, ...]:
    """The arrays a kernel takes for a stack of keys [R, B, S, Di]."""
    if isinstance(keys, Fp8Keys):
        return keys.values, jnp.swapaxes(keys.scales, -1, -2)
    if isinstance(keys, Mxfp4):
        return jnp.swapaxes(keys.packed, -1, -2), jnp.swapaxes(keys.scale, -1, -2)
    return (keys,)


def block_specs(form: Format, width: int, sequences: int, num_keys: int, where) -> list[pl.BlockSpec]:
    """Block specs of `operands`; `where` maps grid indices to (repeat, block of sequences, tile)."""

    def entries_first(*grid):
        repeat, block, tile = where(*grid)
        return repeat, block, tile, 0

    def entries_last(*grid):
        repeat, block, tile = where(*grid)
        return repeat, block, 0, tile

    rows = pl.BlockSpec((None, sequences, num_keys, width), entries_first)
    columns = lambda size: pl.BlockSpec((None, sequences, size, num_keys), entries_last)  # noqa: E731
    if form == "mxfp4":
        return [columns(width // 2), columns(width // FP4_GROUP)]
    return [rows, columns(1)] if form == "fp8" else [rows]


def in_key_order(q: jax.Array, form: Format) -> jax.Array:
    """Queries with the dimensions in the order in which a tile of this format decodes them."""
    return jnp.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1) if form == "mxfp4" else q


def products(q, keys, contract: int = 1):
    """f32[rows of q, keys]: every query row with every key; `contract` is the keys' axis of dimensions."""
    if q.dtype == jnp.float32:
        keys = keys.astype(jnp.float32)
    dims, precision = (((1,), (contract,)), ((), ())), product_precision(q.dtype)
    return lax.dot_general(q, keys, dims, precision=precision, preferred_element_type=jnp.float32)


def tile_products(q, key_refs, sequence, here, form: Format):
    """f32[rows of q, keys]: products with the keys `here`, short of the factor in `tile_scale`."""
    if form != "mxfp4":
        return products(q, key_refs[0][sequence, here])
    return products(q, unpack(*(ref[sequence, :, here] for ref in key_refs)), contract=0)


def tile_scale(key_refs, sequence, here, form: Format):
    """What the products of these keys lack: a factor of each key, f32[1, keys], or one for all, or None.

    It is positive, so it may follow the ReLU and the sum over heads.
    """
    if form == "fp8":
        return key_refs[1][sequence, :, here]
    return e2m1.OF_PLACED if form == "mxfp4" else None


def unpack(values, scales):
    """bf16[Di, keys] / 2^14 from u8[Di / 2, keys] and u8[Di / 32, keys]: even dimensions, then odd ones.

    The numbers placed in E5M2 are converted exactly, and a product with a power of two is exact.
    """
    low, high = e2m1.e5m2(values)
    exponents = scales.astype(jnp.int32)
    powers = e8m0.normal_value(exponents)
    powers = jnp.where(exponents == 255, jnp.nan, powers).astype(jnp.bfloat16)
    half_groups = [
        jnp.broadcast_to(powers[g : g + 1], (FP4_GROUP // 2, powers.shape[1])) for g in range(powers.shape[0])
    ]
    powers = jnp.concatenate(half_groups, axis=0)
    return jnp.concatenate([x.astype(jnp.bfloat16) * powers for x in (low, high)], axis=0)
