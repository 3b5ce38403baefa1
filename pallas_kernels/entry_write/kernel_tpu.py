"""Mosaic TPU kernel of `write_entries`.

Layout: a block of entries a grid step, 128 columns of a turned array, or 32 rows. The blocks that a
sequence's new entries touch are read, changed and written back to where they came from; nothing else of the
stack moves. New entries come in blocks that are aligned with the stack's. Numbers are words of 32 bits here:
the choice between old and new then compares no narrow numbers, and no bit of any number changes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv, quotient, remainder
from pallas_kernels.formats.columns import LANES

ROWS = 32
"""Rows of a block: those of a tile of 8-bit numbers, and whole tiles of wider ones."""


def write(leaves, repeat, new, first, count, *, turned: tuple[bool, ...], interpret):
    """The arrays after the writes; one call for those that are turned, one for the others."""
    written = list(leaves)
    for way in sorted(set(turned)):
        numbers = [number for number, own in enumerate(turned) if own == way]
        call = _call([leaves[n] for n in numbers], [new[n] for n in numbers], way, interpret)
        for number, array in zip(numbers, call(repeat, first, count), strict=True):
            written[number] = array
    return written


def aligned(new: jax.Array, first: jax.Array, unit: int) -> jax.Array:
    """[B, P, C] -> [B, blocks x unit, C]: place t holds new entry t - first mod unit, where there is one."""
    batch, num_new, width = new.shape
    size = num_blocks(num_new, unit) * unit
    if num_new == 1:
        return jnp.broadcast_to(new, (batch, size, width))
    source = jnp.arange(size, dtype=jnp.int32) - remainder(first, unit)[:, None]
    return jnp.take_along_axis(new, jnp.clip(source, 0, num_new - 1)[..., None], axis=1)


def num_blocks(num_new: int, unit: int) -> int:
    """Blocks that so many consecutive entries can touch, wherever they begin."""
    return (num_new + unit - 2) // unit + 1


def _call(leaves, new, turned: bool, interpret):
    unit = LANES if turned else ROWS
    batch, num_new = new[0].shape[:2]
    last = cdiv(leaves[0].shape[3 if turned else 2], unit) - 1

    def whole(leaf):
        return (leaf.shape[2], unit) if turned else (unit, leaf.shape[3])

    def in_stack(b, j, repeat, first, count):
        block = jnp.minimum(quotient(first[b], unit) + j, np.int32(last))
        return (repeat[0], b, 0, block) if turned else (repeat[0], b, block, 0)

    def in_new(b, j, repeat, first, count):
        return (b, 0, j) if turned else (b, j, 0)

    stacks = [pl.BlockSpec((None, None, *whole(leaf)), in_stack) for leaf in leaves]
    added = [pl.BlockSpec((None, *whole(leaf)), in_new) for leaf in leaves]
    grid = (batch, num_blocks(num_new, unit))
    block_bytes = sum(np.prod(whole(leaf)) * leaf.dtype.itemsize for leaf in leaves)

    def run(repeat, first, count):
        laid_out = [aligned(x, first, unit) for x in new]
        if turned:
            laid_out = [jnp.swapaxes(x, 1, 2) for x in laid_out]
        return pl.pallas_call(
            functools.partial(_body, turned=turned, last=last),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3, grid=grid, in_specs=stacks + added, out_specs=stacks
            ),
            out_shape=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
            input_output_aliases={3 + number: number for number in range(len(leaves))},
            cost_estimate=pl.CostEstimate(
                flops=0, transcendentals=0, bytes_accessed=int(3 * np.prod(grid) * block_bytes)
            ),
            interpret=interpret,
            name="entry_write",
        )(repeat[None], first, count, *leaves, *laid_out)

    return run


def _body(repeat_ref, first_ref, count_ref, *refs, turned: bool, last: int):
    del repeat_ref  # only the index maps need it
    num = len(refs) // 3
    b, j = pl.program_id(0), pl.program_id(1)
    unit = refs[0].shape[1 if turned else 0]
    wanted = quotient(first_ref[b], unit) + j
    block = jnp.minimum(wanted, np.int32(last))

    # Beyond the last block, the step before has written it already; what it left stands.
    @pl.when((j == 0) | (wanted <= last))
    def _():
        for old, new, out in zip(refs[:num], refs[num : 2 * num], refs[2 * num :], strict=True):
            start = first_ref[b] - block * unit
            words = [pltpu.bitcast(ref[...], jnp.int32) for ref in (old, new)]
            mask = _mask(words[0].shape, start, start + count_ref[b], old.dtype.itemsize, turned)
            merged = (words[0] & ~mask) | (words[1] & mask)
            out[...] = pltpu.bitcast(merged, out.dtype)


def _mask(shape, start, end, itemsize: int, turned: bool):
    """i32 words with the bits of entries start .. end - 1 of the block."""
    if turned:
        at = lax.broadcasted_iota(jnp.int32, shape, 1)
        return jnp.where((at >= start) & (at < end), np.int32(-1), np.int32(0))
    per_word = 4 // itemsize
    at = lax.broadcasted_iota(jnp.int32, shape, 0) * per_word
    mask = jnp.zeros(shape, jnp.int32)
    for part in range(per_word):
        bits = np.int32(np.uint32((2 ** (8 * itemsize) - 1) << (8 * itemsize * part)).astype(np.int32))
        inside = (at + part >= start) & (at + part < end)
        mask = mask | jnp.where(inside, bits, np.int32(0))
    return mask
