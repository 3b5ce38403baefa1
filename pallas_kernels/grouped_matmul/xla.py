"""The routed experts on any XLA backend: exact FLOPs, loops over the experts in use and their blocks of rows.

Layout: inside a block activations are transposed, [features, rows]. XLA:CPU packs the right-hand side of a
matmul; with the weights on the left it packs the few rows instead of the whole matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arithmetic import quotient
from pallas_kernels.grouped_matmul.routing import sort_pairs
from pallas_kernels.grouped_matmul.stored import Stack
from pallas_kernels.grouped_matmul.stream import stream_product
from pallas_kernels.precision import product_precision


class Hidden(NamedTuple):
    """How the first product becomes the second one's input; features are the first axis."""

    limit: float
    round_weighted: Callable[[jax.Array], jax.Array] | None

    def before(self, both, weight, dtype):
        """f32[F] or f32[F, rows] in front of W2, from f32[2F(, rows)] and the routing weight(s)."""
        hidden = _gated(both, self.limit)
        if self.round_weighted is None:
            return hidden.astype(dtype).astype(jnp.float32)
        return self.round_weighted((hidden * weight).astype(dtype).T).T.astype(jnp.float32)

    def after(self, weight):
        """What the second product is multiplied with."""
        return weight if self.round_weighted is None else jnp.ones_like(weight)


def expert_ffn_forward(
    x,
    gate_up: Stack,
    down: Stack,
    expert_ids,
    weights,
    first_expert,
    valid,
    *,
    num_experts,
    hidden_of,
    blocks,
) -> jax.Array:
    """f32[T, D]; the contract is in `op.expert_ffn`; hidden_of: `Hidden`. Products are float32."""
    pairs = sort_pairs(expert_ids, valid, num_experts=num_experts, rows=blocks.rows)
    top_k, weights = expert_ids.shape[1], weights.reshape(-1)
    dot = _dot_for(x.dtype)

    def stream_pair(place, y):
        index = first_expert + pairs.expert_at(place)
        number = pairs.pairs_at(place, 1)[0]
        token = quotient(number, top_k)
        both = stream_product(gate_up, index, x[token].astype(jnp.float32))
        hidden = hidden_of.before(both, weights[number], x.dtype)
        out = stream_product(down, index, hidden) * hidden_of.after(weights[number])
        return y.at[token].add(out, mode="promise_in_bounds")

    def expert_rows(expert, start, end, y):
        w13, w2 = _matrices(gate_up, down, first_expert + expert, x.dtype)

        def block(number, y):
            numbers, own = _block(pairs, start, end, number, blocks.rows)
            tokens = quotient(numbers, top_k)
            rows = x.at[tokens].get(mode="promise_in_bounds").astype(jnp.float32)
            hidden = hidden_of.before(dot(w13, rows, 1, 1), weights[numbers], x.dtype)
            out = dot(w2, hidden.astype(jnp.float32), 1, 0)
            # Without the barrier XLA folds the transposition into the product, and packs the weights.
            out = lax.optimization_barrier(out).T * hidden_of.after(weights[numbers])[:, None]
            return y.at[tokens].add(jnp.where(own, out, 0), mode="promise_in_bounds")

        return lax.fori_loop(0, _num_blocks(start, end, blocks.rows), block, y)

    y = jnp.zeros(x.shape, jnp.float32)
    if blocks.streamed:
        return lax.fori_loop(0, pairs.total, stream_pair, y)
    return _for_each_expert(pairs, expert_rows, y)


def expert_ffn_backward(
    dy,
    x,
    gate_up: Stack,
    down: Stack,
    expert_ids,
    weights,
    first_expert,
    valid,
    *,
    num_experts,
    hidden_of,
    blocks,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
    """Gradients of x, gate_up, down and weights; None for quantised matrices.

    Hidden activations are recomputed.
    """
    pairs = sort_pairs(expert_ids, valid, num_experts=num_experts, rows=blocks.rows)
    top_k, flat_weights = expert_ids.shape[1], weights.reshape(-1)
    dot = _dot_for(x.dtype)

    def expert_rows(expert, start, end, sums):
        dx, d_gate_up, d_down, d_weights = sums
        index = first_expert + expert
        w13, w2 = _matrices(gate_up, down, index, x.dtype)

        def block(number, sums):
            dx, d_w13, d_w2, d_weights = sums
            numbers, own = _block(pairs, start, end, number, blocks.rows)
            tokens = quotient(numbers, top_k)

            def own_rows(a):  # zero rows add nothing to any gradient
                return jnp.where(own, a.at[tokens].get(mode="promise_in_bounds"), 0).astype(jnp.float32)

            x_rows, dy_rows = own_rows(x), own_rows(dy)
            weight = flat_weights[numbers]
            hidden, pull = jax.vjp(
                lambda both, weight: hidden_of.before(both, weight, x.dtype),
                dot(w13, x_rows, 1, 1),
                weight,
            )
            after = hidden_of.after(weight)
            # Unweighted, it gives the routing weight's gradient too: dy . (W2 h) = (W2^T dy) . h
            d_hidden = dot(w2, dy_rows, 0, 1)
            d_both, d_weight = pull(d_hidden * after)
            if hidden_of.round_weighted is None:
                d_weight = (d_hidden * hidden).sum(axis=0)
            d_weights = d_weights.at[numbers].add(d_weight)
            d_both = d_both.astype(jnp.float32)
            # dW2 += (weight * dy)^T h^T,  dW13 += d_both x,  dx += d_both^T W13
            if d_w2 is not None:
                d_w2 += dot(dy_rows, (hidden * after).astype(jnp.float32), 0, 1)
            if d_w13 is not None:
                d_w13 += dot(d_both, x_rows, 1, 0)
            dx = dx.at[tokens].add(dot(d_both, w13, 0, 0), mode="promise_in_bounds")
            return dx, d_w13, d_w2, d_weights

        zeros = (
            None if total is None else jnp.zeros(w.shape, jnp.float32)
            for total, w in ((d_gate_up, w13), (d_down, w2))
        )
        dx, d_w13, d_w2, d_weights = lax.fori_loop(
            0, _num_blocks(start, end, blocks.rows), block, (dx, *zeros, d_weights)
        )

        def put(total, own):
            if total is None:
                return None
            return lax.dynamic_update_index_in_dim(total, own.reshape(total.shape[1:]), index, 0)

        return dx, put(d_gate_up, d_w13), put(d_down, d_w2), d_weights

    # Stacks of gradients stay float32 until the end: a backend without bfloat16 would otherwise convert
    # all of them at every update.
    operands = x, *(w.values if w.format == "plain" else None for w in (gate_up, down)), weights
    totals = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (*operands[:3], flat_weights))
    totals = _for_each_expert(pairs, expert_rows, totals)
    return jax.tree.map(lambda a, total: total.reshape(a.shape).astype(a.dtype), operands, totals)


def _for_each_expert(pairs, step, state):
    """step(expert, start, end, state) for every expert in use; its pairs are places [start, end)."""

    def body(carry):
        start, state = carry
        expert = pairs.expert_at(start)
        end = pairs.end_of(expert)
        return end, step(expert, start, end, state)

    return lax.while_loop(lambda carry: carry[0] < pairs.total, body, (jnp.int32(0), state))[1]


def _num_blocks(start, end, rows):
    return quotient(end - start + (rows - 1), rows)


def _block(pairs, start, end, number, rows):
    """Pair numbers i32[rows] of one block, and bool[rows, 1]: whether they belong to the expert."""
    place = start + number * rows
    own = place + jnp.arange(rows, dtype=jnp.int32) < end
    return pairs.pairs_at(place, rows), own[:, None]


def _dot_for(dtype):
    """lhs, rhs and the axis of each that is summed -> f32; dtype: of the model's numbers, x's."""

    def dot(lhs, rhs, lhs_dim, rhs_dim):
        dimensions = ((lhs_dim,), (rhs_dim,)), ((), ())
        precision = product_precision(dtype)
        return lax.dot_general(lhs, rhs, dimensions, precision=precision, preferred_element_type=jnp.float32)

    return dot


def _gated(both, limit):
    """silu(min(gate, c)) * clip(up, -c, c) of f32[2F] or f32[2F, rows]."""
    gate, up = jnp.split(both, 2)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def _matrices(gate_up: Stack, down: Stack, index, compute):
    """One expert's [2F, D] and [D, F], decoded, rounded to the compute dtype, as float32."""
    # The barrier ties the stacks to the loop: otherwise a backend that computes in float32 converts
    # whole bfloat16 stacks before the loop instead of one expert inside it.
    gate_up, down, index = lax.optimization_barrier((gate_up, down, index))
    w13, w2 = gate_up.one(index), down.one(index)
    w13 = w13.reshape(-1, w13.shape[-1])
    return w13.astype(compute).astype(jnp.float32), w2.astype(compute).astype(jnp.float32)
