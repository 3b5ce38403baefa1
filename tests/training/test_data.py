"""Packed rows: every token once, segments right, any step reachable directly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.training.data import PADDING_SEGMENT, TrainingRows, validation_batches


def make_documents(lengths):
    """Tokens that name their document and place: 1000 * document + place."""
    return [1000 * i + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]


def check_layout(batch):
    """Segments follow from the tokens of `make_documents`."""
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        valid = segments != PADDING_SEGMENT
        num_valid = valid.sum()
        assert valid[:num_valid].all() and not tokens[~valid].any()
        documents = tokens // 1000
        for t in range(num_valid):
            new = t == 0 or documents[t] != documents[t - 1]
            assert segments[t] == (1 if t == 0 else segments[t - 1] + new)
            if not new:
                assert tokens[t] == tokens[t - 1] + 1


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    seq_len=st.integers(1, 17),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_holds_every_token_at_most_once(lengths, batch_size, seq_len, seed):
    documents = make_documents(lengths)
    total = sum(lengths)
    if total < seq_len:
        with pytest.raises(ValueError, match=f"{total} tokens"):
            TrainingRows(documents, batch_size, seq_len, seed)
        return
    rows = TrainingRows(documents, batch_size, seq_len, seed)
    assert rows.rows_per_epoch == total // seq_len
    seen = []
    for step in range(-(-rows.rows_per_epoch // batch_size)):
        batch = rows.batch(step)
        assert all(part.shape == (batch_size, seq_len) for part in batch[:2]) and batch.counts is None
        assert all(part.dtype == np.int32 for part in batch[:2])
        check_layout(batch)
        seen.append(batch.tokens.reshape(-1))
    first_epoch = np.concatenate(seen)[: rows.rows_per_epoch * seq_len]
    assert len(np.unique(first_epoch)) == len(first_epoch)


def test_any_step_can_be_made_first_and_seeds_and_epochs_differ():
    documents = make_documents([50, 3, 70, 20, 9])
    rows = TrainingRows(documents, 3, 8, seed=5)
    inorder = [rows.batch(step).tokens for step in range(30)]
    for step in (29, 0, 13, 6, 7):
        fresh = TrainingRows(documents, 3, 8, seed=5)
        np.testing.assert_array_equal(fresh.batch(step).tokens, inorder[step])
    other = TrainingRows(documents, 3, 8, seed=6)
    assert any((other.batch(s).tokens != inorder[s]).any() for s in range(3))
    per_epoch = rows.rows_per_epoch
    flat = np.concatenate(inorder)
    assert (flat[:per_epoch] != flat[per_epoch : 2 * per_epoch]).any()


@pytest.mark.parametrize("lengths", [[1], [7, 1, 1, 30], [16, 16], [33, 2]])
def test_validation_holds_every_token_exactly_once_in_order(lengths):
    documents = make_documents(lengths)
    batches = validation_batches(documents, batch_size=2, seq_len=8)
    tokens = []
    for batch in batches:
        assert batch.tokens.shape == (2, 8)
        check_layout(batch)
        tokens.append(batch.tokens[batch.segment_ids != PADDING_SEGMENT])
    np.testing.assert_array_equal(np.concatenate(tokens), np.concatenate(documents))


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_sizes_and_seeds_that_are_no_integers_are_named_together(size):
    documents = [np.arange(40, dtype=np.int32)]
    with pytest.raises(ValueError, match="batch_size=.*; seq_len=.*; seed=-1"):
        TrainingRows(documents, size, size, -1)
    with pytest.raises(ValueError, match="batch_size=.*; seq_len="):
        validation_batches(documents, size, size)
    with pytest.raises(ValueError, match="step=-1 must be an integer of at least 0"):
        TrainingRows(documents, 2, 4, 0).batch(-1)
