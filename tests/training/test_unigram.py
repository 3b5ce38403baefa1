"""The unigram baseline against counting by hand."""

import math

import numpy as np

from dsv4_jax.training.data import Batch, validation_batches
from dsv4_jax.training.unigram import unigram_loss, unigram_probabilities


def test_probabilities_are_smoothed_counts_without_document_starts():
    documents = [np.array([0, 2, 2, 3, 1]), np.array([0, 2, 1])]
    p = unigram_probabilities(documents, 6)
    # 2 occurs three times, 3 once, 1 twice; 0 is never predicted. One is added to each.
    np.testing.assert_allclose(p, np.array([1, 3, 4, 2, 1, 1]) / 12)


def test_loss_skips_segment_starts_row_starts_and_padding():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    batch = Batch(
        tokens=np.array([[0, 1, 2, 0, 3, 0, 0]]),
        segment_ids=np.array([[1, 1, 1, 2, 2, 0, 0]]),
    )
    # targets: 1, 2 (segment 1) and 3 (segment 2)
    expected = -(math.log(0.25) + 2 * math.log(0.125)) / 3
    assert math.isclose(unigram_loss(p, [batch]), expected)
    assert unigram_loss(p, []) == 0.0


def test_matching_text_has_the_entropy_of_its_counts():
    rng = np.random.default_rng(0)
    documents = [np.append(0, rng.integers(1, 5, 4001))]
    p = unigram_probabilities(documents, 5)
    loss = unigram_loss(p, validation_batches(documents, 2, 64))
    assert abs(loss - math.log(4)) < 0.01
