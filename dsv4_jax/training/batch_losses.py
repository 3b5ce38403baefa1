"""The terms of the loss of one batch, or a part of its rows' share of them."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int16

from dsv4_jax.model import span as spans
from dsv4_jax.model.layer_report import ModelReport
from dsv4_jax.model.training_mode import INFERENCE, TrainingMode
from dsv4_jax.model.transformer import Transformer
from dsv4_jax.training.data import PADDING_SEGMENT, Batch
from dsv4_jax.training.loss import LossParts, Targets, mean_cross_entropy, shifted_targets


class BatchTotals(NamedTuple):
    """What the means over a batch divide by, f32[] each."""

    main: Float32[Array, ""]  # targets of the head
    mtp: Float32[Array, ""]  # targets of the MTP block
    tokens: Float32[Array, ""]  # without padding
    rows: Float32[Array, ""]  # that have a token
    further_rows: Float32[Array, ""]  # that have two tokens of one segment beside each other

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Those of these rows."""
        tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
        valid = segments != PADDING_SEGMENT

        def number(mask: Bool[Array, "..."]) -> Float32[Array, ""]:
            return mask.sum(dtype=jnp.float32)

        return cls(
            number(shifted_targets(tokens, segments, 1, batch.counts).valid),
            number(shifted_targets(tokens, segments, 2, batch.counts).valid),
            number(valid),
            number(valid.any(axis=1)),
            number(shifted_targets(tokens, segments, 1).valid.any(axis=1)),
        )


def forward_losses(
    model: Transformer,
    batch: Batch,
    mode: TrainingMode = INFERENCE,
    totals: BatchTotals | None = None,
    experts: Int16[Array, "layers B T Ke"] | None = None,
    z_weight: Float32[Array, ""] | None = None,
) -> tuple[LossParts, ModelReport]:
    """The terms of the loss of one batch, and what the layers report.

    Args:
        model: with its parameters.
        batch: packed rows.
        mode: of training.
        totals: of the batch that these rows are a part of: each term is then the part's share of the batch's,
            and so are the balance losses of the report. None: these rows are the batch.
        experts: of every token in every layer, the MTP block's last; None: the routers choose.
        z_weight: of the z-loss of the head's targets; None: none.
    """
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    span = spans.packed(tokens, segments)
    num_layers = model.config.num_hidden_layers
    forward = model(span, mode=mode, experts=None if experts is None else experts[:num_layers])
    cross_entropy = model.operations.cross_entropy
    targets = shifted_targets(tokens, segments, 1, batch.counts)
    num_main, num_mtp = (None, None) if totals is None else (totals.main, totals.mtp)
    hidden = model.hidden(forward.streams)
    z = jnp.float32(0)
    main = mean_cross_entropy(hidden, model.head[...], targets, cross_entropy, num_main, z_weight)
    if z_weight is not None:
        both, z = main
        main = both - z_weight * z  # z has no gradient of its own: main keeps that of both
    mtp, report = jnp.float32(0), forward.report
    if model.mtp:
        given = None if experts is None else experts[num_layers, :, :-1]
        hidden, mtp_report, _ = model.predict_further(forward.streams, span, experts=given)
        report = report._replace(mtp=(mtp_report,))
        targets = shifted_targets(tokens, segments, 2, batch.counts)
        targets = Targets(targets.ids[:, :-1], targets.valid[:, :-1])
        mtp = mean_cross_entropy(hidden, model.head[...], targets, cross_entropy, num_mtp)
    own = BatchTotals.of(batch)
    if totals is not None:
        rows = own.rows / jnp.maximum(totals.rows, 1)
        report = report.weighted(rows, own.further_rows / jnp.maximum(totals.further_rows, 1))
    num_tokens = own.tokens if totals is None else totals.tokens
    indexer = report.by_layer().index_loss.sum() / jnp.maximum(num_tokens, 1)
    return LossParts(main, mtp, report.balance(), indexer, z), report
