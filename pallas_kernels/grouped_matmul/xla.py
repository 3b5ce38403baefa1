"""The routed experts on any XLA backend: exact FLOPs, two nested loops over used experts and blocks of rows.

Layout: inside a block activations are transposed, [features, rows]. XLA:CPU packs the right-hand side of a
matmul; with the weights on the left it packs the few rows instead of the whole matrix.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.routing import block_places, sort_pairs
from pallas_kernels.grouped_matmul.stream import stream_product
from pallas_kernels.grouped_matmul.tuning import BlockPlan


def expert_ffn_forward(
    x, gate_up, down, expert_ids, weights, first_expert, valid, *, num_experts, swiglu_limit, plan
):
    """f32[T, D]; the contract is in `op.expert_ffn`."""
    pairs = sort_pairs(expert_ids, valid, num_experts=num_experts, rows=plan.rows)
    top_k = expert_ids.shape[1]
    weights = weights.reshape(-1)
    dtype = jnp.float32 if plan.upcast else x.dtype

    def expert_rows(place, y):
        expert = pairs.used[place]
        ffn = _streamed_ffn if plan.streamed else _sliced_ffn
        ffn = ffn(gate_up, down, first_expert + expert, x.dtype, dtype, swiglu_limit)

        def block(number, y):
            numbers, own = block_places(pairs, expert, number, plan.rows)
            tokens = numbers // top_k
            out = ffn(x.at[tokens].get(mode="promise_in_bounds"))
            # Without the barrier XLA folds the transposition into the product, and packs the weights.
            out = lax.optimization_barrier(out).T * weights[numbers, None]
            return y.at[tokens].add(jnp.where(own[:, None], out, 0), mode="promise_in_bounds")

        return lax.fori_loop(0, _num_blocks(pairs, expert, plan), block, y)

    return lax.fori_loop(0, pairs.num_used, expert_rows, jnp.zeros(x.shape, jnp.float32))


def _num_blocks(pairs, expert, plan):
    count = pairs.offsets[expert + 1] - pairs.offsets[expert]
    return (count + plan.rows - 1) // plan.rows


def _dot(lhs, rhs, lhs_dim, rhs_dim):
    return lax.dot_general(
        lhs, rhs, (((lhs_dim,), (rhs_dim,)), ((), ())), preferred_element_type=jnp.float32
    )


def gated(both, limit):
    """silu(min(gate, c)) * clip(up, -c, c) of f32[2F, rows]."""
    gate, up = jnp.split(both, 2)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def _matrices(gate_up, down, index, dtype):
    # The barrier ties the stacks to the loop: otherwise a backend that computes in float32 converts
    # whole bfloat16 stacks before the loop instead of one expert inside it.
    gate_up, down, index = lax.optimization_barrier((gate_up, down, index))
    gate_up = lax.dynamic_index_in_dim(gate_up, index, keepdims=False)
    down = lax.dynamic_index_in_dim(down, index, keepdims=False)
    return gate_up.reshape(-1, gate_up.shape[-1]).astype(dtype), down.astype(dtype)


def _sliced_ffn(gate_up, down, index, compute, dtype, limit):
    gate_up, down = _matrices(gate_up, down, index, dtype)

    def ffn(rows):
        hidden = gated(_dot(gate_up, rows.astype(dtype), 1, 1), limit)
        return _dot(down, hidden.astype(compute).astype(dtype), 1, 0)

    return ffn


def _streamed_ffn(gate_up, down, index, compute, dtype, limit):
    gate_up = gate_up.reshape(gate_up.shape[0], -1, gate_up.shape[-1])

    def ffn(rows):
        hidden = gated(stream_product(gate_up, index, rows[0].astype(jnp.float32)), limit)
        hidden = hidden.astype(compute).astype(jnp.float32)
        return stream_product(down, index, hidden)[:, None]

    return ffn
