"""The routed experts as a loop over blocks of rows sorted by expert: exact FLOPs, static shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Blocks(NamedTuple):
    """Token-expert pairs sorted by expert, cut into blocks of one expert each."""

    order: jax.Array  # i32[P] pair numbers (token * Ke + k), sorted by expert, padding last
    offset: jax.Array  # i32[E + 1] first place of each expert in `order`
    last_block: jax.Array  # i32[E] running count of blocks


def sort_into_blocks(expert_ids, valid, num_experts: int, rows: int) -> Blocks:
    """Sorts the pairs; those of invalid tokens come last and get no block."""
    expert = jnp.where(valid[:, None], expert_ids, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    count = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")
    offset = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count)])
    return Blocks(order, offset, jnp.cumsum((count + rows - 1) // rows))


def _block(blocks: Blocks, number, rows: int, top_k: int):
    """(expert, pair numbers i32[rows], tokens i32[rows], own bool[rows]) of one block."""
    expert = jnp.searchsorted(blocks.last_block, number, side="right").astype(jnp.int32)
    before = jnp.where(expert > 0, blocks.last_block[expert - 1], 0)
    place = blocks.offset[expert] + (number - before) * rows + jnp.arange(rows, dtype=jnp.int32)
    own = place < blocks.offset[expert + 1]
    pair = blocks.order[jnp.minimum(place, blocks.order.size - 1)]
    return expert, pair, pair // top_k, own


def _weights(gate_up, down, index, dtype):
    w = lax.dynamic_index_in_dim(gate_up, index, keepdims=False).astype(dtype)
    return w.reshape(-1, w.shape[-1]), lax.dynamic_index_in_dim(down, index, keepdims=False).astype(dtype)


def _matmul(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _gated(both, limit):
    gate, up = jnp.split(both, 2, axis=1)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def forward(x, gate_up, down, blocks: Blocks, weights, first_expert, *, limit: float, rows: int):
    """f32[T, D]; each token's experts are added in the order of their ids, whatever the other tokens do."""
    top_k, flat = weights.shape[1], weights.reshape(-1)

    def step(number, y):
        expert, pair, token, own = _block(blocks, number, rows, top_k)
        w, v = _weights(gate_up, down, first_expert + expert, x.dtype)
        hidden = _gated(_matmul(x[token], w, ((1,), (1,))), limit).astype(x.dtype)
        out = _matmul(hidden, v, ((1,), (1,))) * flat[pair, None]
        return y.at[token].add(jnp.where(own[:, None], out, 0))

    return lax.fori_loop(0, blocks.last_block[-1], step, jnp.zeros(x.shape, jnp.float32))


def backward(x, gate_up, down, blocks: Blocks, weights, first_expert, dy, *, limit: float, rows: int):
    """Gradients (dx f32, dgate_up, ddown in float32, dweights f32), hidden activations recomputed."""
    top_k, flat = weights.shape[1], weights.reshape(-1)

    def step(number, grads):
        dx, dgate_up, ddown, dflat = grads
        expert, pair, token, own = _block(blocks, number, rows, top_k)
        index = first_expert + expert
        w, v = _weights(gate_up, down, index, x.dtype)
        rows_in = x[token]
        hidden, pull = jax.vjp(lambda both: _gated(both, limit), _matmul(rows_in, w, ((1,), (1,))))
        hidden = hidden.astype(x.dtype)
        d_out = jnp.where(own[:, None], dy[token], 0)
        out = _matmul(hidden, v, ((1,), (1,)))
        dflat = dflat.at[pair].add((out * d_out).sum(axis=1))
        d_out = (d_out * flat[pair, None]).astype(x.dtype)
        (d_both,) = pull(_matmul(d_out, v, ((1,), (0,))))
        d_both = d_both.astype(x.dtype)
        dx = dx.at[token].add(_matmul(d_both, w, ((1,), (0,))))
        d_w = _matmul(d_both, rows_in, ((0,), (0,))).reshape(gate_up.shape[1:])
        dgate_up = dgate_up.at[index].add(d_w)
        ddown = ddown.at[index].add(_matmul(d_out, hidden, ((0,), (0,))))
        return dx, dgate_up, ddown, dflat

    zeros = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(gate_up.shape, jnp.float32),
        jnp.zeros(down.shape, jnp.float32),
        jnp.zeros(flat.shape, jnp.float32),
    )
    dx, dgate_up, ddown, dflat = lax.fori_loop(0, blocks.last_block[-1], step, zeros)
    return dx, dgate_up, ddown, dflat.reshape(weights.shape)
