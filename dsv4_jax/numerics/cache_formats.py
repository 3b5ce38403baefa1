"""How a cache keeps window rows, compressed entries and indexer keys (report, section 2.3.4 and 3.5).

    format        window rows and entries                              bytes   indexer keys            bytes
    "plain"       the cache dtype                                  2 or 4 Dh   the cache dtype     2 or 4 Di
    "fp8+fp8"     FP8 by 64 channels, rotary channels bfloat16           584   FP8, one scale            132
    "fp8+mxfp4"   the same                                               584   FP4 by 32 channels         68

(bytes at Dh = 512, Dr = 64, Di = 128). What is stored is a grid, and the model rounds to that grid before it
attends, with a cache or without: prefill sees the values that decode will read. Storing a rounded value and
reading it back is then exact. Formats are those of the kernel families.

Arrays of a cache may hold these as other types with the same bits; see `cache_storage`.
"""

import functools
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Float32

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats import e8m0
from pallas_kernels.formats.bits import bfloat16_value
from pallas_kernels.formats.blocks import Mxfp4, padded, quantize_fp8_groups, quantize_mxfp4
from pallas_kernels.formats.columns import Columns
from pallas_kernels.formats.entries import Fp8Entries, quantize_entries
from pallas_kernels.formats.entry_rows import Fp8Rows
from pallas_kernels.formats.index_keys import Fp8Keys
from pallas_kernels.formats.sizes import FP4_GROUP
from pallas_kernels.precision import einsum_float32

CacheFormat = Literal["plain", "fp8+fp8", "fp8+mxfp4"]
CACHE_FORMATS: tuple[CacheFormat, ...] = ("plain", "fp8+fp8", "fp8+mxfp4")

Stored = Any
"""An array [..., width], or one of the formats' tuples of arrays, all with the same leading axes."""


def store_entries(x: Float[Array, "*rows Dh"], format: CacheFormat, num_rotary: int) -> Stored:
    """Window rows or compressed entries as the cache keeps them; plain ones as they are."""
    if format == "plain":
        return x
    return quantize_entries(x, num_rotary)


def store_keys(x: Float[Array, "*rows Di"], format: CacheFormat) -> Stored:
    """Indexer keys, transformed already, as the cache keeps them."""
    if format == "plain":
        return x
    if format == "fp8+fp8":
        quantised = quantize_fp8_groups(x, x.shape[-1])
        return Fp8Keys(quantised.elements, e8m0.value(quantised.scale))
    groups = cdiv(x.shape[-1], FP4_GROUP)
    quantised = quantize_mxfp4(padded(x, groups * FP4_GROUP))
    return Mxfp4(quantised.packed[..., : cdiv(x.shape[-1], 2)], quantised.scale)


def is_plain(stored: Stored) -> bool:
    """Whether these are numbers of the cache dtype."""
    return not isinstance(stored, Fp8Entries | Fp8Keys | Mxfp4 | Fp8Rows | Columns)


def read(stored: Stored, dtype: jax.typing.DTypeLike) -> Float[Array, "*rows width"]:
    """What `store_entries` or `store_keys` stored, be it numbers or `bits`."""
    if not is_plain(stored):
        return stored.dequantize(dtype)
    return (bfloat16_value(stored) if stored.dtype == "uint16" else stored).astype(dtype)


def products(q: Float[Array, "B N Di"], keys: Stored) -> Float32[Array, "B N S"]:
    """q . k in float32 for keys [B, S, ...] as they are stored."""

    def product(q: jax.Array, k: jax.Array) -> jax.Array:
        return einsum_float32("bnd,bsd->bns", q, k)

    if isinstance(keys, Mxfp4):
        # Interleaving the numbers of a byte costs several times their decoding.
        even, odd = keys.halves(q.dtype)
        return product(q[..., 0::2], even) + product(q[..., 1::2], odd)
    return product(q, read(keys, q.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def round_entries(
    x: Float[Array, "*rows Dh"], format: CacheFormat, num_rotary: int
) -> Float[Array, "*rows Dh"]:
    """x as it will be read back; gradient 1."""
    return read(store_entries(x, format, num_rotary), x.dtype)


round_entries.defvjp(lambda x, format, n: (round_entries(x, format, n), None), lambda f, n, _, d_y: (d_y,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_keys(x: Float[Array, "*rows Di"], format: CacheFormat) -> Float[Array, "*rows Di"]:
    """x as it will be read back; gradient 1."""
    return read(store_keys(x, format), x.dtype)


round_keys.defvjp(lambda x, format: (round_keys(x, format), None), lambda f, _, d_y: (d_y,))
