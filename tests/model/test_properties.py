"""One forward, many ways: whole, chunked, token by token, ragged and packed runs must agree.

Values agree to 1e-5 (the same float32 sums in another order); what must not matter at all (later tokens,
padding, other documents) must leave every bit in place. Rewinds: `test_cache_operations`; gradients:
`tests/parity/test_gradients.py`.
"""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax.language_model import LanguageModel
from tests.model.equivalence import (
    AWKWARD_LENGTHS,
    BATCH,
    CHUNK,
    QUICK,
    REAL,
    REWIND,
    SMALL,
    TOLERANCE,
    WIDTH,
    append,
    chunked,
    even_plan,
    full,
    largest_difference,
    padded,
    random_rows,
)
from tests.model.telling_weights import telling_model

pytestmark = pytest.mark.as_users_compile

lengths = st.lists(st.integers(1, WIDTH), min_size=BATCH, max_size=BATCH)


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    return telling_model(SMALL)


@pytest.fixture(scope="module")
def real() -> LanguageModel:
    return telling_model(REAL)


# ---- whole = chunked = token by token ------------------------------------------------------------------


@QUICK
@given(data=st.data(), lengths=lengths, seed=st.integers(0, 2**16))
def test_any_ragged_chunking_equals_the_whole(small, data, lengths, seed):
    rows = random_rows(SMALL.vocab_size, lengths, seed)
    left, plan = list(lengths), []
    while any(left):
        counts = [data.draw(st.integers(0, min(n, CHUNK))) for n in left]
        if not any(counts):
            counts = [min(n, 1) for n in left]
        plan.append(counts)
        left = [n - c for n, c in zip(left, counts, strict=True)]
    cache = small.new_cache(BATCH, WIDTH, max_rewind=REWIND)
    got, cache = chunked(small, rows, plan, CHUNK, cache)
    assert cache.length.tolist() == lengths
    assert largest_difference(got, full(small, rows, WIDTH)) <= TOLERANCE


def test_token_by_token_equals_the_whole(small):
    rows = random_rows(SMALL.vocab_size, (WIDTH, 23, 6), seed=1)
    cache = small.new_cache(BATCH, WIDTH, max_rewind=REWIND)
    got, _ = chunked(small, rows, even_plan([len(row) for row in rows], 1), 1, cache)
    assert largest_difference(got, full(small, rows, WIDTH)) <= TOLERANCE


# Pieces of 257 tokens: queries in several blocks, past included. One token at a time where blocks and windows
# begin and end, at 1 .. 10, 111 .. 135 and 236 .. 257, with pieces between.
WIDTHS = {"100": [100] * 3, "257": [257], "1": [1] * 10 + [100] + [1] * 25 + [100] + [1] * 22}


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_awkward_lengths_at_the_released_ratios(real, widths, record_property):
    rows = random_rows(REAL.vocab_size, AWKWARD_LENGTHS, seed=2)
    cache, done, parts = real.new_cache(len(rows), max(AWKWARD_LENGTHS)), 0, []
    for width in widths:
        logits, cache = append(real, cache, [row[done : done + width] for row in rows], width)
        parts.append(logits)
        done += width
    assert done >= max(AWKWARD_LENGTHS)
    got = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
    worst = largest_difference(got, full(real, rows, max(AWKWARD_LENGTHS)))
    record_property("max_abs_logit_difference", worst)
    assert worst <= TOLERANCE


@pytest.mark.parametrize(
    "length",
    [1, 129] + [pytest.param(n, marks=pytest.mark.slow) for n in (3, 4, 8, 127, 128, 256)],
)
def test_a_row_of_exactly_this_length(real, length):
    """Without any padding: shorter than a block there is no entry at all, and shapes become empty."""
    row = random_rows(REAL.vocab_size, AWKWARD_LENGTHS, seed=2)[AWKWARD_LENGTHS.index(length)]
    others = random_rows(REAL.vocab_size, AWKWARD_LENGTHS, seed=2)
    want = full(real, others, max(AWKWARD_LENGTHS))[AWKWARD_LENGTHS.index(length)]
    got = np.asarray(real.logits(row[None]))[0]
    assert largest_difference([got], [want]) <= TOLERANCE


# ---- packed = separate ---------------------------------------------------------------------------------

PACKING = st.lists(st.tuples(st.integers(1, 19), st.booleans()), min_size=1, max_size=8)


def pack(pieces: list[tuple[int, bool]], seed: int) -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """Runs of (length, is padding) cut to WIDTH -> ids [1, WIDTH], segment ids, document slices."""
    ids = np.random.default_rng(seed).integers(0, SMALL.vocab_size, (1, WIDTH))
    segments, documents, at = np.zeros((1, WIDTH), np.int32), [], 0
    for index, (length, is_padding) in enumerate(pieces):
        here = slice(at, min(at + length, WIDTH))
        if here.stop > here.start and not is_padding:
            # Only neighbours must differ; an id may come back for another document.
            segments[0, here] = 1 + index % 3
            documents.append(here)
        at = here.stop
    return ids, segments, documents


def separately(model: LanguageModel, ids: np.ndarray, documents: list[slice]) -> list[np.ndarray]:
    """Each document of a packed row in a row of its own, BATCH rows at a time."""
    rows = [ids[0, here] for here in documents]
    filled = rows + [rows[0]] * (-len(rows) % BATCH)
    out: list[np.ndarray] = []
    for start in range(0, len(filled), BATCH):
        out += full(model, filled[start : start + BATCH], WIDTH)
    return out[: len(rows)]


@QUICK
@given(pieces=PACKING, seed=st.integers(0, 2**16))
def test_packed_documents_equal_separate_rows(small, pieces, seed):
    ids, segments, documents = pack(pieces, seed)
    if documents:
        logits = np.asarray(small.logits(ids, segment_ids=segments))[0]
        want = separately(small, ids, documents)
        assert largest_difference([logits[here] for here in documents], want) <= TOLERANCE


# ---- what must not matter ------------------------------------------------------------------------------


@QUICK
@given(at=st.integers(0, WIDTH - 1), seed=st.integers(0, 2**16))
def test_causality_is_bit_exact(small, at, seed):
    rows = random_rows(SMALL.vocab_size, [WIDTH] * BATCH, seed)
    changed = [row.copy() for row in rows]
    for row in changed:
        row[at] = (row[at] + 1) % SMALL.vocab_size
    before, after = full(small, rows, WIDTH), full(small, changed, WIDTH)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:at], b[:at])
        assert (a[at] != b[at]).any(), "a token must change its own logits"


def test_causality_is_bit_exact_at_the_released_ratios(real):
    base = random_rows(REAL.vocab_size, AWKWARD_LENGTHS, seed=3)
    last = np.array([len(row) - 1 for row in base])
    changed = [row.copy() for row in base]
    for row in changed:
        row[-1] = (row[-1] + 1) % REAL.vocab_size
    before, after = (full(real, rows, max(AWKWARD_LENGTHS)) for rows in (base, changed))
    for a, b, end in zip(before, after, last, strict=True):
        np.testing.assert_array_equal(a[:end], b[:end])
        assert (a[end] != b[end]).any()


@QUICK
@given(lengths=lengths, seed=st.integers(0, 2**16))
def test_padding_changes_nothing(small, lengths, seed):
    rows = random_rows(SMALL.vocab_size, lengths, seed)
    counts = np.array(lengths)
    outs = [
        np.asarray(small.logits(padded(rows, WIDTH, SMALL.vocab_size, seed=filler), counts))
        for filler in (1, 2)
    ]
    for b, count in enumerate(counts):
        np.testing.assert_array_equal(outs[0][b, :count], outs[1][b, :count])


def test_padding_leaves_no_trace_in_the_cache(small):
    rows = random_rows(SMALL.vocab_size, (11, 4, 17), seed=8)
    counts = np.array([len(row) for row in rows])
    caches, logits = [], []
    for filler in (1, 2):
        cache = small.new_cache(BATCH, WIDTH, max_rewind=REWIND)
        ids = padded(rows, CHUNK, SMALL.vocab_size, seed=filler)
        out, cache = small.extend(cache, ids, counts)
        logits.append(np.asarray(out))
        caches.append(cache)
    for b, count in enumerate(counts):
        np.testing.assert_array_equal(logits[0][b, :count], logits[1][b, :count])
    for a, b in zip(jax.tree.leaves(caches[0]), jax.tree.leaves(caches[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@QUICK
@given(pieces=PACKING, which=st.integers(0, 7), seed=st.integers(0, 2**16))
def test_foreign_documents_change_nothing(small, pieces, which, seed):
    ids, segments, documents = pack(pieces, seed)
    if not documents:
        return
    mine = documents[which % len(documents)]
    other = np.random.default_rng(seed + 1).integers(0, SMALL.vocab_size, ids.shape)
    other[0, mine] = ids[0, mine]
    outs = [np.asarray(small.logits(tokens, segment_ids=segments))[0] for tokens in (ids, other)]
    np.testing.assert_array_equal(outs[0][mine], outs[1][mine])


def test_rows_of_a_batch_do_not_meet(small):
    """A batch row's tokens change nothing in another row, whatever their lengths."""
    rows = random_rows(SMALL.vocab_size, (31, 17, 8), seed=9)
    others = [rows[0], *random_rows(SMALL.vocab_size, (40, 1), seed=10)]
    first, second = full(small, rows, WIDTH)[0], full(small, others, WIDTH)[0]
    assert largest_difference([first], [second]) <= TOLERANCE
