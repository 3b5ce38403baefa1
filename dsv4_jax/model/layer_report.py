"""What a layer says of its routing: two small numbers for training, reduced where the routing is made.

Scores f32[B, T, E] of every layer would have to be kept for the backward pass; a report has the size of
the experts. Formulas of the balance loss as in DeepSeek-V3 (arXiv 2412.19437); V4 report, section 4.2.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from dsv4_jax.model.router import Routing
from pallas_kernels.precision import einsum_float32


class LayerReport(NamedTuple):
    """How one layer, or each repeat of a layer in a stack, used its experts in one call."""

    loads: Float32[Array, "*R E"]  # tokens of the call that each expert received, of those that count
    balance: Float32[Array, "*R"]  # balance loss, 1 = uniform; 0 for hash routing, which has none

    @classmethod
    def of(cls, routing: Routing, counted: Bool[Array, "B T"], is_learned: bool) -> Self:
        """The report of one layer.

        Args:
            routing: of all B T tokens.
            counted: tokens whose routing counts: no padding.
            is_learned: whether the layer's router learns what it chooses.
        """
        experts = routing.experts.reshape(*counted.shape, -1)
        scores = routing.scores.reshape(*counted.shape, -1)
        loads = row_loads(experts, counted, scores.shape[-1]).sum(axis=0)
        return cls(loads, balance_loss(scores, experts, counted) if is_learned else jnp.float32(0))

    def stacked_once(self) -> Self:
        """The report of a layer without repeats, as a stack of one."""
        return jax.tree.map(lambda leaf: leaf[None], self)


class ModelReport(NamedTuple):
    """The reports of all layers, each at the place of its parameters in the parameter tree."""

    stacks: tuple[tuple[LayerReport, ...], ...]  # [i][j] is of `stacks/i/blocks/j`, stacked over repeats
    mtp: tuple[LayerReport, ...] = ()  # [d] is of `mtp/d/block`, a stack of one

    def balance(self) -> Float32[Array, ""]:
        """The balance losses of all layers, summed."""
        # [R] of each position of a unit become [R, positions], which is the order of the layers.
        by_stack = [jnp.stack([report.balance for report in stack], axis=1) for stack in self.stacks]
        layers = [*by_stack, *(report.balance for report in self.mtp)]
        losses = jnp.concatenate([balance.reshape(-1) for balance in layers])
        # One after the other: the order of a plain sum, and with it the last bit, is the compiler's choice.
        return jax.lax.scan(lambda total, loss: (total + loss, None), jnp.float32(0), losses)[0]


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
    mean_share = einsum_float32("bte,bt->be", share, weights) / jnp.maximum(tokens, 1.0)[:, None]
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
