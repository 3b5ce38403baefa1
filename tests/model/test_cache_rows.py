"""Rows of a cache: taken, put, reset, bit for bit, in every format; what does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.model import cache_rows
from dsv4_jax.model.cache import Cache, new_cache
from dsv4_jax.model.cache_rows import at_length, put, reset, snapshot, take
from dsv4_jax.model.cache_stores import stores, with_stores
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from pallas_kernels.formats.entry_rows import Fp8Rows
from tests.model.equivalence import SMALL, append, random_rows
from tests.model.telling_weights import telling_model

ROWS_OF_WORDS = dataclasses.replace(
    v4_flash(), attention_kinds=("csa", "hca"), router_kinds=("learned", "learned")
)
"""Wide enough that kernels keep chosen entries as rows of words."""

KINDS = [*((name, True) for name in CACHE_FORMATS), ("fp8+mxfp4", False), ("fp8+fp8", "words")]


def made(batch: int, format: str, as_bits: object, **sizes: int) -> Cache:
    words = as_bits == "words"
    config, length = (ROWS_OF_WORDS, 14_400) if words else (SMALL, 40)
    sizes = {"capacity": length, "max_rewind": 3} | sizes
    return new_cache(
        config, batch, **sizes, dtype=jnp.dtype("float32"), format=format, as_bits=as_bits is True
    )


def drawn(cache: Cache, seed: int) -> Cache:
    """With random bytes in every array."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.Array) -> jax.Array:
        size = leaf.size * leaf.dtype.itemsize
        return jnp.asarray(rng.integers(0, 64, size, np.uint8).view(leaf.dtype).reshape(leaf.shape))

    return jax.tree.map(fill, cache)


def rows_of(cache: Cache) -> list[list[bytes]]:
    """Row -> the bytes of its part of every array, `length`, `written` and `max_length` first."""
    vectors = [cache.length, cache.written, cache.max_length]
    parts = [(0, leaf) for leaf in vectors] + [(1, leaf) for leaf in jax.tree.leaves(cache.layers)]
    moved = [np.moveaxis(np.asarray(leaf), axis, 0) for axis, leaf in parts]
    return [[leaf[row].tobytes() for leaf in moved] for row in range(len(cache.length))]


@pytest.mark.parametrize(("format", "as_bits"), KINDS)
def test_every_array_has_the_batch_on_its_axis(format, as_bits):
    one, five = (jax.eval_shape(lambda b=b: made(b, format, as_bits)) for b in (1, 5))
    assert {f.name for f in dataclasses.fields(Cache)} == {
        *cache_rows.VECTORS,
        *cache_rows.STACKS,
        "max_rewind",
        "known",
    }
    for names, axis in ((cache_rows.VECTORS, 0), (cache_rows.STACKS, 1)):
        for name in names:
            pairs = zip(*(jax.tree.leaves(getattr(c, name)) for c in (one, five)), strict=True)
            for a, b in pairs:
                assert a.shape[axis] == 1 and b.shape == (*a.shape[:axis], 5, *a.shape[axis + 1 :])
    kept_as_words = any(isinstance(store.stored, Fp8Rows) for store in stores(one))
    assert kept_as_words == (as_bits == "words")


@pytest.mark.parametrize(("format", "as_bits"), [KINDS[0], KINDS[3], KINDS[4]])
def test_rows_move_bit_for_bit(format, as_bits):
    cache, other = drawn(made(4, format, as_bits), 1), drawn(made(2, format, as_bits), 2)
    before, theirs = rows_of(cache), rows_of(other)
    assert rows_of(take(cache, [3, 0, 3])) == [before[3], before[0], before[3]]
    saved = snapshot(cache, 1)
    after = put(cache, [2, 0], other)
    assert rows_of(after) == [theirs[1], before[1], theirs[0], before[3]]
    assert rows_of(other) == theirs and rows_of(saved) == [before[1]]
    after = reset(after, [3])
    fresh = rows_of(made(1, format, as_bits))[0]
    assert rows_of(after)[3] == [*fresh[:2], before[3][2], *fresh[3:]], "all but what the row may hold"
    assert rows_of(put(after, [3], saved)) == [theirs[1], before[1], theirs[0], before[1]]


@pytest.fixture(scope="module")
def small():
    return telling_model(SMALL)


def test_a_row_goes_on_in_another_slot_of_a_larger_batch(small):
    """And one that was saved goes on as if what came after had never been."""
    pieces = random_rows(SMALL.vocab_size, (11, 6, 9), seed=1)
    rest = random_rows(SMALL.vocab_size, (5, 5, 5), seed=2)
    _, cache = append(small, small.new_cache(3, 40, max_rewind=3), pieces, 17)
    pair = take(cache, [0, 1])
    want, cache = append(small, cache, rest, 17)
    fresh = small.new_cache(3, 40, max_rewind=3)
    moved = put(reset(fresh, [1]), [2, 0], pair)
    got, moved = append(small, moved, [rest[1], rest[2], rest[0]], 17)
    for row, slot in ((0, 2), (1, 0)):
        np.testing.assert_array_equal(got[slot], want[row])
    again = put(moved.rewind([1, 0, 2]), [2, 0], pair)
    assert again.length.tolist() == [6, 5, 11]
    got, _ = append(small, again, [rest[1], rest[2], rest[0]], 17)
    for row, slot in ((0, 2), (1, 0)):
        np.testing.assert_array_equal(got[slot], want[row])


def test_under_a_jit_with_traced_rows():
    cache = drawn(made(3, "plain", True), 1)
    before = rows_of(cache)

    @jax.jit
    def swapped(cache, rows):
        return reset(put(cache, rows, take(cache, rows[::-1])), rows[:1] * 0 + 1)

    after = rows_of(swapped(cache, jnp.array([0, 2])))
    fresh = rows_of(made(1, "plain", True))[0]
    assert after == [before[2], [*fresh[:2], before[1][2], *fresh[3:]], before[0]]
    with pytest.raises(ValueError, match="must be integers"):
        jax.eval_shape(take, cache, jnp.zeros(2))


def test_what_does_not_fit_is_refused():
    cache, pair = made(3, "plain", True), made(2, "plain", True)
    for call in (take, reset):
        for rows, message in [
            ([3], r"rows \[3\] must be in 0..2"),
            ([-1, 7], r"rows \[-1, 7\] must be in 0..2"),
            ([], "at least one row number"),
            ([0.0], "must be integers"),
            (0, r"shape \(\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                call(cache, rows)
    with pytest.raises(ValueError, match=r"row=3 must be an integer in 0..2"):
        snapshot(cache, 3)
    with pytest.raises(ValueError, match=r"rows \[9\] must be in 0..2; rows \[9\] are given more than once"):
        put(cache, [9, 9], pair)
    with pytest.raises(ValueError, match="1 rows cannot hold the 2"):
        put(cache, [1], pair)
    for other, message in [
        (made(2, "fp8+fp8", True), r"format or capacity: layers\[0\]\[0\].window.*and \d+ more"),
        (made(2, "plain", True, capacity=80), r"compressor.entries is float32\[1, B, 16, 32\] and"),
        (made(2, "plain", True, max_rewind=4), "max_rewind=3 and 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            put(cache, [0, 1], other)
    consumed = made(1, "plain", True)
    reset(consumed, [0])
    with pytest.raises(ValueError, match="consumed by an earlier call"):
        take(consumed, [0])


def test_a_length_for_measurements_and_the_stores():
    cache = made(2, "plain", True)
    assert at_length(cache, [3, 40]).written.tolist() == [3, 40]
    with pytest.raises(ValueError, match=r"row 0: length 41 must be in 0..40; row 1: length 41"):
        at_length(cache, 41)
    with pytest.raises(ValueError, match=r"length of shape \(3,\)"):
        at_length(cache, [1, 2, 3])
    listed = stores(cache)
    assert [store.kind for store in listed] == ["window"] + ["csa"] * 7 + ["hca"] * 4
    same = with_stores(cache, [store.stored for store in listed])
    assert jax.tree.structure(same) == jax.tree.structure(cache)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (same, cache)), strict=True))
    with pytest.raises(ValueError, match="1 stores were given for a cache of 12"):
        with_stores(cache, [listed[0].stored])
