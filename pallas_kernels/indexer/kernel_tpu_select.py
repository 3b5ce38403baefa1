"""Mosaic TPU kernel of the choice: scores of a block of rows, then the exact k largest of each row.

A row's scores become integers of the same order. They stay in VMEM as two 16-bit halves, entries on the
lanes. The k-th largest is found by counting, bit by bit: first its upper half among all upper halves, then
its lower half among the entries that share the upper one. Counting follows what the rows see, not S, and
stops once every row has a cut with at most k entries at or above it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import round_up
from pallas_kernels.indexer.kernel_tpu import Scoring, chunks_before, scoring_call, split_keys, visible_in
from pallas_kernels.indexer.tuning import LANES, IndexerBlocks

NOT_ELIGIBLE = -(2**31)  # below the ordered integer of every score above -inf, in its upper half already
EXPONENT = 0x7F800000  # of a float32; without one it is 0 or subnormal
LOWEST = -(2**15)
BITS_A_CHECK = 4  # passes between two looks at whether all rows are done


def ordered(scores):
    """int32 of the same order as the scores; -0, 0 and all subnormals are one score."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where((bits & EXPONENT) == 0, 0, bits)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)  # -magnitude of negative ones


def halves(keys):
    """(upper, lower) int16 of int32 keys; the lower one shifted so that signed comparison orders it."""
    return (keys >> 16).astype(jnp.int16), (keys ^ 0x8000).astype(jnp.int16)


def _select_body(repeat_ref, ends_ref, q_ref, weights_ref, *refs, form, blocks, k):
    del repeat_ref  # only the index maps need it
    key_refs, (lo_ref, hi_ref, mask_ref, *scratch) = split_keys(refs, form)
    *scoring_scratch, upper_ref, lower_ref = scratch
    scoring = Scoring(q_ref, weights_ref, key_refs, scoring_scratch, form, blocks)
    tile, end = pl.program_id(1), ends_ref[pl.program_id(0)]
    pl.when(tile == 0)(scoring.start)

    def emit(rows, chunk, scores):
        offset = pl.multiple_of(tile * blocks.keys + chunk * blocks.chunk, blocks.chunk)
        visible = visible_in(lo_ref[rows], hi_ref[rows], offset, blocks.chunk)
        eligible = visible & (scores > -jnp.inf)  # NaN is not
        upper, lower = halves(jnp.where(eligible, ordered(scores), NOT_ELIGIBLE))
        upper_ref[rows, pl.ds(offset, blocks.chunk)] = upper
        lower_ref[rows, pl.ds(offset, blocks.chunk)] = lower

    first = tile * blocks.keys
    scoring.tile(first, end, emit)

    @pl.when((first < end) & (end < first + blocks.keys))
    def _():  # the rest of the last tile that is counted
        @pl.loop(chunks_before(end - first, blocks.keys, blocks.chunk), blocks.keys // blocks.chunk)
        def _(chunk):
            here = pl.ds(pl.multiple_of(first + chunk * blocks.chunk, blocks.chunk), blocks.chunk)
            upper_ref[:, here] = jnp.full((blocks.rows, blocks.chunk), LOWEST, jnp.int16)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        _choose(upper_ref, lower_ref, mask_ref, end, k, blocks.keys)


def _choose(upper_ref, lower_ref, mask_ref, end, k: int, chunk: int) -> None:
    """Writes the mask of the k largest (upper, lower) of each row, ties to the lowest index.

    Reads the chunks that begin before entry `end`.
    """
    rows, size = upper_ref.shape
    num_chunks = chunks_before(end, size, chunk)
    piece = next(n for n in (512, 256, LANES) if chunk % n == 0)
    each = functools.partial(_each_piece, num_chunks, chunk, piece)
    spread = functools.partial(_spread, shape=(rows, piece))
    no_sums = _spread(0, (rows, min(piece, 2 * LANES)))  # two registers' width: 16-bit pairs may lie on lanes
    refine = functools.partial(_refine, spread=spread, k=k)

    def count(holds):
        """i32[rows, 1]: entries for which holds(place of a piece) is true."""
        return _total(each(lambda here, sums: _add(sums, holds(here)), no_sums))

    lowest = jnp.full((rows, 1), LOWEST, jnp.int32)
    eligible = count(lambda here: upper_ref[:, here] > spread(LOWEST))
    upper_cut, at_least = refine(upper_ref, count, lowest, 0, eligible)
    upper_spread = spread(upper_cut)

    def narrow(here, above):  # only entries at the upper cut keep their lower half
        upper = upper_ref[:, here]
        lower_ref[:, here] = jnp.where(upper == upper_spread, lower_ref[:, here], jnp.int16(LOWEST))
        return _add(above, upper > upper_spread)

    above = _total(each(narrow, no_sums))
    lower_cut, at_least = refine(lower_ref, count, lowest, above, at_least)
    # A row that keeps all it sees: above the ineligible entries, whose lower half is the lowest.
    lower_spread = spread(jnp.where(upper_cut == LOWEST, LOWEST + 1, lower_cut))

    @pl.when(at_least.max() > k)
    def _():
        left = k - count(
            lambda here: (upper_ref[:, here] > upper_spread) | (lower_ref[:, here] > lower_spread)
        )
        _drop_late(upper_ref, lower_ref, upper_spread, lower_spread, left, each, count)

    def write(here, _):
        upper = upper_ref[:, here]
        chosen = (upper > upper_spread) | ((upper == upper_spread) & (lower_ref[:, here] >= lower_spread))
        mask_ref[:, here] = jnp.where(chosen, jnp.int16(1), jnp.int16(0)).astype(mask_ref.dtype)
        return 0

    each(write, 0)

    @pl.loop(num_chunks, size // chunk)
    def _(c):
        here = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        mask_ref[:, here] = jnp.zeros((rows, chunk), mask_ref.dtype)


def _drop_late(upper_ref, lower_ref, upper_cut, lower_cut, left, each, count) -> None:
    """Of the entries at the cut, makes all but the first `left` ineligible. Equal scores are rare."""
    num_bits = upper_ref.shape[1].bit_length()

    def is_level(here):
        return (upper_ref[:, here] == upper_cut) & (lower_ref[:, here] == lower_cut)

    def is_before(here, end):
        # Not an int16 iota: the compiler for v5 crashes on its 16-bit addition.
        lane = lax.broadcasted_iota(jnp.int32, upper_cut.shape, 1).astype(jnp.int16)
        return lane < _spread(jnp.clip(end - here.start, 0, upper_cut.shape[1]), upper_cut.shape)

    def further(step, end):
        # The greatest end with at most `left` level entries before it.
        tried = end + (jnp.int32(1) << (num_bits - 1 - step))
        return jnp.where(count(lambda here: is_level(here) & is_before(here, tried)) <= left, tried, end)

    end = lax.fori_loop(0, num_bits, further, jnp.zeros_like(left))

    def drop(here, _):
        late = is_level(here) & ~is_before(here, end)
        upper_ref[:, here] = jnp.where(late, jnp.int16(LOWEST), upper_ref[:, here])
        return 0

    each(drop, 0)


def _spread(x, shape):
    """i16[shape] from a number, or from i32[rows, 1] that fits."""
    return jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape).astype(jnp.int16)


def _add(sums, holds):
    """One more for each entry of the piece that holds."""
    ones, width = jnp.where(holds, jnp.int16(1), jnp.int16(0)), sums.shape[1]
    for offset in range(0, ones.shape[1], width):
        sums = sums + ones[:, offset : offset + width]
    return sums


def _total(sums):
    """i32[rows, 1]; a float32 sum over lanes is exact here and cheaper than an integer one."""
    return sums.astype(jnp.int32).astype(jnp.float32).sum(axis=1, keepdims=True).astype(jnp.int32)


def _each_piece(num_chunks, chunk: int, piece: int, step, carry):
    """carry = step(place of a piece, carry) over the first chunks of a row."""

    def one(c, carry):
        for offset in range(0, chunk, piece):
            carry = step(pl.ds(pl.multiple_of(c * chunk + offset, piece), piece), carry)
        return carry

    return lax.fori_loop(0, num_chunks, one, carry)


def _refine(digits_ref, count, cut, above, at_least, *, spread, k: int):
    """The greatest 16-bit cut with at least k entries at or above it, or one with at most k, for each row.

    Args:
        cut: i32[rows, 1], the lowest one.
        above: entries that rank higher than any in `digits_ref`.
        at_least: entries at or above `cut`.

    Returns:
        (cut, entries at or above it).
    """

    def bit(step, cut, at_least):
        higher = cut + (jnp.int32(1) << (15 - step))
        tried = spread(higher)
        found = above + count(lambda here: digits_ref[:, here] >= tried)
        take = found >= k
        return jnp.where(take, higher, cut), jnp.where(take, found, at_least)

    def more(state):
        step, _, at_least = state
        return (step < 16) & (at_least.max() > k)

    def bits(state):
        step, cut, at_least = state
        for i in range(BITS_A_CHECK):
            cut, at_least = bit(step + i, cut, at_least)
        return step + BITS_A_CHECK, cut, at_least

    return lax.while_loop(more, bits, (jnp.int32(0), cut, at_least))[1:]


def index_select_fwd(
    q, weights, keys, lo, hi, repeat, *, k: int, blocks: IndexerBlocks, vmem_limit: int, interpret
) -> jax.Array:
    """i8 or i32 [rows, S rounded up]: 1 where chosen; operands as in `scoring_call`."""
    num_rows, padded = q.shape[0], round_up(keys.shape[-2], blocks.keys)
    half = pltpu.VMEM((blocks.rows, padded), jnp.int16)
    return scoring_call(
        functools.partial(_select_body, k=k),
        *(q, weights, keys, lo, hi, repeat),
        blocks=blocks,
        scratch_shapes=[half, half],
        # One buffer: the mask leaves once a block of rows.
        out_specs=pl.BlockSpec(
            (blocks.rows, padded), lambda r, s, *_: (r, 0), pipeline_mode=pl.Buffered(buffer_count=1)
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, padded), jnp.int8 if blocks.mask_bytes == 1 else jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        interpret=interpret,
        name="index_select_fwd",
    )
