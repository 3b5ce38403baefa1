"""Streams of packed rows: every document once an epoch, the same batches however read, any restart."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.training.documents import BadRecord, DataError, Document, Reading
from dsv4_jax.training.stream import PackedStream

PLACES = 100
"""Token = PLACES * document + place in it."""


class Lengths:
    """Documents of these lengths whose tokens name their document and place; a length of None is bad."""

    def __init__(self, lengths, counted=False, whole=False):
        self.lengths, self.counted, self.whole = lengths, counted, whole

    def __len__(self):
        return len(self.lengths)

    def place(self, number):
        return f"record {number}"

    def read(self, number, draw):
        length = self.lengths[number]
        if length is None:
            return BadRecord(self.place(number), "is bad")
        tokens = PLACES * number + np.arange(length, dtype=np.int32)
        return Document(tokens, tokens % 3 == 1 if self.counted else None, self.whole)


QUIET = Reading(num_threads=0, window_rows=3)


def stream(lengths, batch_size=2, seq_len=8, seed=0, reading=QUIET, process=(0, 1), **documents):
    return PackedStream(Lengths(lengths, **documents), batch_size, seq_len, seed, reading, *process)


def valid_tokens(batch):
    return batch.tokens[batch.segment_ids > 0].tolist()


def assert_same(batch, other):
    for part, wanted in zip(batch, other, strict=True):
        np.testing.assert_array_equal(part, wanted)


def rows_of_epochs(reader, epochs):
    """The valid tokens of each of the first epochs, by a stream with one row a batch."""
    found = [[] for _ in range(epochs + 1)]
    while (epoch := reader.epoch) < epochs:
        found[epoch] += valid_tokens(next(reader))
    return found[:epochs]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    seq_len=st.integers(1, 17),
    window_rows=st.integers(1, 9),
    seed=st.integers(0, 2**62),
)
def test_an_epoch_has_every_token_exactly_once(lengths, seq_len, window_rows, seed):
    reading = Reading(num_threads=0, window_rows=window_rows)
    epochs = rows_of_epochs(stream(lengths, 1, seq_len, seed, reading), 2)
    everything = [PLACES * d + t for d, length in enumerate(lengths) for t in range(length)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything


LENGTHS = [5, 30, 1, 8, 8, 3, 17, 2, 9, 4, 4, 11, 6, 7, 1, 1, 20]


def test_orders_differ_by_seed_and_by_epoch_and_rows_are_not_sorted_by_length():
    first, second = rows_of_epochs(stream(LENGTHS, 1), 2)
    other = rows_of_epochs(stream(LENGTHS, 1, seed=1), 1)[0]
    assert first != second and first != other and second != other
    # Grain's own epochs of seed 0 would begin as those of seed 1 do.
    assert rows_of_epochs(stream(LENGTHS, 1, seed=1), 1)[0] != second
    wide = stream(LENGTHS, 1, reading=Reading(num_threads=0, window_rows=100))
    longest = [np.bincount(next(wide).segment_ids[0], minlength=2)[1:].max() for _ in range(15)]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    plain = stream(LENGTHS)
    threaded = stream(LENGTHS, reading=Reading(num_threads=threads, window_rows=3))
    for _ in range(40):
        assert_same(next(threaded), next(plain))
        assert threaded.state() == plain.state()


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_rows_of_the_same_batches_and_their_states_are_one(processes):
    alone = stream(LENGTHS, 6)
    together = [stream(LENGTHS, 6, process=(index, processes)) for index in range(processes)]
    for _ in range(12):
        parts = [next(reader) for reader in together]
        assert all(part.tokens.shape == (6 // processes, 8) for part in parts)
        batch = next(alone)
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), batch.tokens)
        np.testing.assert_array_equal(np.concatenate([part.segment_ids for part in parts]), batch.segment_ids)
        assert all(reader.state() == alone.state() for reader in together)


@settings(max_examples=12, deadline=None)
@given(steps=st.integers(0, 30), counted=st.booleans(), seed=st.integers(0, 5))
def test_a_state_is_all_that_a_restart_needs(steps, counted, seed):
    reader = stream(LENGTHS, seed=seed, counted=counted)
    for _ in range(steps):
        next(reader)
    state = json.loads(json.dumps(reader.state()))
    assert len(json.dumps(state)) < 400
    again = stream(LENGTHS, seed=seed, counted=counted)
    next(again)  # whatever it did before
    again.restore(state)
    assert again.state() == state
    for _ in range(12):
        assert_same(next(again), next(reader))
    assert again.state() == reader.state()


def test_a_state_fits_other_batch_sizes_and_processes():
    reader = stream(LENGTHS, 3)
    for _ in range(7):
        next(reader)
    state = reader.state()
    rows = np.concatenate([next(reader).tokens for _ in range(8)])
    halves = [stream(LENGTHS, 4, process=(index, 2)) for index in range(2)]
    for half in halves:
        half.restore(state)
    batches = [np.concatenate([next(half).tokens for half in halves]) for _ in range(6)]
    np.testing.assert_array_equal(np.concatenate(batches), rows)


def test_another_length_goes_on_behind_the_window_and_gives_nothing_twice():
    reader = stream(LENGTHS, 1)
    seen = [token for _ in range(4) for token in valid_tokens(next(reader))]
    state = reader.state()
    assert state["row"] > 0
    longer = stream(LENGTHS, 1, seq_len=16)
    longer.restore(state)
    rest = rows_of_epochs(longer, 1)[0]
    assert rest and not set(rest) & set(seen)
    everything = {PLACES * d + t for d, n in enumerate(LENGTHS) for t in range(n)}
    assert 0 < len(everything - set(seen) - set(rest)) < 3 * 8 + max(LENGTHS)


def test_another_length_leaves_nothing_out_between_two_windows():
    reader = stream(LENGTHS, 1)
    seen = valid_tokens(next(reader))
    while (state := reader.state())["row"]:
        seen += valid_tokens(next(reader))
    assert state["epoch"] == 0
    longer = stream(LENGTHS, 1, seq_len=16)
    longer.restore(state)
    everything = [PLACES * d + t for d, n in enumerate(LENGTHS) for t in range(n)]
    assert sorted(seen + rows_of_epochs(longer, 1)[0]) == everything


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=1 of the state is not 0 of this stream"),
        ({"documents": 5}, "documents=5 of the state is not 17 of this stream"),
        ({"row": -1}, "row=-1 must be an integer of at least 0"),
        ({"row": None}, "row=None"),
        ({"epoch": "0"}, "epoch='0'"),
    ],
)
def test_a_state_of_something_else_is_refused(change, message):
    reader = stream(LENGTHS)
    with pytest.raises(DataError, match=message):
        reader.restore(reader.state() | change)


def test_every_problem_of_a_state_is_named():
    with pytest.raises(DataError) as error:
        stream(LENGTHS).restore({})
    assert len(error.value.problems) == 11


def test_a_row_that_is_not_there_says_that_the_data_changed():
    reader = stream(LENGTHS)
    reader.restore(reader.state() | {"row": 1000})
    with pytest.raises(DataError, match="row 1000 of a window that has"):
        next(reader)


BAD = [5, None, 3, 8, None, 6]
SKIP = Reading("skip", num_threads=0, window_rows=3)


def test_bad_records_are_named_together_and_end_the_run():
    with pytest.raises(DataError) as error:
        next(stream(BAD, reading=Reading(num_threads=2, window_rows=100)))
    assert sorted(error.value.problems) == ["record 1: is bad", "record 4: is bad"]
    assert 'bad_records="skip"' in str(error.value)


def test_skipped_records_are_counted_once_an_epoch_over_restarts(caplog):
    reader = stream(BAD, 1, reading=SKIP)
    epochs = rows_of_epochs(reader, 3)
    everything = [PLACES * d + t for d, length in enumerate(BAD) for t in range(length or 0)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert reader.state()["skipped"] == 6
    assert {str(bad) for bad in reader.bad_records} == {"record 1: is bad", "record 4: is bad"}
    assert "skipped a record: record 1: is bad" in caplog.messages

    reader = stream(BAD, 1, reading=SKIP)
    for _ in range(9):
        next(reader)
        again = stream(BAD, 1, reading=SKIP)
        again.restore(reader.state())
        reader = again
        next(reader)
    straight = stream(BAD, 1, reading=SKIP)
    for _ in range(18):
        next(straight)
    assert reader.state() == straight.state() and reader.skipped == straight.skipped > 0


def test_only_one_process_tells_of_skipped_records(caplog):
    next(stream(BAD, 2, reading=SKIP, process=(1, 2)))
    assert not caplog.messages


def test_a_source_without_a_usable_document_is_refused_instead_of_read_for_ever():
    with pytest.raises(DataError, match="no document .* can be used(.|\n)*record 1: is bad"):
        next(stream([None, None], reading=SKIP))
    with pytest.raises(DataError, match="has 0 documents"):
        stream([])


def test_a_document_that_is_not_cut_must_fit_into_a_row():
    with pytest.raises(DataError, match="record 1: has 9 tokens, more than seq_len=8, and is not cut"):
        next(stream([8, 9], whole=True))
    reader = stream([8, 9, 3], 1, reading=SKIP, whole=True)
    assert sorted(rows_of_epochs(reader, 1)[0]) == [*range(8), *range(200, 203)]


def test_counts_stand_where_their_tokens_do():
    reader = stream(LENGTHS, counted=True)
    for _ in range(20):
        batch = next(reader)
        assert batch.counts.dtype == bool
        np.testing.assert_array_equal(batch.counts, (batch.segment_ids > 0) & (batch.tokens % 3 == 1))
    assert next(stream(LENGTHS)).counts is None


def test_ids_beyond_the_vocabulary_are_refused_with_their_place():
    reader = PackedStream(Lengths([5, 5]), 1, 16, 0, QUIET, vocab_size=104)
    with pytest.raises(DataError, match="record 1: has token ids 100 to 104; those .* are below 104"):
        next(reader)
    next(PackedStream(Lengths([5, 5]), 1, 16, 0, QUIET, vocab_size=105))


def test_every_wrong_argument_is_named():
    reading = Reading(bad_records="ignore", num_threads=-1, window_rows=0)
    with pytest.raises(DataError) as error:
        PackedStream(Lengths([1]), 0, 1.5, -1, reading)
    assert len(error.value.problems) == 6
    with pytest.raises(DataError, match="batch_size=5 must be a multiple of num_processes=2"):
        stream([1], 5, process=(0, 2))
    with pytest.raises(DataError, match="process_index=2 must be an integer in 0..1"):
        stream([1], 4, process=(2, 2))


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 17, 2000).tolist()
    reader = stream(lengths, 1, 32, reading=Reading(num_threads=0, window_rows=300))
    rows = 0
    while reader.epoch == 0:
        next(reader)
        rows += 1
    windows = -(-sum(lengths) // (300 * 32))
    assert rows <= -(-sum(lengths) // 32) + windows


def test_a_window_ends_where_its_rows_are_fullest():
    # Three rows of 8 are asked for.
    reader = stream([5] * 30, 1, reading=QUIET)
    state = reader.state()
    while state["following_document"] == 0:
        next(reader)
        state = reader.state()
    # From 24 tokens on, one row more at most is read: 25, 30 or 35 tokens; 30 leave the smallest part empty.
    assert state["following_document"] == 6
