"""Gradients of the index scores on a TPU; products are recomputed, never stored.

With r = relu(q_h . k_s) and d the gradient of the scores (zero where an entry is not visible):
    dw_h = sum_s d_s r_hs    e_hs = d_s w_h [q_h . k_s > 0]    dq_h = sum_s e_hs k_s    dk_s = sum_th e_hs q_h
Two kernels, each with its own accumulator in VMEM: over keys for the queries, over queries for the keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import cdiv, quotient
from pallas_kernels.indexer.kernel_tpu import visible_in
from pallas_kernels.indexer.key_tiles import products
from pallas_kernels.indexer.tuning import IndexerBlocks
from pallas_kernels.precision import product_precision


def _own_keys(keys_ref, b, first, size, blocks):
    """One sequence's tile of keys; what sticks out behind the last key may hold anything, NaN too."""
    s = first + lax.broadcasted_iota(jnp.int32, (blocks.keys, 1), 0)
    return jnp.where(s < size, keys_ref[b], 0)


def _pieces(q_ref, weights_ref, keys_ref, lo_ref, hi_ref, d_ref, first, size, blocks):
    """Per sequence: its rows, keys, relu'd products, and e, all of one tile."""
    visible = visible_in(lo_ref[...], hi_ref[...], first, blocks.keys)
    d_scores = jnp.where(visible, d_ref[...], 0)
    for b in range(blocks.sequences):
        own = slice(b * blocks.queries, (b + 1) * blocks.queries)
        keys = _own_keys(keys_ref, b, first, size, blocks)
        dots = products(q_ref[own].reshape(-1, keys.shape[1]), keys).reshape(blocks.queries, -1, blocks.keys)
        d = d_scores[own][:, None]  # [queries, 1, keys]
        e = jnp.where(dots > 0, d * weights_ref[own][..., None], 0)
        yield own, keys, jnp.maximum(dots, 0) * d, e.reshape(-1, blocks.keys).astype(keys.dtype)


def _dot(a, b, contract_a, contract_b):
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(
        a, b, dims, precision=product_precision(a.dtype), preferred_element_type=jnp.float32
    )


def _queries_body(
    q_ref, weights_ref, keys_ref, lo_ref, hi_ref, d_ref, dq_ref, dw_ref, dq_sum, dw_sum, *, blocks, size
):
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        dw_sum[...] = jnp.zeros_like(dw_sum)

    first = tile * blocks.keys
    operands = q_ref, weights_ref, keys_ref, lo_ref, hi_ref, d_ref
    for own, keys, weighted, e in _pieces(*operands, first, size, blocks):
        dw_sum[own] += weighted.sum(axis=2)
        dq_sum[own] += _dot(e, keys, 1, 0).reshape(blocks.queries, -1, keys.shape[1])

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        dq_ref[...] = dq_sum[...].astype(dq_ref.dtype)
        dw_ref[...] = dw_sum[...]


def _keys_body(q_ref, weights_ref, keys_ref, lo_ref, hi_ref, d_ref, dk_ref, dk_sum, *, blocks, size):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)

    first = pl.program_id(1) * blocks.keys
    operands = q_ref, weights_ref, keys_ref, lo_ref, hi_ref, d_ref
    for b, (own, _, _, e) in enumerate(_pieces(*operands, first, size, blocks)):
        dk_sum[b] += _dot(e, q_ref[own].reshape(-1, q_ref.shape[-1]), 0, 0)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)


def index_scores_bwd(
    q, weights, keys, lo, hi, d_scores, *, blocks: IndexerBlocks, vmem_limit: int, interpret
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dw, dk) in the shapes of q, weights and keys, all rows padded."""
    (num_rows, heads, width), (batch, size, _) = q.shape, keys.shape
    num_blocks, num_tiles = num_rows // blocks.rows, cdiv(size, blocks.keys)
    per_sequence = num_blocks * blocks.sequences // batch  # blocks of rows that share their keys
    cost = pl.CostEstimate(
        flops=4 * num_rows * size * heads * width,
        transcendentals=0,
        bytes_accessed=2 * q.size * q.dtype.itemsize + 4 * num_rows * size,
    )

    def specs(rows_of, keys_of):
        """Block specs, given the index of the block of rows and (sequence, tile) from the grid's."""
        per_row = lambda *shape: pl.BlockSpec(  # noqa: E731
            (blocks.rows, *shape), lambda *g: (rows_of(*g), *(0 for _ in shape))
        )
        key_spec = pl.BlockSpec((blocks.sequences, blocks.keys, width), lambda *g: (*keys_of(*g), 0))
        d_spec = pl.BlockSpec((blocks.rows, blocks.keys), lambda *g: (rows_of(*g), keys_of(*g)[1]))
        operands = [per_row(heads, width), per_row(heads), key_spec, per_row(1), per_row(1), d_spec]
        return operands, per_row(heads, width), per_row(heads), key_spec

    operands, dq_spec, dw_spec, _ = specs(lambda r, s: r, lambda r, s: (quotient(r, per_sequence), s))
    dq, dw = pl.pallas_call(
        functools.partial(_queries_body, blocks=blocks, size=size),
        grid=(num_blocks, num_tiles),
        in_specs=operands,
        out_specs=[dq_spec, dw_spec],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(weights.shape, jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((blocks.rows, heads, width), jnp.float32),
            pltpu.VMEM((blocks.rows, heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="index_scores_bwd_queries",
    )(q, weights, keys, lo, hi, d_scores)

    operands, _, _, dk_spec = specs(lambda b, s, r: b * per_sequence + r, lambda b, s, r: (b, s))
    dk = pl.pallas_call(
        functools.partial(_keys_body, blocks=blocks, size=size),
        grid=(batch // blocks.sequences, num_tiles, per_sequence),
        in_specs=operands,
        out_specs=dk_spec,
        out_shape=jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        scratch_shapes=[pltpu.VMEM((blocks.sequences, blocks.keys, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="index_scores_bwd_keys",
    )(q, weights, keys, lo, hi, d_scores)
    return dq, dw, dk
