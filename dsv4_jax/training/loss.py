"""What training minimises: L = CE_main + lambda_mtp CE_mtp + alpha_bal sum over layers of L_bal.

Report, sections 2.1 and 4.2. The layers report their balance losses themselves (`model.layer_report`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax.training.data import PADDING_SEGMENT
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.precision import einsum_float32

MTP_WEIGHT = 0.3  # report, section 4.2; 0.1 once the learning rate decays at the end
BALANCE_WEIGHT = 1e-4
DEFAULT_CHUNK = 1024


class Targets(NamedTuple):
    """What each position should predict, and whether it counts."""

    ids: Int32[Array, "B T"]
    valid: Bool[Array, "B T"]


def shifted_targets(tokens: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"], offset: int) -> Targets:
    """Position t predicts token t + `offset` of its own segment: 1 for the head, 2 for the MTP block.

    The last `offset` positions of a segment and padding (segment id 0) have no target.
    """
    pad = ((0, 0), (0, min(offset, tokens.shape[1])))
    ids = jnp.pad(tokens[:, offset:], pad)
    segment = jnp.pad(segment_ids[:, offset:], pad, constant_values=PADDING_SEGMENT)
    return Targets(ids, (segment == segment_ids) & (segment_ids != PADDING_SEGMENT))


def mean_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Targets,
    chunk: int = DEFAULT_CHUNK,
    kernels: str = "xla",
) -> Float32[Array, ""]:
    """Mean over valid targets of -log softmax(hidden head^T)[target], in nats; 0 without any target.

    **Equation** CE = sum_t valid_t (logsumexp_v(h_t . head_v) - h_t . head_target) / sum_t valid_t
    (report, section 2.1).

    **Args** hidden: what the head multiplies (after the final norm); head: output rows; targets; chunk:
    positions whose logits exist at the same time on XLA; kernels: one of `policy.KERNELS`.

    **Numerics** Logits, softmax and sums are float32 for every input dtype.

    **Gradients** Computed chunk by chunk in the forward pass and only scaled in the backward pass: neither
    the logits f32[B, T, V] nor their cotangent is ever whole in memory, and no product is done twice.

    **Cost** 6 B T V D FLOPs with gradients, 2 B T V D without; memory chunk * V * 4 bytes plus, with
    gradients, one float32 copy each of `hidden` and `head`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    weights = targets.valid.reshape(-1).astype(jnp.float32)
    weights = weights / jnp.maximum(weights.sum(), 1.0)
    if kernels != "xla":
        ids = targets.ids.reshape(-1)
        nll, _ = linear_cross_entropy(flat, head, ids, interpret=kernels == "pallas-interpret")
        return jnp.sum(weights * nll)
    return _weighted_nll(chunk, flat, head, targets.ids.reshape(-1), weights)


def _chunks(chunk: int, *arrays: jax.Array) -> list[jax.Array]:
    """Each array [n, ...] padded with zeros and cut: [ceil(n / chunk), chunk, ...]."""
    num_chunks = -(-arrays[0].shape[0] // chunk)
    cut = []
    for array in arrays:
        pad = [(0, num_chunks * chunk - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
        cut.append(jnp.pad(array, pad).reshape(num_chunks, chunk, *array.shape[1:]))
    return cut


def _chunk_nll(
    hidden: jax.Array, head: jax.Array, ids: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the negative log-likelihoods of one chunk, and its softmax f32[chunk, V]."""
    logits = _product("td,vd->tv", hidden, head)
    shifted = logits - logits.max(axis=1, keepdims=True)
    exp = jnp.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    picked = jnp.take_along_axis(shifted, ids[:, None], axis=1)
    return jnp.sum(weights[:, None] * (jnp.log(total) - picked)), exp / total


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Float32 operands, products and result: the head is a float32 island."""
    return einsum_float32(equation, left.astype(jnp.float32), right.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_nll(
    chunk: int, hidden: jax.Array, head: jax.Array, ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """sum_i weights[i] nll_i for hidden [n, D], head [V, D], ids i32[n], weights f32[n]."""
    chunk = min(chunk, hidden.shape[0])

    def add(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        hidden, ids, weights = part
        return total + _chunk_nll(hidden, head, ids, weights)[0], None

    return jax.lax.scan(add, jnp.float32(0), tuple(_chunks(chunk, hidden, ids, weights)))[0]


def _forward(
    chunk: int, hidden: jax.Array, head: jax.Array, ids: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple]:
    chunk = min(chunk, hidden.shape[0])

    def add(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, grad_head = carry
        hidden, ids, weights = part
        nll, softmax = _chunk_nll(hidden, head, ids, weights)
        # d nll / d logits = weights * (softmax - one_hot(ids))
        grad = softmax * weights[:, None]
        grad = grad.at[jnp.arange(chunk, dtype=jnp.int32), ids].add(-weights, mode="promise_in_bounds")
        grad_head = grad_head + _product("tv,td->vd", grad, hidden)
        return (total + nll, grad_head), _product("tv,vd->td", grad, head)

    init = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, grad_head), grad_hidden = jax.lax.scan(add, init, tuple(_chunks(chunk, hidden, ids, weights)))
    grad_hidden = grad_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    # Casting here keeps what is saved at the size of the inputs.
    return total, (grad_hidden.astype(hidden.dtype), grad_head.astype(head.dtype))


def _backward(chunk: int, saved: tuple, cotangent: jax.Array) -> tuple:
    del chunk
    grad_hidden, grad_head = (cotangent.astype(grad.dtype) * grad for grad in saved)
    return grad_hidden, grad_head, None, None  # targets and weights are data


_weighted_nll.defvjp(_forward, _backward)


class LossParts(NamedTuple):
    """The terms of the loss before weighting, f32[] each."""

    main: jax.Array
    mtp: jax.Array
    balance: jax.Array  # summed over layers

    def total(self) -> jax.Array:
        """L = main + 0.3 mtp + 1e-4 balance."""
        return self.main + MTP_WEIGHT * self.mtp + BALANCE_WEIGHT * self.balance
