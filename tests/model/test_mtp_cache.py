"""The MTP block through the cache: what it predicts for whole rows, in any chunks and after any rewind."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.inference import steps
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.cache import Cache, new_cache
from dsv4_jax.model.cache_rows import put, reset, snapshot, take
from dsv4_jax.numerics.policy import Policy
from tests.kernels.checks import assert_close
from tests.model import test_kernels
from tests.model.equivalence import (
    BATCH,
    CHUNK,
    QUICK,
    REWIND,
    SMALL,
    TOLERANCE,
    WIDTH,
    append,
    largest_difference,
    padded,
    random_rows,
)
from tests.model.telling_weights import telling_model

SHALLOW = dataclasses.replace(SMALL, attention_kinds=("csa",), router_kinds=("hash",))
"""One layer below the block under test, to give it streams that differ."""

Rows = Sequence[np.ndarray]


@pytest.fixture(scope="module")
def shallow() -> LanguageModel:
    return telling_model(SHALLOW)


def whole(model: LanguageModel, rows: Rows) -> list[np.ndarray]:
    """MTP logits [max(T_b - 1, 0), V] a row, without a cache."""
    logits = np.asarray(model.mtp_logits(padded(rows, WIDTH, model.config.vocab_size)))
    return [logits[b, : max(len(row) - 1, 0)] for b, row in enumerate(rows)]


def extended(
    model: LanguageModel, cache: Cache, pieces: Rows, width: int
) -> tuple[list[np.ndarray], list[np.ndarray], Cache]:
    """Logits and MTP logits of the rows that a call completes, and the cache after it."""
    before = np.asarray(cache.length)
    counts = np.array([len(piece) for piece in pieces], np.int32)
    ids = padded(pieces, width, model.config.vocab_size, seed=int(counts.sum())).astype(np.int32)
    logits, further, cache = steps.extend_further(model.network, model.parameters, cache, ids, counts)
    logits, further = np.asarray(logits), np.asarray(further)
    pairs = np.maximum(counts - (before == 0), 0)
    return [logits[b, :n] for b, n in enumerate(counts)], [further[b, :n] for b, n in enumerate(pairs)], cache


def made(model: LanguageModel, batch: int = BATCH) -> Cache:
    return model.new_cache(batch, WIDTH, REWIND, mtp=True)


class Text:
    """Rows of tokens with their cache, grown and taken back together."""

    def __init__(self, model: LanguageModel, seed: int) -> None:
        self.model, self.rng = model, np.random.default_rng(seed)
        self.cache = made(model)
        self.rows = [np.zeros(0, int) for _ in range(BATCH)]
        self.marks = [0] * BATCH

    def append(self, counts: Sequence[int], width: int, further: bool = True) -> None:
        """Checks the MTP logits against whole rows; without `further`, `extend` must keep the slot."""
        counts = [min(n, WIDTH - len(row)) for n, row in zip(counts, self.rows, strict=True)]
        pieces = [self.rng.integers(0, SHALLOW.vocab_size, n) for n in counts]
        self.rows = [np.concatenate(pair) for pair in zip(self.rows, pieces, strict=True)]
        self.marks = [max(m, len(row)) for m, row in zip(self.marks, self.rows, strict=True)]
        if not further:
            self.cache = append(self.model, self.cache, pieces, width)[1]
            return
        _, got, self.cache = extended(self.model, self.cache, pieces, width)
        want = [w[len(w) - len(g) :] for w, g in zip(whole(self.model, self.rows), got, strict=True)]
        assert largest_difference(got, want) <= TOLERANCE

    def rewind(self, wanted: Sequence[int]) -> None:
        allowed = [
            min(k, len(row), len(row) - max(mark - REWIND, 0))
            for k, row, mark in zip(wanted, self.rows, self.marks, strict=True)
        ]
        self.cache = self.cache.rewind(np.array(allowed))
        self.rows = [row[: len(row) - k] for row, k in zip(self.rows, allowed, strict=True)]


counted = lambda most: st.lists(st.integers(0, most), min_size=BATCH, max_size=BATCH)  # noqa: E731
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), counted(CHUNK), st.booleans()),
        st.tuples(st.just("draft"), counted(REWIND + 1), st.booleans()),
        st.tuples(st.just("one"), counted(1), st.booleans()),
        st.tuples(st.just("rewind"), counted(REWIND), st.just(True)),
    ),
    min_size=3,
    max_size=10,
)


@settings(QUICK, max_examples=25)
@given(operations=OPERATIONS, seed=st.integers(0, 2**16))
def test_any_chunks_and_rewinds_equal_the_whole(shallow, operations, seed):
    """Ragged calls of 1, a few and many tokens on rows at different positions, taken back at any time."""
    text = Text(shallow, seed)
    for what, counts, further in operations:
        if what == "rewind":
            text.rewind(counts)
        else:
            text.append(counts, {"chunk": CHUNK, "draft": REWIND + 1, "one": 1}[what], further)
    text.append([1] * BATCH, 1)


def test_token_by_token_and_ragged_chunks(shallow):
    """Every row of the whole, none twice: the first call on an empty row completes one pair fewer."""
    rows = random_rows(SHALLOW.vocab_size, (WIDTH, 23, 1), seed=1)
    for plan, width in (
        ([[1] * BATCH] * WIDTH, 1),
        ([[17, 0, 1], [1, 16, 0], [5, 7, 0], [17, 0, 0]], CHUNK),
    ):
        cache, done = made(shallow), [0] * BATCH
        parts: list[list[np.ndarray]] = [[] for _ in rows]
        for counts in plan:
            pieces = [row[at : at + n] for row, at, n in zip(rows, done, counts, strict=True)]
            _, got, cache = extended(shallow, cache, pieces, width)
            done = [at + len(piece) for at, piece in zip(done, pieces, strict=True)]
            for part, rows_of_part in zip(parts, got, strict=True):
                part.append(rows_of_part)
        assert done == [len(row) for row in rows]
        got = [np.concatenate(part) for part in parts]
        assert largest_difference(got, whole(shallow, rows)) <= TOLERANCE


@QUICK
@given(first=counted(CHUNK), wrong=counted(REWIND), seed=st.integers(0, 2**16))
def test_rewind_is_bit_exact(shallow, first, wrong, seed):
    """Drafts that were taken back leave no bit in what follows, a rewind to an empty row included."""
    rows = random_rows(SHALLOW.vocab_size, first, seed)
    drafts = random_rows(SHALLOW.vocab_size, wrong, seed + 1)
    rest = random_rows(SHALLOW.vocab_size, (4, 1, 3), seed + 2)

    def start() -> Cache:
        return extended(shallow, made(shallow), rows, CHUNK)[2]

    drafted = extended(shallow, start(), drafts, REWIND + 1)[2].rewind(np.array(wrong))
    got, want = (extended(shallow, cache, rest, REWIND + 1) for cache in (drafted, start()))
    more = random_rows(SHALLOW.vocab_size, (5, 17, 8), seed + 3)
    again = [extended(shallow, cache, more, CHUNK) for cache in (got[2], want[2])]
    for a, b in ((got, want), again):
        jax.tree.map(np.testing.assert_array_equal, a[:2], b[:2])


def test_rows_carry_their_slot(shallow):
    """Taken, put and saved rows go on bit for bit, and a reset row as a fresh one."""
    pieces = random_rows(SHALLOW.vocab_size, (11, 6, 9), seed=1)
    rest = random_rows(SHALLOW.vocab_size, (4, 4, 4), seed=2)
    cache = extended(shallow, made(shallow), pieces, CHUNK)[2]
    pair, saved = take(cache, [0, 1]), snapshot(cache, 2)
    want = extended(shallow, cache, rest, 4)
    moved = put(reset(extended(shallow, made(shallow), pieces, CHUNK)[2], [0]), [2, 1], pair)
    got = extended(shallow, moved, [rest[2], rest[1], rest[0]], 4)
    for row, slot in ((0, 2), (1, 1)):
        np.testing.assert_array_equal(got[1][slot], want[1][row])
    fresh = extended(shallow, made(shallow), [rest[2]] * BATCH, 4)
    np.testing.assert_array_equal(got[1][0], fresh[1][0])
    back = extended(shallow, put(got[2], [1], saved), [rest[2]] * BATCH, 4)
    np.testing.assert_array_equal(back[1][1], want[1][2])


def test_a_draft_is_the_row_of_the_token_before_it_is_appended(shallow):
    pieces = random_rows(SHALLOW.vocab_size, (11, 1, 0), seed=3)
    cache = extended(shallow, made(shallow), pieces, CHUNK)[2]
    before = jax.tree.map(np.array, cache)
    token = np.array([5, 60, 0], np.int32)
    scores = steps.draft(shallow.network, shallow.parameters, cache, token)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, cache), before)
    _, further, _ = extended(shallow, cache, token[:, None], 1)
    assert [len(row) for row in further] == [1, 1, 0]
    for row in (0, 1):
        np.testing.assert_allclose(scores[row], further[row][0], atol=TOLERANCE)


def test_the_backbone_does_not_see_the_slot(shallow):
    pieces = random_rows(SHALLOW.vocab_size, (11, 1, 5), seed=3)
    with_slot, _, cache = extended(shallow, made(shallow), pieces, CHUNK)
    without, plain = append(shallow, shallow.new_cache(BATCH, WIDTH, REWIND), pieces, CHUNK)
    assert largest_difference(with_slot, without) <= TOLERANCE
    assert plain.mtp is None and cache.mtp is not None
    with pytest.raises(ValueError, match=r"differ in model, format or capacity: mtp.*and absent"):
        put(cache, [0], snapshot(plain, 0))


def test_kernels_predict_from_the_slot_what_xla_does_for_whole_rows():
    """A chunk longer than the rings and a few tokens, with a rewind between them; a draft after each call."""
    config = dataclasses.replace(test_kernels.CONFIG, attention_kinds=("window",), router_kinds=("hash",))
    xla, policy = telling_model(config), test_kernels.KERNELS
    kernels = LanguageModel(config, policy, xla.parameters)
    test_kernels.computed_by(kernels, test_kernels.plain_hyper_connections(policy))
    rows = random_rows(config.vocab_size, (24, 16), seed=6)
    cache, done, want = made(kernels, batch=2), np.zeros(2, int), whole(xla, rows)
    for counts, back in (([19, 11], [2, 0]), ([1, 2], [0, 1]), ([2, 1], [0, 0])):
        pieces = [row[at : at + n] for row, at, n in zip(rows, done, counts, strict=True)]
        _, further, cache = extended(kernels, cache, pieces, max(counts))
        done += counts
        token = np.array([row[at] for row, at in zip(rows, done, strict=True)], np.int32)
        drafted = steps.draft(kernels.network, kernels.parameters, cache, token)
        for b, at in enumerate(done):
            first = at - 1 - len(further[b])
            assert len(further[b]) == counts[b] - (first == 0 and at == counts[b])
            got = np.concatenate([further[b], drafted[b : b + 1]])
            assert_close(got, want[b][first:at], test_kernels.TOLERANCE)
        cache = cache.rewind(np.array(back))
        done -= back


# Formats differ in the keys of an indexer, which the block has not.
@pytest.mark.parametrize("format", ["fp8+fp8", pytest.param("fp8+mxfp4", marks=pytest.mark.slow)])
def test_bfloat16_and_quantised_windows(format):
    """Streams come back from the ring as they went in, so chunks give the logits of whole rows."""
    policy = Policy.of("bfloat16", cache=format)
    model = LanguageModel.random(SHALLOW, policy, 1)
    row = random_rows(SHALLOW.vocab_size, (20,) * BATCH, seed=4)
    want = whole(model, row)
    cache, parts = made(model), []
    assert cache.mtp.streams.dtype == jnp.uint16
    for first, last in ((0, 13), (13, 14), (14, 20)):
        _, got, cache = extended(model, cache, [r[first:last] for r in row], CHUNK)
        parts.append(got)
    got = [np.concatenate(part) for part in zip(*parts, strict=True)]
    assert largest_difference(got, want) <= 2e-2 * np.abs(np.concatenate(want)).max()


def test_a_slot_needs_the_block():
    without = dataclasses.replace(SHALLOW, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="no MTP block"):
        LanguageModel(without, Policy.of("float32"), {}).new_cache(1, 8, mtp=True)
    with pytest.raises(ValueError, match="no MTP block"):
        new_cache(without, 1, 8, jnp.dtype("float32"), stream_dtype=jnp.dtype("float32"))
