"""What training minimises: L = CE_main + lambda_mtp CE_mtp + alpha_bal sum over layers of L_bal.

Report, sections 2.1 and 4.2; formulas of the balance loss as in DeepSeek-V3 (arXiv 2412.19437).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax.model.operations import Operation
from dsv4_jax.training.data import PADDING_SEGMENT
from pallas_kernels.precision import einsum_float32

MTP_WEIGHT = 0.3  # report, section 4.2; 0.1 once the learning rate decays at the end
BALANCE_WEIGHT = 1e-4


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
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Targets, cross_entropy: Operation
) -> Float32[Array, ""]:
    """Mean over valid targets of -log softmax(hidden head^T)[target], in nats; 0 without any target.

    **Equation** CE = sum_t valid_t (logsumexp_v(h_t . head_v) - h_t . head_target) / sum_t valid_t
    (report, section 2.1).

    **Args** hidden: what the head multiplies (after the final norm); head: output rows; targets;
    cross_entropy: the model's (`model.operations`), which also says what numbers, memory and gradients cost.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    weights = targets.valid.reshape(-1).astype(jnp.float32)
    weights = weights / jnp.maximum(weights.sum(), 1.0)
    return cross_entropy(flat, head, targets.ids.reshape(-1), weights)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Float32 operands, products and result: the balance loss is a float32 island."""
    return einsum_float32(equation, left.astype(jnp.float32), right.astype(jnp.float32))


def balance_loss(
    scores: Float32[Array, "B T E"],
    experts: Int32[Array, "B T Ke"],
    valid: Bool[Array, "B T"],
) -> Float32[Array, ""]:
    """Sequence-wise balance loss of one learned-routing layer, mean over rows; 1 when uniform.

    With n the row's valid tokens: f_e = E / (Ke n) #(tokens of the row routed to e), a constant;
    P_e = (1 / n) sum_t s_te / sum_j s_tj; L_bal = sum_e f_e P_e. Rows without any valid token are left out.

    Args:
        scores: unbiased routing scores, >= 0; the gradient flows through these.
        experts: the experts actually chosen (with the bias).
        valid: tokens that count.
    """
    num_experts, num_active = scores.shape[-1], experts.shape[-1]
    weights = valid.astype(jnp.float32)
    tokens = weights.sum(axis=1)  # [B]
    total = scores.sum(axis=-1, keepdims=True)
    share = scores / jnp.where(total > 0, total, 1.0)
    mean_share = _product("bte,bt->be", share, weights) / jnp.maximum(tokens, 1.0)[:, None]
    frequency = row_loads(experts, valid, num_experts) * (num_experts / num_active)
    frequency = jax.lax.stop_gradient(frequency / jnp.maximum(tokens, 1.0)[:, None])
    per_row = jnp.sum(frequency * mean_share, axis=-1)
    rows = (tokens > 0).astype(jnp.float32)
    return jnp.sum(per_row * rows) / jnp.maximum(rows.sum(), 1.0)


def row_loads(
    experts: Int32[Array, "B T Ke"], valid: Bool[Array, "B T"], num_experts: int
) -> Float32[Array, "B E"]:
    """How many valid tokens of each row were routed to each expert."""
    chosen = experts[..., None] == jnp.arange(num_experts, dtype=experts.dtype)
    return jnp.sum(chosen & valid[..., None, None], axis=(1, 2), dtype=jnp.int32).astype(jnp.float32)


class LossParts(NamedTuple):
    """The terms of the loss before weighting, f32[] each."""

    main: jax.Array
    mtp: jax.Array
    balance: jax.Array  # summed over layers

    def total(self) -> jax.Array:
        """L = main + 0.3 mtp + 1e-4 balance."""
        return self.main + MTP_WEIGHT * self.mtp + BALANCE_WEIGHT * self.balance
