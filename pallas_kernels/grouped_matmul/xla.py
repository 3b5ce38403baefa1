"""The routed experts on any XLA backend: exact FLOPs, loops over the experts in use and their blocks of rows.

Layout: inside a block activations are transposed, [features, rows]. XLA:CPU packs the right-hand side of a
matmul; with the weights on the left it packs the few rows instead of the whole matrix.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.routing import sort_pairs
from pallas_kernels.grouped_matmul.stream import stream_product


def expert_ffn_forward(
    x, gate_up, down, expert_ids, weights, first_expert, valid, *, num_experts, swiglu_limit, plan
):
    """f32[T, D]; the contract is in `op.expert_ffn`."""
    pairs = sort_pairs(expert_ids, valid, num_experts=num_experts, rows=plan.rows)
    run = _one_row_at_a_time if plan.streamed else _block_by_block
    y = functools.partial(run, x, gate_up, down, first_expert, pairs, swiglu_limit, plan)
    return y(weights.reshape(-1), expert_ids.shape[1])


def _one_row_at_a_time(x, gate_up, down, first_expert, pairs, limit, plan, weights, top_k):
    """Decode: a loop over pairs that reads each expert where it lies."""
    gate_up = gate_up.reshape(gate_up.shape[0], -1, gate_up.shape[-1])

    def pair(place, y):
        index = first_expert + pairs.expert_at(place)
        number = pairs.pairs_at(place, 1)[0]
        token = lax.div(number, top_k)
        row = x[token].astype(jnp.float32)
        hidden = _gated(stream_product(gate_up, index, row), limit)
        hidden = hidden.astype(x.dtype).astype(jnp.float32)
        out = stream_product(down, index, hidden) * weights[number]
        return y.at[token].add(out, mode="promise_in_bounds")

    return lax.fori_loop(0, pairs.total, pair, jnp.zeros(x.shape, jnp.float32))


def _block_by_block(x, gate_up, down, first_expert, pairs, limit, plan, weights, top_k):
    dtype = jnp.float32 if plan.upcast else x.dtype

    def expert_rows(expert, start, end, y):
        w13, w2 = _matrices(gate_up, down, first_expert + expert, x.dtype, dtype)

        def block(number, y):
            numbers, tokens, own = _block(pairs, start + number * plan.rows, end, plan.rows, top_k)
            rows = x.at[tokens].get(mode="promise_in_bounds").astype(dtype)
            hidden = _gated(_dot(w13, rows, 1, 1), limit).astype(x.dtype)
            out = _dot(w2, hidden.astype(dtype), 1, 0)
            # Without the barrier XLA folds the transposition into the product, and packs the weights.
            out = lax.optimization_barrier(out).T * weights[numbers, None]
            return y.at[tokens].add(jnp.where(own, out, 0), mode="promise_in_bounds")

        return lax.fori_loop(0, _num_blocks(start, end, plan), block, y)

    return _for_each_expert(pairs, expert_rows, jnp.zeros(x.shape, jnp.float32))


def _for_each_expert(pairs, step, state):
    """step(expert, start, end, state) for every expert in use; its pairs are places [start, end)."""

    def body(carry):
        start, state = carry
        expert = pairs.expert_at(start)
        end = pairs.end_of(expert)
        return end, step(expert, start, end, state)

    _, state = lax.while_loop(lambda carry: carry[0] < pairs.total, body, (jnp.int32(0), state))
    return state


def _num_blocks(start, end, plan):
    return lax.div(end - start + (plan.rows - 1), plan.rows)


def _block(pairs, place, end, rows, top_k):
    """Pair numbers i32[rows], their tokens, and bool[rows, 1]: whether they belong to the expert."""
    numbers = pairs.pairs_at(place, rows)
    own = place + jnp.arange(rows, dtype=jnp.int32) < end
    return numbers, lax.div(numbers, top_k), own[:, None]


def _dot(lhs, rhs, lhs_dim, rhs_dim):
    return lax.dot_general(
        lhs, rhs, (((lhs_dim,), (rhs_dim,)), ((), ())), preferred_element_type=jnp.float32
    )


def _gated(both, limit):
    """silu(min(gate, c)) * clip(up, -c, c) of f32[2F, rows]."""
    gate, up = jnp.split(both, 2)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def _matrices(gate_up, down, index, compute, dtype):
    """One expert's [2F, D] and [D, F], rounded to the compute dtype, held in the dot's dtype."""
    # The barrier ties the stacks to the loop: otherwise a backend that computes in float32 converts
    # whole bfloat16 stacks before the loop instead of one expert inside it.
    gate_up, down, index = lax.optimization_barrier((gate_up, down, index))
    gate_up = lax.dynamic_index_in_dim(gate_up, index, keepdims=False)
    down = lax.dynamic_index_in_dim(down, index, keepdims=False)
    gate_up = gate_up.reshape(-1, gate_up.shape[-1])
    return gate_up.astype(compute).astype(dtype), down.astype(compute).astype(dtype)
