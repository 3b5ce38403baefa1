"""How a cache keeps window rows, compressed entries and indexer keys (report, section 2.3.4 and 3.5).

    format        window rows and entries                              bytes   indexer keys            bytes
    "plain"       the cache dtype                                  2 or 4 Dh   the cache dtype     2 or 4 Di
    "fp8+fp8"     FP8 by 64 channels, rotary channels bfloat16           584   FP8, one scale            132
    "fp8+mxfp4"   the same                                               584   FP4 by 32 channels         68

(bytes at Dh = 512, Dr = 64, Di = 128). What is stored is a grid, and the model rounds to that grid before it
attends, with a cache or without: prefill sees the values that decode will read. Storing a rounded value and
reading it back is then exact. Formats are those of the kernel families.

A cache may keep the FP8 and bfloat16 numbers as unsigned integers with the same bits (`bits`). XLA:CPU has no
slices and no updates of such types: it converts a whole stack to a wider type and back for each of them.
Kernels take the numbers themselves; on a TPU a change of type would be a pass over the stack. Where they
fetch FP8 entries one by one, the cache keeps those as rows of words (`Fp8Rows`), at 585.2 bytes for 584; what
they stream, as `Columns`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt16

from dsv4_jax.numerics import formats, qat
from pallas_kernels.arithmetic import cdiv, round_up
from pallas_kernels.columns import Columns, columns_of
from pallas_kernels.decode_attention import Fp8Entries, Fp8Rows
from pallas_kernels.indexer import Fp8Keys, Mxfp4Keys
from pallas_kernels.precision import einsum_float32

CacheFormat = Literal["plain", "fp8+fp8", "fp8+mxfp4"]
CACHE_FORMATS: tuple[CacheFormat, ...] = ("plain", "fp8+fp8", "fp8+mxfp4")

Stored = Any
"""An array [..., width], or one of the formats' tuples of arrays, all with the same leading axes."""

SCALE_BYTES = 8
"""An entry's scales are padded to whole multiples of it: 7 and one pad byte at Dh = 512."""


def store_entries(x: Float[Array, "*rows Dh"], format: CacheFormat, num_rotary: int) -> Stored:
    """Window rows or compressed entries as the cache keeps them; plain ones as they are."""
    if format == "plain":
        return x
    still = x.shape[-1] - num_rotary
    groups = cdiv(still, qat.ENTRY_GROUP)
    padded = _padded(x[..., :still], groups * qat.ENTRY_GROUP)
    quantised = formats.quantize_fp8_groups(padded, qat.ENTRY_GROUP)
    return Fp8Entries(
        quantised.elements[..., :still],
        _padded(quantised.scale, round_up(groups, SCALE_BYTES)),
        x[..., still:].astype(jnp.bfloat16),
    )


def store_keys(x: Float[Array, "*rows Di"], format: CacheFormat) -> Stored:
    """Indexer keys, transformed already, as the cache keeps them."""
    if format == "plain":
        return x
    if format == "fp8+fp8":
        quantised = formats.quantize_fp8_groups(x, x.shape[-1])
        return Fp8Keys(quantised.elements, formats.scale_value(quantised.scale))
    groups = cdiv(x.shape[-1], formats.FP4_GROUP)
    quantised = formats.quantize_mxfp4(_padded(x, groups * formats.FP4_GROUP))
    return Mxfp4Keys(quantised.packed[..., : cdiv(x.shape[-1], 2)], quantised.scale)


def in_columns(stored: Stored) -> Stored:
    """A stack of entries or keys as kernels read it: narrow arrays with the entries on the last axis.

    Plain ones stay: their rows fill whole tiles. FP8 keys do too, but for their scales.
    """
    if is_plain(stored):
        return stored
    return columns_of(stored, keep_rows=(0,) if isinstance(stored, Fp8Keys) else ())


def in_rows(stored: Stored) -> Stored:
    """The same stack as operations take it, with every array [R, B, S, ...]."""
    return stored.rows if isinstance(stored, Columns) else stored


def is_plain(stored: Stored) -> bool:
    """Whether these are numbers of the cache dtype."""
    return not isinstance(stored, tuple | Fp8Rows | Columns)


NUMBERS_OF_BITS = {jnp.dtype("uint8"): jnp.float8_e4m3fn, jnp.dtype("uint16"): jnp.bfloat16}
BITS_OF_NUMBERS = {jnp.dtype(numbers): bits for bits, numbers in NUMBERS_OF_BITS.items()}


def bits(stored: Stored) -> Stored:
    """The same with unsigned integers in place of FP8 and bfloat16 numbers; float32 arrays as they are."""
    return jax.tree.map(lambda leaf: as_stored(leaf, BITS_OF_NUMBERS.get(leaf.dtype, leaf.dtype)), stored)


def as_stored(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x for an array of the cache: numbers for unsigned integers are rounded to theirs and become bits."""
    if jnp.issubdtype(dtype, jnp.unsignedinteger) and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x.astype(NUMBERS_OF_BITS[jnp.dtype(dtype)]), dtype)
    return x.astype(dtype)


def read(stored: Stored, dtype: jax.typing.DTypeLike) -> Float[Array, "*rows width"]:
    """What `store_entries` or `store_keys` stored, be it numbers or `bits`."""
    if is_plain(stored):
        return (_bfloat16_value(stored) if stored.dtype == jnp.uint16 else stored).astype(dtype)
    stored = bits(stored)
    if isinstance(stored, Fp8Entries):
        still = stored.values.shape[-1]
        width = still + stored.rotary.shape[-1]
        scale = jnp.repeat(formats.scale_value(stored.scales), qat.ENTRY_GROUP, axis=-1)[..., :still]
        values = formats.e4m3_value(_padded(stored.values, width)) * _padded(scale, width)
        rotary = jnp.pad(stored.rotary, [(0, 0)] * (stored.rotary.ndim - 1) + [(still, 0)])
        rotary = _bfloat16_value(rotary)
        # A choice is one loop over the result; joining the two parts would first make each of them.
        return jnp.where(jnp.arange(width, dtype=jnp.int32) < still, values, rotary).astype(dtype)
    if isinstance(stored, Fp8Keys):
        return (formats.e4m3_value(stored.values) * stored.scales).astype(dtype)
    assert isinstance(stored, Mxfp4Keys)
    both = jnp.stack(_mxfp4_halves(stored, dtype), axis=-1)
    return both.reshape(*both.shape[:-2], -1)


def _bfloat16_value(bits: UInt16[Array, "*s"]) -> Float32[Array, "*s"]:
    """A bfloat16 number is the upper half of a float32."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def products(q: Float[Array, "B N Di"], keys: Stored) -> Float32[Array, "B N S"]:
    """q . k in float32 for keys [B, S, ...] as they are stored."""

    def product(q: jax.Array, k: jax.Array) -> jax.Array:
        return einsum_float32("bnd,bsd->bns", q, k)

    if isinstance(keys, Mxfp4Keys):
        # Interleaving the numbers of a byte costs several times their decoding.
        even, odd = _mxfp4_halves(keys, q.dtype)
        return product(q[..., 0::2], even) + product(q[..., 1::2], odd)
    return product(q, read(keys, q.dtype))


def _mxfp4_halves(keys: Mxfp4Keys, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The even and the odd channels of keys, each [..., Di / 2]."""
    width = keys.values.shape[-1]
    packed = _padded(keys.values, keys.scales.shape[-1] * formats.FP4_GROUP // 2)
    even, odd = formats.e2m1_halves(packed)
    return tuple(_scaled(x, keys.scales, dtype)[..., :width] for x in (even, odd))  # type: ignore[return-value]


def _scaled(values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Values [..., C] times E8M0 scales [..., groups]."""
    grouped = values.reshape(*scales.shape, -1) * formats.scale_value(scales)[..., None]
    return grouped.astype(dtype).reshape(values.shape)


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


def _padded(x, width):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
