"""Mosaic TPU kernels for `linear_cross_entropy`: the loss, and each gradient by recomputing its logits tile.

Layout: a logits tile is f32[vocabulary block, token block], vocabulary on the sublanes and tokens on the 128
lanes. Maxima and sums over the vocabulary are then elementwise vector operations, and everything there is
one of per token (ids, log-sum-exp, cotangents) is a row [1, T] without padding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.linear_cross_entropy.tuning import COLUMNS_AT_ONCE, VMEM_LIMIT, LinearCrossEntropyBlocks
from pallas_kernels.precision import product_precision

VOCAB, TOKEN = 0, 1  # axes of a logits tile


# --- the maths of one tile, shared by the three kernels ------------------------------------------------


def _factors(x: jax.Array, partner: jnp.dtype, precision: str, num_terms: int = 3) -> list[jax.Array]:
    """Terms whose sum stands for `x` in a product with a number of dtype `partner`.

    One pass of the matrix unit multiplies bfloat16 numbers exactly. A float32 number is the sum of three of
    them, so beside a bfloat16 partner three passes give the float32 product, and two leave out at most
    2^-18 of each number; two float32 factors are left to the compiler, which takes six.
    """
    if precision == "bfloat16" or x.dtype == jnp.bfloat16:
        return [x.astype(jnp.bfloat16)]
    if partner == jnp.float32:
        return [x]
    terms = []
    for _ in range(num_terms):
        terms.append(x.astype(jnp.bfloat16))
        x = x - terms[-1].astype(jnp.float32)
    return terms


def _product(lefts: list[jax.Array], rights: list[jax.Array], contract: tuple[int, int]) -> jax.Array:
    """sum(lefts) times sum(rights), summed over one axis of each, in float32."""
    total = None
    for left in lefts:
        for right in rights:
            term = lax.dot_general(
                left,
                right,
                (((contract[0],), (contract[1],)), ((), ())),
                precision=product_precision(left.dtype),
                preferred_element_type=jnp.float32,
            )
            total = term if total is None else total + term
    return total


def _logits_tile(hidden_ref, head_ref, precision: str) -> jax.Array:
    head = _factors(head_ref[...], hidden_ref.dtype, precision)
    return _product(head, _factors(hidden_ref[...], head_ref.dtype, precision), (1, 1))


def _vocab_rows(tile: jax.Array, vocab_block: jax.Array) -> jax.Array:
    """The vocabulary entry behind each number of a tile, i32."""
    return vocab_block * tile.shape[VOCAB] + lax.broadcasted_iota(jnp.int32, tile.shape, VOCAB)


def _d_logits_tile(
    logits: jax.Array, ids: jax.Array, lse: jax.Array, d_nll: jax.Array, d_lse: jax.Array, vocab: jax.Array
) -> jax.Array:
    """softmax * (d_nll + d_lse) - one_hot(ids) * d_nll, because nll = lse - logits[ids]."""
    return jnp.exp(logits - lse) * (d_nll + d_lse) - jnp.where(vocab == ids, d_nll, 0.0)


def _accumulate(
    sums_ref, d_logits, rows_ref, axis: int, block: jax.Array, num_rows: int, precision: str, num_terms: int
) -> None:
    """sums += d_logits * rows, summed over `axis` of the tile, of which `block` is the current block.

    The last block may stick out of the array. What lies there is arbitrary, NaN included, so it is
    replaced on both sides of the product: zero times NaN would not be zero.
    """
    size = d_logits.shape[axis]

    def add(d_logits: jax.Array, inside: jax.Array | None) -> None:
        lefts = _factors(d_logits, rows_ref.dtype, precision, num_terms)
        for start in range(0, sums_ref.shape[1], COLUMNS_AT_ONCE):
            columns = slice(start, min(start + COLUMNS_AT_ONCE, sums_ref.shape[1]))
            rows = rows_ref[:, columns]
            if inside is not None:
                # Through float32: not every generation selects in bfloat16.
                rows = jnp.where(inside, rows.astype(jnp.float32), 0.0).astype(rows.dtype)
            sums_ref[:, columns] += _product(lefts, _factors(rows, jnp.float32, precision), (axis, 0))

    if num_rows % size == 0:
        add(d_logits, None)
        return
    sticks_out = (block + 1) * size > num_rows

    @pl.when(jnp.logical_not(sticks_out))
    def _whole() -> None:
        add(d_logits, None)

    @pl.when(sticks_out)
    def _last() -> None:
        left = num_rows - block * size
        tile = jnp.where(lax.broadcasted_iota(jnp.int32, d_logits.shape, axis) < left, d_logits, 0.0)
        add(tile, lax.broadcasted_iota(jnp.int32, (size, 1), 0) < left)


# --- bodies --------------------------------------------------------------------------------------------


def _forward_body(
    ids_ref, hidden_ref, head_ref, nll_ref, lse_ref, max_ref, sum_ref, target_ref, *, num_vocab, precision
) -> None:
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _start() -> None:
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        target_ref[...] = jnp.zeros_like(target_ref)

    logits = _logits_tile(hidden_ref, head_ref, precision)
    vocab = _vocab_rows(logits, block)
    if num_vocab % logits.shape[VOCAB]:
        logits = jnp.where(vocab < num_vocab, logits, -jnp.inf)

    # max' = max(max, tile);  sum' = sum * e^(max - max') + sum_v e^(logit_v - max')
    largest = jnp.maximum(max_ref[...], logits.max(axis=VOCAB, keepdims=True))
    sums = jnp.exp(logits - largest).sum(axis=VOCAB, keepdims=True)
    sum_ref[...] = sum_ref[...] * jnp.exp(max_ref[...] - largest) + sums
    max_ref[...] = largest
    # An id is inside the vocabulary or -1, so no row that sticks out is ever a target.
    target_ref[...] += jnp.where(vocab == ids_ref[...], logits, 0.0).sum(axis=VOCAB, keepdims=True)

    @pl.when(block == pl.num_programs(1) - 1)
    def _finish() -> None:
        lse = max_ref[...] + jnp.log(sum_ref[...])
        lse_ref[...] = lse
        nll_ref[...] = lse - target_ref[...]


def _gradient_body(
    ids_ref, lse_ref, d_nll_ref, d_lse_ref, hidden_ref, head_ref, out_ref, sums_ref,
    *, wrt: int, num_rows: int, precision: str,
) -> None:  # fmt: skip
    """d_hidden (wrt = TOKEN) or d_head (wrt = VOCAB); `num_rows` of the axis that is summed over."""
    summed = VOCAB if wrt == TOKEN else TOKEN
    streaming = pl.program_id(1)

    @pl.when(streaming == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    logits = _logits_tile(hidden_ref, head_ref, precision)
    vocab = _vocab_rows(logits, pl.program_id(0 if wrt == VOCAB else 1))
    d_logits = _d_logits_tile(logits, ids_ref[...], lse_ref[...], d_nll_ref[...], d_lse_ref[...], vocab)
    rows_ref = head_ref if wrt == TOKEN else hidden_ref
    # A gradient that is rounded to bfloat16, by up to 2^-9, does not show 2^-18 of its terms.
    num_terms = 2 if out_ref.dtype == jnp.bfloat16 else 3
    _accumulate(sums_ref, d_logits, rows_ref, summed, streaming, num_rows, precision, num_terms)

    @pl.when(streaming == pl.num_programs(1) - 1)
    def _finish() -> None:
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


# --- calls ---------------------------------------------------------------------------------------------


def linear_cross_entropy_forward(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "1 T"],
    *,
    precision: str,
    blocks: LinearCrossEntropyBlocks,
    interpret,
) -> tuple[Float32[Array, "1 T"], Float32[Array, "1 T"]]:
    """(nll, lse). Token blocks outside, vocabulary blocks inside: `head` streams past the tokens."""
    (num_tokens, hidden_size), num_vocab = hidden.shape, head.shape[0]
    per_token = pl.BlockSpec((1, blocks.tokens), lambda t, v: (0, t))
    token_blocks = cdiv(num_tokens, blocks.tokens)
    return pl.pallas_call(
        functools.partial(_forward_body, num_vocab=num_vocab, precision=precision),
        grid=(token_blocks, cdiv(num_vocab, blocks.vocab)),
        in_specs=[
            per_token,
            pl.BlockSpec((blocks.tokens, hidden_size), lambda t, v: (t, 0)),
            pl.BlockSpec((blocks.vocab, hidden_size), lambda t, v: (v, 0)),
        ],
        out_specs=[per_token, per_token],
        out_shape=[jax.ShapeDtypeStruct((1, num_tokens), jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((1, blocks.tokens), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_tokens * num_vocab * hidden_size,
            transcendentals=num_tokens * num_vocab,
            bytes_accessed=hidden.nbytes + token_blocks * head.nbytes + 12 * num_tokens,
        ),
        interpret=interpret,
        name="linear_cross_entropy_forward",
    )(ids, hidden, head)


def _gradient(
    wrt: int,
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "1 T"],
    lse: Float32[Array, "1 T"],
    d_nll: Float32[Array, "1 T"],
    d_lse: Float32[Array, "1 T"],
    *,
    precision: str,
    blocks: LinearCrossEntropyBlocks,
    interpret,
) -> Float[Array, "rows D"]:
    """The gradient of the operand that stays while the other one streams past it."""
    (num_tokens, hidden_size), num_vocab = hidden.shape, head.shape[0]
    if wrt == TOKEN:
        stays, streams, block_rows = hidden, head, blocks.tokens
        grid = (cdiv(num_tokens, blocks.tokens), cdiv(num_vocab, blocks.vocab))
        token_block, vocab_block = (lambda i, j: i), (lambda i, j: j)
    else:
        stays, streams, block_rows = head, hidden, blocks.vocab
        grid = (cdiv(num_vocab, blocks.vocab), cdiv(num_tokens, blocks.tokens))
        token_block, vocab_block = (lambda i, j: j), (lambda i, j: i)
    per_token = pl.BlockSpec((1, blocks.tokens), lambda i, j: (0, token_block(i, j)))
    return pl.pallas_call(
        functools.partial(_gradient_body, wrt=wrt, num_rows=streams.shape[0], precision=precision),
        grid=grid,
        in_specs=[
            *[per_token] * 4,
            pl.BlockSpec((blocks.tokens, hidden_size), lambda i, j: (token_block(i, j), 0)),
            pl.BlockSpec((blocks.vocab, hidden_size), lambda i, j: (vocab_block(i, j), 0)),
        ],
        out_specs=pl.BlockSpec((block_rows, hidden_size), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(stays.shape, stays.dtype),
        scratch_shapes=[pltpu.VMEM((block_rows, hidden_size), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * num_tokens * num_vocab * hidden_size,
            transcendentals=num_tokens * num_vocab,
            bytes_accessed=2 * stays.nbytes + grid[0] * streams.nbytes + 16 * num_tokens,
        ),
        interpret=interpret,
        name="linear_cross_entropy_d_hidden" if wrt == TOKEN else "linear_cross_entropy_d_head",
    )(ids, lse, d_nll, d_lse, hidden, head)


linear_cross_entropy_d_hidden = functools.partial(_gradient, TOKEN)
linear_cross_entropy_d_head = functools.partial(_gradient, VOCAB)
