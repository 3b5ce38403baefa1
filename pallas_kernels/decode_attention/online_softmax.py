"""The arithmetic inside the kernels: keys of some tiles join the softmaxes of several sequences.

Written stage by stage over all sequences, not sequence by sequence: the compiler overlaps what stands side
by side in the source, and one sequence's chain of product, maximum, exponential, product leaves most of a
core idle.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.visibility import Visible
from pallas_kernels.precision import product_precision


def dot(x: jax.Array, y: jax.Array, *, transposed: bool) -> jax.Array:
    """x y or x y^T, accumulated in float32; float32 operands are not rounded to bfloat16 on the way."""
    precision = product_precision(x.dtype)
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def as_rows(x: jax.Array) -> jax.Array:
    """[T, H, k] as [T * H, k]."""
    return x.reshape(-1, x.shape[-1])


class Softmax(NamedTuple):
    """A softmax on its way: the largest logit, the sum of weights, the weighted sum of values."""

    top: jax.Array  # f32[T, H, 1]
    total: jax.Array  # f32[T, H, 1]
    weighted: jax.Array | None  # f32[T * H, Dh]; None while there are no values


def from_sink(sink: jax.Array, queries: int) -> Softmax:
    """The sink f32[H, 1] is a key without a value that every query sees."""
    top = jnp.broadcast_to(sink[None], (queries, *sink.shape))
    return Softmax(top, jnp.ones_like(top), None)


def attend(states: list[Softmax], queries: list[jax.Array], tiles: list[list[Visible]]) -> list[Softmax]:
    """The softmaxes with the keys of some tiles added; one state, q[T * H, Dh] and list a sequence."""
    logits = [
        [_logits(q, tile, state.top.shape[1]) for tile in own]
        for state, q, own in zip(states, queries, tiles, strict=True)
    ]
    heavier = [_weights(state, own) for state, own in zip(states, logits, strict=True)]
    return [
        state._replace(weighted=_add_values(state.weighted, weights, own))
        for (state, weights), own in zip(heavier, tiles, strict=True)
    ]


def _logits(q, tile, heads):
    """f32[T, H, keys], -inf where not visible."""
    queries, num_keys = tile.mask.shape
    z = dot(q, tile.keys, transposed=not tile.channels_first).reshape(queries, heads, num_keys)
    return jnp.where(tile.mask[:, None, :], z * q.shape[1] ** -0.5, -jnp.inf)


def _weights(state, logits):
    """The state relative to its new maximum, and the weights of the tiles' keys."""
    top = state.top
    for z in logits:
        top = jnp.maximum(top, z.max(axis=-1, keepdims=True))
    weights = [jnp.exp(z - top) for z in logits]
    shrink = jnp.exp(state.top - top)
    total = state.total * shrink
    for weight in weights:
        total += weight.sum(axis=-1, keepdims=True)
    weighted = None if state.weighted is None else state.weighted * as_rows(shrink)
    return Softmax(top, total, weighted), weights


def _add_values(weighted, weights, tiles):
    for weight, tile in zip(weights, tiles, strict=True):
        product = dot(as_rows(weight.astype(tile.keys.dtype)), tile.keys, transposed=tile.channels_first)
        weighted = product if weighted is None else weighted + product
    return weighted


def results(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """o f32[T * H, Dh] and lse f32[T, H]."""
    return state.weighted * as_rows(1.0 / state.total), (state.top + jnp.log(state.total))[..., 0]
