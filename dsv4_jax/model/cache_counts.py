"""What a cache counts, known on the host as well: a call's room is checked without waiting for the device.

The arrays of a cache are the truth. Whoever changes them knows what they become, unless a transformation of
JAX is at work, and hands the numbers on beside them.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Counts:
    """Copies of a cache's vectors on the host, int64 [B]. Nothing changes them in place."""

    length: np.ndarray
    written: np.ndarray
    max_length: np.ndarray

    @staticmethod
    def empty(batch: int, max_length: int) -> "Counts":
        """Of rows without tokens."""
        return Counts.of(np.zeros(batch), np.zeros(batch), np.full(batch, max_length))

    @staticmethod
    def of(length: np.ndarray, written: np.ndarray, max_length: np.ndarray) -> "Counts":
        """Copies of vectors of any integer dtype."""
        return Counts(*(np.array(vector, np.int64) for vector in (length, written, max_length)))

    def appended(self, num_new: np.ndarray) -> "Counts":
        """After a call that appended num_new[b] tokens to row b."""
        length = self.length + num_new
        return Counts(length, np.maximum(self.written, length), self.max_length)

    def rewound(self, taken: np.ndarray) -> "Counts":
        """After taking back taken[b] tokens of row b; the high-water mark stays."""
        return dataclasses.replace(self, length=self.length - taken)

    def take(self, rows: np.ndarray) -> "Counts":
        """Of these rows, in this order."""
        return Counts(*(vector[rows] for vector in self._vectors()))

    def put(self, rows: np.ndarray, other: "Counts") -> "Counts":
        """With rows[i] replaced by row i of the other."""
        changed = [vector.copy() for vector in self._vectors()]
        for vector, new in zip(changed, other._vectors(), strict=True):
            vector[rows] = new
        return Counts(*changed)

    def reset(self, rows: np.ndarray) -> "Counts":
        """With these rows empty; what they may hold stays."""
        length, written = self.length.copy(), self.written.copy()
        length[rows] = written[rows] = 0
        return dataclasses.replace(self, length=length, written=written)

    def _vectors(self) -> tuple[np.ndarray, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))
