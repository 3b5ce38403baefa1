"""The baseline that knows how often each token occurs and nothing else."""

from collections.abc import Iterable, Sequence

import numpy as np

from dsv4_jax.training.data import PADDING_SEGMENT, Batch


def unigram_probabilities(documents: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """float64[V]: smoothed relative frequencies (one added to each count) of everything predictable.

    The first token of a document (bos) is given, never predicted, so it is not counted.
    """
    counts = np.ones(vocab_size)
    for document in documents:
        counts += np.bincount(document[1:], minlength=vocab_size)
    return counts / counts.sum()


def unigram_loss(probabilities: np.ndarray, batches: Iterable[Batch]) -> float:
    """Mean negative log-likelihood in nats over the same targets the model is scored on.

    A position is a target if the position before it in its row belongs to the same segment.
    """
    total, count = 0.0, 0
    for batch in batches:
        segments = batch.segment_ids
        is_target = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != PADDING_SEGMENT)
        targets = batch.tokens[:, 1:][is_target]
        total -= np.log(probabilities[targets]).sum()
        count += targets.size
    return float(total / max(count, 1))
