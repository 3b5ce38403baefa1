"""Batches without end from documents of any source: shuffled, packed, shared among processes, resumable.

An epoch reads every document once, in an order that depends on the seed and the epoch alone. Documents are
packed together in windows, in that order; a window's rows are shuffled and then follow each other. So where a
stream stands is three numbers: the epoch, the first document of the window, and the next row of it.

Every process packs the same rows of the same documents and lays out only its own, rows i B / n to
(i + 1) B / n of each batch: the global batches are the same for any number of processes, and one state fits
them all. The price is that each process tokenises all texts; of token files it reads its own rows only.
"""

import collections
import logging
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dsv4_jax.config.quantities import integer_problem, seed_problem
from dsv4_jax.training.data import Batch
from dsv4_jax.training.documents import BadRecord, DataError, Document, Documents, Reading
from dsv4_jax.training.packing import Row, best_fit_rows, laid_out

LOGGER = logging.getLogger(__name__)
MAX_DOCUMENTS = 2**31
"""What Grain's shuffle can number."""

AHEAD = 128
"""Documents that threads read before they are wanted."""

KEPT_BAD_RECORDS = 20
_ORDER_OF_ROWS = 1  # which draw of an epoch; documents draw from their own counters


class Place(NamedTuple):
    """A document in the order of an epoch, or the next row of the window that begins with it."""

    epoch: int
    document: int
    row: int = 0
    skipped: int = 0  # bad records before this document


class _Window(NamedTuple):
    """Documents that were packed together, and their rows in the order in which they are given."""

    tokens: list[np.ndarray]
    counts: list[np.ndarray] | None
    numbers: list[int]  # of the documents in the source
    rows: list[Row]
    following: Place


class PackedStream:
    """A `BatchStream` of packed rows; sources open it.

    Args:
        documents: what to read.
        batch_size: B, rows of the global batch. It may differ from that of a state that is restored.
        seq_len: T.
        seed: of all orders and of what is random about a document.
        reading: how records become rows.
        process_index: which of `num_processes` this is; it gets that part of the rows of every batch.
        vocab_size: ids must be below it; None: not checked.

    Attributes:
        bad_records: the first of those that were skipped since the stream was opened.

    Raises:
        DataError: sizes, a seed or settings that cannot be; a source without documents; all problems at once.
            Later, from `__next__`: the bad records of a window, if they are refused; an epoch without a
            document; ids outside the vocabulary.
    """

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        seq_len: int,
        seed: int,
        reading: Reading,
        process_index: int = 0,
        num_processes: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        _check(documents, batch_size, seq_len, seed, reading, process_index, num_processes)
        self._documents, self._reading, self._vocab_size = documents, reading, vocab_size
        self._batch_size, self._seq_len, self._seed = batch_size, seq_len, seed
        share = batch_size // num_processes
        self._own = range(process_index * share, (process_index + 1) * share)
        self._window_tokens = reading.window_tokens(seq_len)
        self.bad_records: list[BadRecord] = []
        self._place = self._restored = Place(0, 0)
        self._window: _Window | None = None
        # What was read but belongs to the window that begins at this place, and the records after it.
        self._ahead: tuple[Place, collections.deque[tuple[int, Document | BadRecord]]] | None = None
        self._records: Iterator[tuple[int, Document | BadRecord]] = iter(())

    def __iter__(self) -> "PackedStream":
        return self

    def __next__(self) -> Batch:
        """This process' rows of the next batch: i32[B / n, T] twice, and bool[B / n, T] of chats."""
        rows = []
        for index in range(self._batch_size):
            window = self._current_window()
            if index in self._own:
                rows.append(self._laid_out(window, self._place.row))
            self._place = self._place._replace(row=self._place.row + 1)
        tokens, segments, counts = zip(*rows, strict=True)
        counted = None if counts[0] is None else np.stack(counts)
        return Batch(np.stack(tokens).astype(np.int32), np.stack(segments), counted)

    @property
    def skipped(self) -> int:
        """Bad records that were skipped since the first document of the first epoch, over all runs."""
        return self._following(self._standing()).skipped

    @property
    def epoch(self) -> int:
        """Of the next row; the first is 0."""
        return self._standing().epoch

    def state(self) -> dict[str, int]:
        """Where the stream stands; the same in every process."""
        place = self._standing()
        following = self._following(place)
        return {
            "seed": self._seed,
            "documents": len(self._documents),
            "seq_len": self._seq_len,
            "window_tokens": self._window_tokens,
            **place._asdict(),
            "following_epoch": following.epoch,
            "following_document": following.document,
            "following_skipped": following.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, by a stream of the same documents and seed.

        Batch size, processes and threads may differ: the same rows follow. With another seq_len (the next
        stage of a run) or window, the rows are others, and begin with the first document after the window in
        which the state was taken: no document is given twice, and those of at most one window are left out
        of that epoch.

        Raises:
            DataError: a state of another source or seed, or no state at all.
        """
        values = {}
        problems = []
        for name, least in _STATE.items():
            if problem := integer_problem(name, state.get(name), least):
                problems.append(problem)
            else:
                values[name] = operator.index(state[name])
        for name, own in (("seed", self._seed), ("documents", len(self._documents))):
            if name in values and values[name] != own:
                problems.append(f"{name}={values[name]} of the state is not {own} of this stream")
        if problems:
            raise DataError("cannot restore the stream of training data", problems)
        same = (values["seq_len"], values["window_tokens"]) == (self._seq_len, self._window_tokens)
        following = Place(
            values["following_epoch"], values["following_document"], 0, values["following_skipped"]
        )
        self._window = self._ahead = None
        self._restored = following
        self._place = Place(*(values[name] for name in Place._fields)) if same else following

    # ---- windows ---------------------------------------------------------------------------------

    def _standing(self) -> Place:
        """The place of the next row, which is in the next window when this one is used up."""
        if self._window is not None and self._place.row >= len(self._window.rows):
            return self._window.following
        return self._place

    def _following(self, place: Place) -> Place:
        """Where a stream with other windows would go on from this place."""
        if place.row == 0:
            return place
        return self._restored if self._window is None else self._window.following

    def _current_window(self) -> _Window:
        """The window of the next row."""
        empty_since = None
        self._place = self._standing()
        if self._window is not None and self._place != self._window.following:
            return self._window
        while True:
            window = self._read_window(self._place)
            if self._place.row < len(window.rows):
                self._window = window
                return window
            if self._place.row:
                why = f"row {self._place.row} of a window that has {len(window.rows)}"
                raise DataError("the training data is not what the restored state was taken of", [why])
            if empty_since is not None and window.following.epoch > empty_since:
                shown = [str(bad) for bad in self.bad_records] or ["there are none"]
                raise DataError("no document of the training data can be used", shown)
            empty_since = self._place.epoch if empty_since is None else empty_since
            self._place = window.following

    def _read_window(self, start: Place) -> _Window:
        ahead = self._records_from(start)
        left = len(self._documents) - start.document
        read: list[tuple[int, Document | BadRecord]] = []
        totals = [0]  # tokens of the first so many records
        while len(read) < left and totals[-1] < self._window_tokens + self._seq_len:
            number, record = ahead.popleft() if ahead else next(self._records)
            record = self._fitting(number, record)
            read.append((number, record))
            totals.append(totals[-1] + (len(record.tokens) if isinstance(record, Document) else 0))
        end = left if len(read) == left else _best_end(totals, self._window_tokens, self._seq_len)
        bad = [record for _, record in read[:end] if isinstance(record, BadRecord)]
        self._judge(bad)
        skipped = start.skipped + len(bad)
        following = Place(start.epoch, start.document + end, 0, skipped)
        if end == left:
            following = Place(start.epoch + 1, 0, 0, skipped)
        self._ahead = (following, collections.deque(read[end:]))
        good = [(number, record) for number, record in read[:end] if isinstance(record, Document)]
        tokens = [record.tokens for _, record in good]
        counts = [record.counts for _, record in good if record.counts is not None] or None
        rows = best_fit_rows(list(map(len, tokens)), self._seq_len)
        order = self._draw(start.epoch, _ORDER_OF_ROWS, start.document).permutation(len(rows))
        numbers = [number for number, _ in good]
        return _Window(tokens, counts, numbers, [rows[index] for index in order], following)

    def _fitting(self, number: int, record: Document | BadRecord) -> Document | BadRecord:
        if isinstance(record, BadRecord) or not record.whole or len(record.tokens) <= self._seq_len:
            return record
        why = f"has {len(record.tokens)} tokens, more than seq_len={self._seq_len}, and is not cut"
        return BadRecord(self._documents.place(number), why)

    def _records_from(self, start: Place) -> collections.deque[tuple[int, Document | BadRecord]]:
        """(number, document) in the order of the epoch, as far as it was read; `_records` has the rest."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == start and start.document:
            return ahead[1]
        import grain  # takes as long as JAX to import

        # Grain adds the epoch to its seed, and would begin one seed's order with another's second epoch.
        seed = np.random.SeedSequence([self._seed, start.epoch]).generate_state(1)[0]
        read = _Epoch(self, start.epoch)
        ordered = grain.MapDataset.source(read).shuffle(seed=int(seed)).slice(slice(start.document, None))
        threads = self._reading.num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD if threads else 0)
        self._records = iter(ordered.to_iter_dataset(options))
        return collections.deque()

    def _judge(self, bad: list[BadRecord]) -> None:
        if not bad:
            return
        if self._reading.bad_records == "refuse":
            advice = 'bad_records="skip" counts such records and goes on'
            raise DataError(f"the training data has bad records ({advice})", list(map(str, bad)))
        self.bad_records += bad[: KEPT_BAD_RECORDS - len(self.bad_records)]
        if 0 in self._own:
            for record in bad:
                LOGGER.warning("skipped a record: %s", record)

    def _draw(self, epoch: int, purpose: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=[0, 0, purpose, number]))

    def _laid_out(self, window: _Window, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        row = window.rows[index]
        self._check_ids(window, row)
        tokens, segments = laid_out(row, window.tokens, self._seq_len)
        if window.counts is None:
            return tokens, segments, None
        return tokens, segments, laid_out(row, window.counts, self._seq_len)[0]

    def _check_ids(self, window: _Window, row: Row) -> None:
        if self._vocab_size is None:
            return
        problems = []
        for piece in row:
            tokens = window.tokens[piece.document][piece.start : piece.stop]
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._vocab_size:
                place = self._documents.place(window.numbers[piece.document])
                ids = f"token ids {low} to {high}"
                problems.append(f"{place}: has {ids}; those of the tokenizer are below {self._vocab_size}")
        if problems:
            raise DataError("the training data was not made with this tokenizer", problems)


_STATE = {
    "seed": 0,
    "documents": 1,
    "seq_len": 1,
    "window_tokens": 1,
    "epoch": 0,
    "document": 0,
    "row": 0,
    "skipped": 0,
    "following_epoch": 0,
    "following_document": 0,
    "following_skipped": 0,
}
"""Names of a state and their least values."""


class _Epoch:
    """The documents as one epoch reads them, with their numbers: what Grain takes as a source."""

    def __init__(self, stream: PackedStream, epoch: int) -> None:
        self._documents, self._draw, self._epoch = stream._documents, stream._draw, epoch

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number: int) -> tuple[int, Document | BadRecord]:
        number = int(number)
        return number, self._documents.read(number, self._draw(self._epoch, 0, number))


def _best_end(totals: list[int], least: int, seq_len: int) -> int:
    """How many records a window takes: at least so many tokens, and as near to full rows as can be.

    Args:
        totals: tokens of the first 0, 1, 2, ... records; the last of them is at least `least`.
    """
    first = next(end for end, total in enumerate(totals) if total >= least)
    return min(range(first, len(totals)), key=lambda end: -totals[end] % seq_len / totals[end])


def _check(
    documents: Documents,
    batch_size: int,
    seq_len: int,
    seed: int,
    reading: Reading,
    process_index: int,
    num_processes: int,
) -> None:
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "num_processes": num_processes}
    problems = [problem for name, size in sizes.items() if (problem := integer_problem(name, size, 1))]
    if not problems and batch_size % num_processes:
        problems.append(f"batch_size={batch_size} must be a multiple of num_processes={num_processes}")
    if not problems and (problem := integer_problem("process_index", process_index, 0, num_processes - 1)):
        problems.append(problem)
    if problem := seed_problem(seed):
        problems.append(problem)
    problems += reading.problems()
    if not 0 < len(documents) <= MAX_DOCUMENTS:
        problems.append(f"the source has {len(documents)} documents; 1 to {MAX_DOCUMENTS} can be read")
    if problems:
        raise DataError("cannot open the training data", problems)
