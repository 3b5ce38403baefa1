"""What a layer says of itself: small numbers for training, reduced where they are made.

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
    """What one layer, or each repeat of a layer in a stack, did in one call; of the tokens that count."""

    loads: Float32[Array, "*R E"]  # tokens of the call that each expert received
    balance: Float32[Array, "*R"]  # balance loss, 1 = uniform; 0 for hash routing, which has none
    index_loss: Float32[Array, "*R"]  # indexer loss, summed over tokens; 0 if not asked for, or no indexer
    clamped: Float32[Array, "*R"]  # inputs of the shared expert's SwiGLU beyond its clamp, of 2 F a token

    @classmethod
    def of(
        cls,
        routing: Routing,
        counted: Bool[Array, "B T"],
        is_learned: bool,
        index_losses: Float32[Array, "B T"] | None = None,
        clamped: Int32[Array, "*tokens"] | None = None,
    ) -> Self:
        """The report of one layer.

        Args:
            routing: of all B T tokens.
            counted: tokens whose routing counts: no padding.
            is_learned: whether the layer's router learns what it chooses.
            index_losses: of each token; None: 0.
            clamped: how many inputs of its SwiGLU were clamped, for each of the B T tokens; None: 0.
        """
        experts = routing.experts.reshape(*counted.shape, -1)
        scores = routing.scores.reshape(*counted.shape, -1)
        loads = row_loads(experts, counted, scores.shape[-1]).sum(axis=0)
        index_loss = hits = jnp.float32(0)
        if index_losses is not None:
            index_loss = jnp.sum(jnp.where(counted, index_losses, 0))
        if clamped is not None:
            hits = jnp.sum(jnp.where(counted, clamped.reshape(counted.shape), 0).astype(jnp.float32))
        balance = balance_loss(scores, experts, counted) if is_learned else jnp.float32(0)
        return cls(loads, balance, index_loss, hits)

    def stacked_once(self) -> Self:
        """The report of a layer without repeats, as a stack of one."""
        return jax.tree.map(lambda leaf: leaf[None], self)


class ModelReport(NamedTuple):
    """The reports of all layers, each at the place of its parameters in the parameter tree."""

    stacks: tuple[tuple[LayerReport, ...], ...]  # [i][j] is of `stacks/i/blocks/j`, stacked over repeats
    mtp: tuple[LayerReport, ...] = ()  # [d] is of `mtp/d/block`, a stack of one

    def by_layer(self) -> LayerReport:
        """One report whose first axis is the layers, in order, the MTP blocks' after the model's."""
        # [R] of each position of a unit become [R, positions], which is the order of the layers.
        by_stack = [
            jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *stack)
            for stack in self.stacks
        ]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *by_stack, *self.mtp)

    def weighted(self, layers: Float32[Array, ""], further: Float32[Array, ""]) -> Self:
        """The report with the balance losses of the model's layers, and of the MTP blocks, times a number."""

        def times(report: LayerReport, weight: Float32[Array, ""]) -> LayerReport:
            return report._replace(balance=report.balance * weight)

        stacks = tuple(tuple(times(report, layers) for report in stack) for stack in self.stacks)
        return self._replace(stacks=stacks, mtp=tuple(times(report, further) for report in self.mtp))

    def balance(self) -> Float32[Array, ""]:
        """The balance losses of all layers, summed."""
        losses = self.by_layer().balance
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
