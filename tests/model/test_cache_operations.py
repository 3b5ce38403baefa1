"""Appending and taking back: a rewound cache is bit for bit one that never held those tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dsv4_jax.language_model import LanguageModel
from tests.model.equivalence import (
    BATCH,
    CHUNK,
    QUICK,
    REWIND,
    SMALL,
    TOLERANCE,
    WIDTH,
    append,
    full,
    largest_difference,
    random_rows,
)
from tests.model.telling_weights import telling_model

DRAFT = REWIND + 1
"""As in the verification of REWIND drafts: just fits into the compressors' rings, not into the window's."""


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    return telling_model(SMALL)


@QUICK
@given(
    first=st.lists(st.integers(0, 17), min_size=BATCH, max_size=BATCH),
    wrong=st.lists(st.integers(0, REWIND), min_size=BATCH, max_size=BATCH),
    seed=st.integers(0, 2**16),
)
def test_rewind_is_bit_exact(small, first, wrong, seed):
    """Tokens taken back leave every later logit as if they had never been."""
    rows = random_rows(SMALL.vocab_size, first, seed)
    drafts = random_rows(SMALL.vocab_size, wrong, seed + 1)
    rest = random_rows(SMALL.vocab_size, (16, 9, 14), seed + 2)

    def start():
        return append(small, small.new_cache(BATCH, WIDTH, max_rewind=REWIND), rows, CHUNK)[1]

    drafted = append(small, start(), drafts, CHUNK)[1].rewind(np.array(wrong))
    assert drafted.length.tolist() == list(first)
    got, got_cache = append(small, drafted, rest, CHUNK)
    want, want_cache = append(small, start(), rest, CHUNK)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    more = random_rows(SMALL.vocab_size, (5, 5, 5), seed + 3)
    for a, b in zip(
        append(small, got_cache, more, CHUNK)[0],
        append(small, want_cache, more, CHUNK)[0],
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_rewind_beyond_the_ring_is_refused(small):
    cache = small.new_cache(BATCH, WIDTH, max_rewind=REWIND)
    rows = random_rows(SMALL.vocab_size, (9, 2, 5), seed=11)
    cache = append(small, cache, rows, CHUNK)[1]
    with pytest.raises(ValueError, match=r"row 0: rewinding 4 of 9 tokens"):
        cache.rewind(np.array([REWIND + 1, 0, 0]))
    with pytest.raises(ValueError, match=r"row 1: rewinding 3 of 2 tokens"):
        cache.rewind(REWIND)
    cache = cache.rewind(np.array([2, 2, 2]))
    with pytest.raises(ValueError, match="row 0"):  # the mark stays: 9 - 3 is the furthest
        cache.rewind(np.array([2, 0, 0]))


class CacheMachine(RuleBasedStateMachine):
    """Random sequences of ragged appends and rewinds against the full forward of what remains."""

    model: LanguageModel

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.cache = self.model.new_cache(BATCH, WIDTH, max_rewind=REWIND)
        self.rows = [np.zeros(0, int) for _ in range(BATCH)]
        self.marks = [0] * BATCH

    def _append(self, counts: list[int], width: int) -> None:
        counts = [min(n, WIDTH - len(row)) for n, row in zip(counts, self.rows, strict=True)]
        pieces = [self.rng.integers(0, SMALL.vocab_size, n) for n in counts]
        got, self.cache = append(self.model, self.cache, pieces, width)
        self.rows = [np.concatenate(pair) for pair in zip(self.rows, pieces, strict=True)]
        self.marks = [max(m, len(row)) for m, row in zip(self.marks, self.rows, strict=True)]
        want = full(self.model, self.rows, WIDTH)
        want = [w[len(w) - n :] for w, n in zip(want, counts, strict=True)]
        assert largest_difference(got, want) <= TOLERANCE

    @rule(counts=st.lists(st.integers(0, CHUNK), min_size=BATCH, max_size=BATCH))
    def append_ragged(self, counts: list[int]) -> None:
        self._append(counts, CHUNK)

    @rule(counts=st.lists(st.integers(0, 1), min_size=BATCH, max_size=BATCH))
    def append_one(self, counts: list[int]) -> None:
        self._append(counts, 1)

    @rule(counts=st.lists(st.integers(0, DRAFT), min_size=BATCH, max_size=BATCH))
    def append_a_few(self, counts: list[int]) -> None:
        self._append(counts, DRAFT)

    @precondition(lambda self: any(self.marks))
    @rule(wanted=st.lists(st.integers(0, REWIND), min_size=BATCH, max_size=BATCH))
    def rewind(self, wanted: list[int]) -> None:
        allowed = [
            min(k, len(row), len(row) - max(mark - REWIND, 0))
            for k, row, mark in zip(wanted, self.rows, self.marks, strict=True)
        ]
        self.cache = self.cache.rewind(np.array(allowed))
        self.rows = [row[: len(row) - k] for row, k in zip(self.rows, allowed, strict=True)]
        assert self.cache.length.tolist() == [len(row) for row in self.rows]


def test_random_cache_operations(small):
    machine = type("Machine", (CacheMachine,), {"model": small})
    case = machine.TestCase()
    case.settings = settings(max_examples=15, stateful_step_count=14, deadline=None, derandomize=True)
    case.runTest()
