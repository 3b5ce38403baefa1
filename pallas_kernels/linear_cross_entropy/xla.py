"""The weighted cross entropy in plain XLA: a chunk of tokens at a time, gradients in the forward pass."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.precision import einsum_float32

CHUNK = 1024
"""Tokens whose logits exist at the same time."""


def weighted_cross_entropy_xla(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "T"],
    weights: Float32[Array, "T"],
    *,
    z_weight: Float32[Array, ""] | None = None,
    chunk: int = CHUNK,
) -> Float32[Array, ""] | tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The contract is in `op.weighted_cross_entropy`; `chunk` tokens at a time, >= 1."""
    loss, squares = _weighted_nll(chunk, hidden, head, ids, weights, z_weight)
    return loss if z_weight is None else (loss, squares)


def linear_cross_entropy_xla(
    hidden: Float[Array, "T D"], head: Float[Array, "V D"], ids: Int32[Array, "T"], *, chunk: int = CHUNK
) -> tuple[Float32[Array, "T"], Float32[Array, "T"]]:
    """nll and lse of every token; the contract is in `op.linear_cross_entropy`. Logits are recomputed in the
    backward pass."""
    wide = head.astype(jnp.float32)  # so that the sum of its gradient over chunks is float32 too

    def terms(part: tuple) -> tuple[jax.Array, jax.Array]:
        hidden, ids = part
        logits = _product("td,vd->tv", hidden, wide)
        lse = jax.nn.logsumexp(logits, axis=1)
        inside = (ids >= 0) & (ids < len(wide))
        picked = jnp.take_along_axis(logits, jnp.where(inside, ids, 0)[:, None], axis=1)[:, 0]
        return lse - jnp.where(inside, picked, 0), lse

    parts = tuple(_chunks(min(chunk, len(hidden)), hidden, ids))
    nll, lse = jax.lax.map(jax.checkpoint(terms), parts)
    return nll.reshape(-1)[: len(hidden)], lse.reshape(-1)[: len(hidden)]


def _chunks(chunk: int, *arrays: jax.Array) -> list[jax.Array]:
    """Each array [n, ...] padded with zeros and cut: [ceil(n / chunk), chunk, ...]."""
    num_chunks = -(-arrays[0].shape[0] // chunk)
    cut = []
    for array in arrays:
        pad = [(0, num_chunks * chunk - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
        cut.append(jnp.pad(array, pad).reshape(num_chunks, chunk, *array.shape[1:]))
    return cut


def _chunk_nll(
    hidden: jax.Array, head: jax.Array, ids: jax.Array, weights: jax.Array, z_weight: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one chunk: the weighted sums of nll + z lse^2 and of lse^2, and what the gradients of its logits are
    but for the targets', f32[chunk, V]."""
    logits = _product("td,vd->tv", hidden, head)
    top = logits.max(axis=1, keepdims=True)
    shifted = logits - top
    exp = jnp.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    picked = jnp.take_along_axis(shifted, ids[:, None], axis=1)
    loss, squares = jnp.sum(weights[:, None] * (jnp.log(total) - picked)), jnp.float32(0)
    slope = exp / total * weights[:, None]
    if z_weight is not None:
        # d lse^2 / d logits = 2 lse softmax
        lse = top + jnp.log(total)
        squares = jnp.sum(weights[:, None] * lse**2)
        loss, slope = loss + z_weight * squares, slope * (1 + 2 * z_weight * lse)
    return loss, squares, slope


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Float32 operands, products and result: the head is a float32 island."""
    return einsum_float32(equation, left.astype(jnp.float32), right.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_nll(
    chunk: int,
    hidden: jax.Array,
    head: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    z_weight: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """sum_i weights[i] (nll_i + z lse_i^2) and sum_i weights[i] lse_i^2, which is 0 without z and has no
    gradient, for hidden [n, D], head [V, D], ids i32[n], weights f32[n]."""
    chunk = min(chunk, hidden.shape[0])

    def add(sums: tuple, part: tuple) -> tuple[tuple, None]:
        hidden, ids, weights = part
        loss, squares, _ = _chunk_nll(hidden, head, ids, weights, z_weight)
        return (sums[0] + loss, sums[1] + squares), None

    start = (jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(add, start, tuple(_chunks(chunk, hidden, ids, weights)))[0]


def _forward(
    chunk: int,
    hidden: jax.Array,
    head: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    z_weight: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    chunk = min(chunk, hidden.shape[0])

    def add(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, sums, grad_head = carry
        hidden, ids, weights = part
        loss, squares, grad = _chunk_nll(hidden, head, ids, weights, z_weight)
        # d nll / d logits = weights * (softmax - one_hot(ids))
        grad = grad.at[jnp.arange(chunk, dtype=jnp.int32), ids].add(-weights, mode="promise_in_bounds")
        grad_head = grad_head + _product("tv,td->vd", grad, hidden)
        return (total + loss, sums + squares, grad_head), _product("tv,vd->td", grad, head)

    init = (jnp.float32(0), jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    parts = tuple(_chunks(chunk, hidden, ids, weights))
    (total, squares, grad_head), grad_hidden = jax.lax.scan(add, init, parts)
    grad_hidden = grad_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    # Casting here keeps what is saved at the size of the inputs.
    return (total, squares), (grad_hidden.astype(hidden.dtype), grad_head.astype(head.dtype))


def _backward(chunk: int, saved: tuple, cotangents: tuple) -> tuple:
    del chunk
    grad_hidden, grad_head = (cotangents[0].astype(grad.dtype) * grad for grad in saved)
    return grad_hidden, grad_head, None, None, None  # targets and weights are data


_weighted_nll.defvjp(_forward, _backward)
