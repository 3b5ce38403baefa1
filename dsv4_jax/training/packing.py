"""Best-fit packing: documents into rows of a fixed length, with as few cuts as possible.

Only a document longer than a row is cut. Its full rows are taken off the front, and what remains of every
document is placed, longest first, into the row that it fills best (the packing that the report asks for,
section 4.2: "minimises truncation"). Segment ids keep the documents of a row apart (sample-level mask).
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv4_jax.training.data import PADDING_SEGMENT


class Piece(NamedTuple):
    """Tokens `start` to `stop` of the document with this number."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


Row = tuple[Piece, ...]
"""The pieces of a row from the left; together at most `seq_len` tokens."""


def cut(document: int, length: int, seq_len: int) -> list[Piece]:
    """The pieces of a document: full rows first, the shorter rest last; none if it has no tokens."""
    starts = range(0, length, seq_len)
    return [Piece(document, start, min(start + seq_len, length)) for start in starts]


def best_fit_rows(lengths: Sequence[int], seq_len: int) -> list[Row]:
    """Packs documents of these lengths; every token is in exactly one row.

    The result depends on the arguments alone. No two rows could be one: any two of them hold more than
    `seq_len` tokens together, so at most one row is no more than half full.

    Args:
        lengths: tokens of each document, 0 allowed.
        seq_len: T, tokens of a row, at least 1.

    Returns:
        Rows in the order in which they were begun.
    """
    pieces = [piece for number, length in enumerate(lengths) for piece in cut(number, length, seq_len)]
    pieces.sort(key=lambda piece: -piece.length)  # stable: equal lengths keep the order of the documents
    rows: list[list[Piece]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row) of rows that have any, ascending
    for piece in pieces:
        place = bisect.bisect_left(space, (piece.length, -1))
        if place == len(space):
            free, row = seq_len, len(rows)
            rows.append([])
        else:
            free, row = space.pop(place)
        rows[row].append(piece)
        if free > piece.length:
            bisect.insort(space, (free - piece.length, row))
    return [tuple(row) for row in rows]


def laid_out(row: Row, documents: Sequence[np.ndarray], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(values [T] in the documents' dtype, segment ids i32[T]) of a row; 0 where it is empty.

    Args:
        row: of `best_fit_rows`.
        documents: what to lay out, [n] each: token ids, or one bool a token.
        seq_len: T.
    """
    values = np.zeros(seq_len, documents[row[0].document].dtype)
    segments = np.full(seq_len, PADDING_SEGMENT, np.int32)
    place = 0
    for segment, piece in enumerate(row, start=1):
        end = place + piece.length
        values[place:end] = documents[piece.document][piece.start : piece.stop]
        segments[place:end] = segment
        place = end
    return values, segments
