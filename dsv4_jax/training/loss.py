"""What training minimises: L = CE_main + lambda_mtp CE_mtp + alpha_bal sum over layers of L_bal, and what a
stage adds: the indexers' loss, which has parameters of its own, and a z-loss.

Report, sections 2.1 and 4.2. The layers report their balance losses and index losses themselves
(`model.layer_report`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsv4_jax.model.operations import Operation
from dsv4_jax.training.data import PADDING_SEGMENT
from dsv4_jax.training.step_settings import Rates


class Targets(NamedTuple):
    """What each position should predict, and whether it counts."""

    ids: Int32[Array, "B T"]
    valid: Bool[Array, "B T"]


def shifted_targets(
    tokens: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
    offset: int,
    counts: Bool[Array, "B T"] | None = None,
) -> Targets:
    """Position t predicts token t + `offset` of its own segment: 1 for the head, 2 for the MTP block.

    The last `offset` positions of a segment and padding (segment id 0) have no target, and neither has a
    position whose token t + `offset` does not count (`data.Batch.counts`).
    """
    pad = ((0, 0), (0, min(offset, tokens.shape[1])))
    ids = jnp.pad(tokens[:, offset:], pad)
    segment = jnp.pad(segment_ids[:, offset:], pad, constant_values=PADDING_SEGMENT)
    valid = (segment == segment_ids) & (segment_ids != PADDING_SEGMENT)
    if counts is not None:
        valid &= jnp.pad(counts[:, offset:], pad)
    return Targets(ids, valid)


def mean_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Targets,
    cross_entropy: Operation,
    total: Float32[Array, ""] | None = None,
    z_weight: Float32[Array, ""] | None = None,
) -> Float32[Array, ""] | tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Mean over valid targets of -log softmax(hidden head^T)[target], in nats; 0 without any target.

    **Equation** CE = sum_t valid_t (logsumexp_v(h_t . head_v) - h_t . head_target) / sum_t valid_t
    (report, section 2.1).

    **Args** hidden: what the head multiplies (after the final norm); head: output rows; targets;
    cross_entropy: the model's (`model.operations`), which also says what numbers, memory and gradients cost;
    total: what to divide by, where these are a part of the targets; None: the number of valid ones here;
    z_weight: adds so many times the mean of the squared log-sum-exp, which is then returned too; without a
    gradient, as it is in the first result.
    """
    weights = targets.valid.astype(jnp.float32)
    weights = weights / jnp.maximum(weights.sum() if total is None else total, 1.0)
    given = () if z_weight is None else (z_weight,)
    return cross_entropy(hidden, head, targets.ids, weights, *given)


USUAL = Rates(np.float32(0))
"""The weights of the report, of steps that change nothing."""


class LossParts(NamedTuple):
    """The terms of the loss before weighting, f32[] each."""

    main: jax.Array
    mtp: jax.Array
    balance: jax.Array  # summed over layers
    indexer: jax.Array | float = 0.0  # nats per token, summed over the layers that have an indexer
    z: jax.Array | float = 0.0  # mean of the squared log-sum-exp; without the gradient, which main has

    def total(self, rates: Rates = USUAL) -> jax.Array:
        """L = main + 0.3 mtp + 1e-4 balance, and the indexers' loss; the weights are those of `rates`."""
        language = self.main + rates.mtp * self.mtp + rates.balance * self.balance
        return language + rates.indexer * self.indexer + rates.z * self.z
