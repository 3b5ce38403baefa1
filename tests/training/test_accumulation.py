"""Parts of a batch one after the other, masked targets, packed rows: the same loss and the same gradients."""

import jax
import numpy as np
import pytest

from dsv4_jax.errors import ConfigError
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.batch_losses import BatchTotals, forward_losses
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import Sgd, merge_params, split_trainable
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from tests.models import all_kinds, compressed_kinds

CONFIG = all_kinds(hidden_size=32, hca_ratio=8, initializer_range=0.2)
NETWORK = Network(CONFIG, Policy.of("float32"))
LENGTH = 24
FLOOR = 1e-7
"""Gradients of the last collapse are differences that cancel: what is left is rounding."""


def ragged_batch(counts=True):
    """Four rows with unlike numbers of segments, targets and padding; the third is empty."""
    rng = np.random.default_rng(0)
    segments = np.ones((4, LENGTH), np.int32)
    segments[0, 11:] = 2
    segments[1, 1:] = 2
    segments[1, 20:] = 0
    segments[2] = 0
    segments[3, 7:] += np.arange(17, dtype=np.int32) // 6
    tokens = np.where(segments > 0, rng.integers(2, 61, segments.shape), 0).astype(np.int32)
    return Batch(tokens, segments, rng.random(segments.shape) < 0.6 if counts else None)


SMALL = Network(compressed_kinds(vocab_size=64, initializer_range=0.2), NETWORK.policy)
"""With an indexer and an MTP block, and quick to compile."""


def after_a_step(settings, batch):
    """Parameters after one step of plain gradient descent with rate 1, and the report."""
    state = initial_state(initial_parameters(*SMALL[:2], 3), settings.optimizer)
    rates = Rates(np.float32(1), balance=np.float32(0.5), z=np.float32(0.1))
    return jax.device_get(train_step(SMALL, settings, state, batch, rates))


@pytest.mark.parametrize("accumulate", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_parts_of_a_batch_give_the_step_of_the_whole_batch(accumulate):
    batch = ragged_batch()
    state, report = after_a_step(StepSettings(Sgd(), indexer="sparse", z_loss=True), batch)
    parts, parts_report = after_a_step(StepSettings(Sgd(), accumulate, indexer="sparse", z_loss=True), batch)
    before = initial_parameters(*SMALL[:2], 3)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    for (path, want), got, start in zip(
        leaves, jax.tree.leaves(parts.params), jax.tree.leaves(before), strict=True
    ):
        limit = 2e-5 * np.abs(want - start).max() + 1e-6
        assert np.abs(got - want).max() <= limit, jax.tree_util.keystr(path)
    np.testing.assert_array_equal(parts_report.loads, report.loads)
    assert report.indexer > 0 and report.balance > 0.5 and report.mtp > 0
    for name, want in report.scalars.items():
        np.testing.assert_allclose(parts_report.scalars[name], want, rtol=1e-5, err_msg=name)


def test_parts_must_be_equal():
    state = initial_state(initial_parameters(*SMALL[:2], 3), Sgd())
    with pytest.raises(ValueError, match="accumulate=3 does not divide the batch's 4 rows"):
        train_step(SMALL, StepSettings(Sgd(), accumulate=3), state, ragged_batch(), Rates(np.float32(1)))


def gradients(batch):
    trained, fixed = split_trainable(initial_parameters(CONFIG, NETWORK.policy, 3))

    @jax.jit
    def run(trained, batch):
        def loss(trained):
            parts, _ = forward_losses(NETWORK.holding(merge_params(trained, fixed)), batch)
            return parts.main + parts.mtp, parts

        return jax.grad(loss, has_aux=True)(trained)

    return jax.device_get(run(trained, batch))


def unpacked(batch):
    """A row for every segment, at its start."""
    rows = [[], [], []]
    for tokens, segments, counts in zip(*batch, strict=True):
        for number in range(1, segments.max() + 1):
            own = segments == number
            fill = LENGTH - own.sum()
            for row, values in zip(rows, (tokens, own.astype(np.int32), counts), strict=True):
                row.append(np.pad(values[own], (0, fill)))
    return Batch(*map(np.stack, rows))


def test_packed_rows_give_the_gradients_of_a_row_a_segment():
    """Balance losses are means over rows, so they are not in it."""
    batch = ragged_batch()
    (packed, parts), (alone, alone_parts) = gradients(batch), gradients(unpacked(batch))
    np.testing.assert_allclose(alone_parts[:2], parts[:2], rtol=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(alone)
    for (path, want), got in zip(leaves, jax.tree.leaves(packed), strict=True):
        limit = 2e-5 * np.abs(want).max() + FLOOR
        assert np.abs(got - want).max() <= limit, jax.tree_util.keystr(path)


def test_only_targets_that_count_are_averaged():
    batch = ragged_batch()
    totals = BatchTotals.of(batch)
    expected = {1: 0, 2: 0}
    for offset in expected:
        for segments, counts in zip(batch.segment_ids, batch.counts, strict=True):
            for t in range(LENGTH - offset):
                same = segments[t] == segments[t + offset] != 0
                expected[offset] += bool(same and counts[t + offset])
    assert (int(totals.main), int(totals.mtp)) == (expected[1], expected[2])
    assert int(totals.tokens) == (batch.segment_ids > 0).sum()
    assert (int(totals.rows), int(totals.further_rows)) == (3, 3)
    assert int(BatchTotals.of(ragged_batch(counts=False)).main) > expected[1]


def test_settings_say_all_that_is_wrong_with_them():
    with pytest.raises(ConfigError) as refused:
        StepSettings(Sgd(), accumulate=0, attention="none", indexer="warm-up")
    assert len(refused.value.problems) == 3
    with pytest.raises(ConfigError, match="indexer='sparse' needs attention='sparse'"):
        StepSettings(Sgd(), attention="dense", indexer="sparse")
    assert StepSettings(Sgd(), attention="dense", indexer="warm-up").mode.dense
