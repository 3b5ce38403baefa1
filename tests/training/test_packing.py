"""Best-fit packing: every token in one row, rows as full as they must be, segments from the left."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.training.packing import best_fit_rows, cut, laid_out

LENGTHS = st.lists(st.integers(0, 40), max_size=40)


def filled(row):
    return sum(piece.length for piece in row)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 23))
def test_every_token_is_in_one_row_and_no_two_rows_could_be_one(lengths, seq_len):
    rows = best_fit_rows(lengths, seq_len)
    found = [(p.document, t) for row in rows for p in row for t in range(p.start, p.stop)]
    assert sorted(found) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    used = sorted(map(filled, rows))
    assert all(0 < n <= seq_len for n in used)
    assert len(used) < 2 or used[0] + used[1] > seq_len
    assert rows == best_fit_rows(lengths, seq_len)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 23))
def test_only_documents_longer_than_a_row_are_cut_and_as_rarely_as_possible(lengths, seq_len):
    pieces = [piece for row in best_fit_rows(lengths, seq_len) for piece in row]
    for number, length in enumerate(lengths):
        own = sorted(piece for piece in pieces if piece.document == number)
        assert len(own) == -(-length // seq_len)
        assert all(piece.length == seq_len for piece in own[:-1])


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 23))
def test_a_row_on_paper_has_segments_from_the_left_and_zeros_behind(lengths, seq_len):
    documents = [
        1 + 100 * number + np.arange(length, dtype=np.uint16) for number, length in enumerate(lengths)
    ]
    for row in best_fit_rows(lengths, seq_len):
        tokens, segments = laid_out(row, documents, seq_len)
        assert tokens.shape == segments.shape == (seq_len,) and segments.dtype == np.int32
        expected = [n for n, piece in enumerate(row, 1) for _ in range(piece.length)]
        assert segments.tolist() == expected + [0] * (seq_len - len(expected))
        wanted = np.concatenate([documents[p.document][p.start : p.stop] for p in row])
        np.testing.assert_array_equal(tokens[: len(wanted)], wanted)
        assert not tokens[len(wanted) :].any()


@pytest.mark.parametrize(
    ("lengths", "seq_len", "expected"),
    [
        ([], 4, []),
        ([0, 0], 4, []),
        ([3, 2, 1, 2], 4, [[(0, 0, 3), (2, 0, 1)], [(1, 0, 2), (3, 0, 2)]]),
        ([9], 4, [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 9)]]),
        # best fit: the 2 goes into the row that it fills, not into the first row with space
        ([5, 6, 2], 8, [[(1, 0, 6), (2, 0, 2)], [(0, 0, 5)]]),
    ],
)
def test_small_packings(lengths, seq_len, expected):
    assert [list(map(tuple, row)) for row in best_fit_rows(lengths, seq_len)] == expected


def test_best_fit_prefers_the_fullest_row():
    # After 6 and 5 are placed, spaces are 2 and 3; a piece of 2 must take the space of 2, whichever is first.
    for lengths in ([6, 5, 2], [5, 6, 2]):
        rows = best_fit_rows(lengths, 8)
        assert sorted(map(filled, rows)) == [5, 8]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 17])
def test_pieces_of_a_document_are_full_but_the_last(length):
    pieces = cut(3, length, 8)
    assert [piece.length for piece in pieces] == [8] * (length // 8) + [length % 8] * bool(length % 8)
    assert all(piece.document == 3 for piece in pieces)
