"""Batches of packed rows: what training consumes, and the rows of documents that fit into memory.

`TrainingRows` draws its rows in an order that depends on a seed and the step alone. A row is `seq_len`
consecutive tokens of documents laid end to end; what belongs to different documents gets different segment
ids. Any batch can be made without making those before it, so a run restarts exactly from its step number.
Sources of any size are `sources`, which give a `BatchStream`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dsv4_jax.config.quantities import checked_integer, integer_problem, seed_problem

PADDING_SEGMENT = 0
"""Segment id of positions that hold no token; those of tokens are positive."""


class Batch(NamedTuple):
    """Packed rows; numpy or jax arrays, i32[B, T] each, and bool[B, T] or None.

    Attributes:
        tokens: 0 where empty.
        segment_ids: 1, 2, ... from the left of each row; 0 where empty.
        counts: whether a token is a target of the loss (assistant tokens of a chat); None: all of them.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    counts: np.ndarray | None = None


class BatchStream(Protocol):
    """Batches without end, from which a run can go on where it was."""

    def __next__(self) -> Batch:
        """The next batch, or this process' rows of it."""

    def state(self) -> dict:
        """Where the stream stands, as a small JSON object; the batches that follow depend on it alone."""

    def restore(self, state: dict) -> None:
        """Goes to where `state` was taken."""


def _pack(tokens: np.ndarray, documents: np.ndarray, num_valid: np.ndarray) -> Batch:
    """Rows i32[B, T] of tokens and of document numbers; only the first `num_valid` i32[B] of each count."""
    num_rows, seq_len = tokens.shape
    column = np.arange(seq_len, dtype=np.int32)
    starts = np.zeros((num_rows, seq_len), bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    valid = column < num_valid[:, None]
    return Batch(
        tokens=np.where(valid, tokens, 0).astype(np.int32),
        segment_ids=np.where(valid, np.cumsum(starts, axis=1) + 1, PADDING_SEGMENT).astype(np.int32),
    )


def _concatenate(documents: Sequence[np.ndarray], order: Sequence[int]) -> np.ndarray:
    """i32[2, tokens]: the tokens of the documents in this order, and the number of each one's document."""
    tokens = np.concatenate([documents[index] for index in order])
    numbers = np.repeat(np.arange(len(order)), [len(documents[index]) for index in order])
    return np.stack([tokens, numbers]).astype(np.int32)


def _size_problems(batch_size: object, seq_len: object) -> list[str]:
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    return [problem for name, size in sizes.items() if (problem := integer_problem(name, size, 1))]


class TrainingRows:
    """Batches of full rows from shuffled documents, epoch after epoch, without end.

    Within an epoch every row is drawn once; documents and rows are shuffled anew for each epoch. The
    fewer than `seq_len` tokens at the end of an epoch are dropped.

    Args:
        documents: token ids i32[n] of each document, bos and eos included.
        batch_size: B, rows a batch.
        seq_len: T.
        seed: of the order.

    Raises:
        ValueError: for sizes below 1, a seed outside 0 .. 2^63 - 1, or when all documents together are
            shorter than one row; all problems at once.
    """

    def __init__(self, documents: Sequence[np.ndarray], batch_size: int, seq_len: int, seed: int) -> None:
        problems = _size_problems(batch_size, seq_len)
        if problem := seed_problem(seed):
            problems.append(problem)
        if problems:
            raise ValueError("; ".join(problems))
        self._documents = list(documents)
        self._seed = seed
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self.batch_size = batch_size
        self.seq_len = seq_len
        num_tokens = sum(len(document) for document in self._documents)
        self.rows_per_epoch = num_tokens // seq_len
        if self.rows_per_epoch == 0:
            raise ValueError(f"{num_tokens} tokens in all documents do not fill a row of {seq_len}")

    def _rows_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's i32[2, tokens] and its order of rows."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            order = generator.permutation(len(self._documents))
            stream = _concatenate(self._documents, order)
            self._epoch = (epoch, stream, generator.permutation(self.rows_per_epoch))
        return self._epoch[1:]

    def batch(self, step: int) -> Batch:
        """The batch of a training step, counted from 0; a pure function of the seed and `step`.

        Raises:
            ValueError: for a step that is no integer of at least 0.
        """
        step = checked_integer("step", step, 0)
        rows = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            stream, order = self._rows_of_epoch(index // self.rows_per_epoch)
            start = order[index % self.rows_per_epoch] * self.seq_len
            rows.append(stream[:, start : start + self.seq_len])
        tokens, documents = np.stack(rows, axis=1)
        return _pack(tokens, documents, np.full(self.batch_size, self.seq_len))


def validation_batches(documents: Sequence[np.ndarray], batch_size: int, seq_len: int) -> list[Batch]:
    """Every token of the documents, in order, exactly once; the last rows are padded to full batches.

    Args:
        documents: token ids i32[n] of each document.
        batch_size: B. seq_len: T.

    Raises:
        ValueError: for sizes below 1; all problems at once.
    """
    if problems := _size_problems(batch_size, seq_len):
        raise ValueError("; ".join(problems))
    stream = _concatenate(documents, range(len(documents)))
    num_tokens = stream.shape[1]
    tokens_per_batch = batch_size * seq_len
    num_batches = -(-num_tokens // tokens_per_batch)
    padded = np.zeros((2, num_batches * tokens_per_batch), np.int32)
    padded[:, :num_tokens] = stream
    tokens, numbers = padded.reshape(2, num_batches, batch_size, seq_len)
    first = np.arange(num_batches * batch_size).reshape(num_batches, batch_size) * seq_len
    num_valid = np.clip(num_tokens - first, 0, seq_len)
    return [_pack(*row) for row in zip(tokens, numbers, num_valid, strict=True)]
