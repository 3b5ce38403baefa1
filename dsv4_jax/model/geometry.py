"""Sizes of what a cache keeps of recent tokens: computed here once, from the config and `max_rewind`.

Rows of recent tokens lie in rings (slot = position mod slots). A ring must hold what a call may look back
at, and `max_rewind` rows more, so that taking tokens back finds the rows before them still there. Whoever
writes a ring, and whoever gathers from it, must agree on its slots and on whether a call's own rows are in it
already: a disagreement would gather wrong rows without an error.
"""

import dataclasses

from dsv4_jax.config import AttentionKind, ModelConfig
from pallas_kernels.arithmetic import round_up

ROWS = 8
"""Rings and entries are multiples of it: a TPU keeps such arrays row by row, and kernels read them there."""


@dataclasses.dataclass(frozen=True)
class CompressorGeometry:
    """Sizes of one compressor.

    A compressor reads `branches` blocks of `ratio` rows for an entry: its own block (HCA), or that and the
    one before it (CSA and its indexer).
    """

    ratio: int  # m
    branches: int  # w
    slots: int  # M, rows of its ring

    def fits_in_ring(self, num_new: int) -> bool:
        """Whether a call of `num_new` tokens finds all rows it pools in the ring; see `fits_in_ring`."""
        return fits_in_ring(self.branches * self.ratio - 1, num_new, self.slots)

    def num_entries(self, max_length: int) -> int:
        """S, entries of rows that can hold `max_length` tokens, a multiple of ROWS."""
        return round_up(max(max_length // self.ratio, 1), ROWS)


@dataclasses.dataclass(frozen=True)
class WindowGeometry:
    """Sizes of one layer's sliding window."""

    window: int  # W
    slots: int  # rows of its ring

    def fits_in_ring(self, num_new: int) -> bool:
        """Whether a call of `num_new` tokens finds all rows it attends to in the ring; see `fits_in_ring`."""
        return fits_in_ring(self.window - 1, num_new, self.slots)


def allocated_length(config: ModelConfig, max_length: int) -> int:
    """The capacity to allocate for rows of up to `max_length` tokens: the next power of two, at most the
    model's positions.

    Caches of any lengths between two powers of two then have arrays of the same sizes, and share their
    programs. What grows with the context (entries and indexer keys) takes less than twice what `max_length`
    tokens need; rings do not depend on it.
    """
    return min(1 << (max_length - 1).bit_length(), config.max_position_embeddings)


def compressor_geometry(config: ModelConfig, kind: AttentionKind, max_rewind: int) -> CompressorGeometry:
    """Of the compressors of a CSA or HCA layer, in a cache that can take back `max_rewind` tokens."""
    ratio, branches = config.ratio(kind), config.branches(kind)
    return CompressorGeometry(ratio, branches, branches * ratio + max_rewind)


def window_geometry(config: ModelConfig, max_rewind: int) -> WindowGeometry:
    """Of the window of every layer, in a cache that can take back `max_rewind` tokens."""
    slots = round_up(max(config.sliding_window - 1 + max_rewind, 1), ROWS)
    return WindowGeometry(config.sliding_window, slots)


def context_slots(config: ModelConfig, max_rewind: int) -> int:
    """Slots of the ring of keys that a DSpark stage keeps.

    A draft block sees the last W tokens, whichever of `max_rewind` + 1 tokens becomes the last one.
    """
    return round_up(config.sliding_window + max_rewind, ROWS)


def stream_slots(max_rewind: int) -> int:
    """Slots of the ring of backbone streams that the MTP block keeps.

    Its next row needs the stream of the last token, whichever of `max_rewind` + 1 tokens that becomes.
    """
    return max_rewind + 1


def fits_in_ring(num_past: int, num_new: int, slots: int) -> bool:
    """Whether a call's new rows can be written before the `num_past` rows ahead of them are read.

    Short calls (decode, drafts) do so: a write followed by a read works in place, while reading first
    and writing after makes the compiler keep a copy of the whole ring.
    """
    return num_past + num_new <= slots
