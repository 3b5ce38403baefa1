"""What a cache counts on the host: the same as its arrays, and no call waits for the device to know it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import cache as caches
from dsv4_jax.model.cache_rows import at_length, put, reset, snapshot, take
from dsv4_jax.numerics.policy import Policy
from tests.models import all_kinds

LENGTH = 40
# Counting knows of no layers.
CONFIG = all_kinds(attention_kinds=("csa",), router_kinds=("hash",), num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.random(CONFIG, Policy.of("float32"), 1)


@pytest.fixture
def fetches(monkeypatch) -> list[object]:
    """Every time that the device is asked for what a cache counts."""
    seen, fetch = [], jax.device_get
    monkeypatch.setattr(caches.jax, "device_get", lambda arrays: seen.append(arrays) or fetch(arrays))
    return seen


def started(lm: LanguageModel, *counts: int) -> caches.Cache:
    tokens = np.zeros((len(counts), 9), np.int32)
    return lm.extend(lm.new_cache(len(counts), LENGTH, max_rewind=3), tokens, np.array(counts))[1]


def known(cache: caches.Cache) -> tuple[list[int], list[int]]:
    """Length and mark as known; what is known must be what the arrays hold."""
    counts = cache.counts_if_known()
    assert counts is not None
    for name in ("length", "written", "max_length"):
        np.testing.assert_array_equal(getattr(counts, name), getattr(cache, name))
    return counts.length.tolist(), counts.written.tolist()


def test_every_call_hands_on_what_it_knows(lm, fetches):
    cache = started(lm, 9, 4)
    assert known(cache) == ([9, 4], [9, 4])
    cache = cache.rewind(np.array([3, 1]))
    assert known(cache) == ([6, 3], [9, 4])
    _, cache = lm.extend(cache, [[1, 2], [3, 4]], [1, 2])
    assert known(cache) == ([7, 5], [9, 5])
    other = take(cache, [1, 0, 1])
    assert known(other) == ([5, 7, 5], [5, 9, 5])
    saved = snapshot(cache, 0)
    assert known(saved) == ([7], [9])
    other = put(other, [2, 0], cache)
    assert known(other) == ([5, 7, 7], [5, 9, 9])
    assert known(reset(other, [1])) == ([5, 0, 7], [5, 0, 9])
    assert known(at_length(saved, 5)) == ([5], [5])
    assert known(cache) == ([7, 5], [9, 5])  # a part of a call before, and unchanged
    assert not fetches


def test_extend_returns_before_the_device_has_the_lengths(lm, fetches):
    """The lengths come out of a program that runs for much longer than it takes to hand out a call."""

    @jax.jit
    def late(length):
        square = jax.lax.fori_loop(0, 300, lambda _, x: x @ x * 1e-3, jnp.ones((400, 400)))
        return length + jnp.isnan(square[0, 0]).astype(length.dtype)

    jax.block_until_ready(late(started(lm, 2, 2).length))
    token = np.ones((2, 1), np.int32)
    cache = lm.extend(started(lm, 2, 2), token)[1]
    jax.block_until_ready(cache)
    counts = cache.counts_if_known()
    waiting = dataclasses.replace(cache, length=late(cache.length)).knowing(counts)
    logits, after = lm.extend(waiting, token)
    rewound = after.rewind(1)
    assert not logits.is_ready() and not fetches
    assert known(rewound) == ([3, 3], [4, 4])


def test_a_cache_out_of_a_transformation_is_asked_once(lm, fetches):
    jitted = jax.jit(lambda cache, tokens: lm.extend(cache, tokens)[1])
    cache = jitted(started(lm, 9, 4), jnp.zeros((2, 30), jnp.int32))
    assert cache.counts_if_known() is None and not fetches
    with pytest.raises(ValueError, match=r"row 0 would hold 41 tokens.*max_length=40"):
        lm.extend(cache, np.zeros((2, 2), np.int32))
    assert cache.length.tolist() == [39, 34], "nothing ran, and the cache was not consumed"
    cache = lm.extend(cache, np.zeros((2, 1), np.int32))[1]
    cache = cache.rewind(2)
    assert known(cache) == ([38, 33], [40, 35])
    assert len(fetches) == 1
    # The rows that it gives or takes are not known either, and are not asked for.
    mapped = jax.tree.map(jnp.copy, cache)
    for unknown in (take(mapped, [0]), put(jax.tree.map(jnp.copy, cache), [1], snapshot(cache, 0))):
        assert unknown.counts_if_known() is None
    assert len(fetches) == 1


def test_all_rows_without_room_are_named(lm):
    cache = started(lm, 9, 4)
    with pytest.raises(ValueError, match=r"row 0 would hold 49 .*max_length=40; row 1 would hold 41 "):
        lm.extend(cache, np.zeros((2, 40), np.int32), [40, 37])


def test_a_row_brings_what_it_may_hold(lm):
    """Rows move between caches of one allocation, made for other lengths."""
    short, long = started(lm, 9, 4), lm.new_cache(1, LENGTH + 20, max_rewind=3)
    mixed = put(short, [1], lm.extend(long, np.zeros((1, 8), np.int32))[1])
    assert known(mixed) == ([9, 8], [9, 8]) and mixed.max_length.tolist() == [40, 60]
    moved = reset(take(mixed, [1, 0, 1]), [0]).rewind(0)
    for cache, refused in [
        (mixed, [(0, 62, 40), (1, 61, 60)]),
        (jax.tree.map(jnp.copy, mixed), [(0, 62, 40), (1, 61, 60)]),
        (moved, [(1, 62, 40), (2, 61, 60)]),
    ]:
        message = "; ".join(
            f"row {row} would hold {n} tokens; .*max_length={most}" for row, n, most in refused
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            lm.extend(cache, np.zeros((len(cache.length), 53), np.int32))


def test_numbers_of_replaced_arrays_are_not_believed(lm):
    cache = started(lm, 9, 4)
    longer = dataclasses.replace(cache, length=jnp.array([39, 4], jnp.int32))
    assert longer.counts_if_known() is None
    with pytest.raises(ValueError, match="row 0 would hold 41"):
        lm.extend(longer, np.zeros((2, 2), np.int32))


def test_nothing_is_known_while_tracing(lm):
    seen = []

    @jax.jit
    def run(tokens):
        cache = lm.extend(lm.new_cache(2, LENGTH), tokens)[1].rewind(1)
        seen.extend([cache.known, cache.counts(), take(cache, [1]).known, reset(cache, [0]).known])
        return cache

    assert run(jnp.zeros((2, 3), jnp.int32)).length.tolist() == [2, 2]
    assert seen == [None] * 4
