"""`entry_rows`: bytes in words, numbers from bytes, writing beside neighbours."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decode_attention import stored
from pallas_kernels.formats import e4m3, entry_rows
from pallas_kernels.formats.entries import Fp8Entries
from pallas_kernels.formats.entry_rows import Fp8Rows, Layout
from tests.kernels.test_decode_attention import fp8_entries, in_rows

FLASH = Layout(512, 64)


def test_layout_of_v4():
    """584 bytes are 146 words: a row of 128, and 18 more, seven times side by side."""
    assert FLASH.problems() == []
    assert (FLASH.row, FLASH.values, FLASH.scales, FLASH.rest, FLASH.entries_a_row) == (128, 112, 2, 18, 7)
    rows = entry_rows.empty(1, 1, 7 * 1024, FLASH)
    assert 4 * (rows.words.size + rows.rest.size) / (7 * 1024) == 512 + 512 / 7
    with pytest.raises(ValueError, match="500 channels .* multiple of 64; 6 rotated .* multiple of 4"):
        entry_rows.empty(1, 1, 8, Layout(506, 6))


def test_every_code_has_its_value():
    codes = np.arange(256)
    numbers = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    # Higher bytes of a word do not count.
    got = np.asarray(jax.jit(e4m3.value_in_word)(jnp.asarray(codes | 0x5A00, jnp.int32)))
    real = ~np.isnan(numbers)
    np.testing.assert_array_equal(got[real].view(np.int32), numbers[real].view(np.int32))
    assert np.isfinite(got).all()


@pytest.mark.parametrize(("width", "rotary"), [(80, 16), (144, 16), (192, 64), (512, 64)])
def test_rows_hold_the_bytes_of_entries(width, rotary):
    """From one scale an entry to seven, in two words."""
    entries = fp8_entries(np.random.default_rng(width), 2, 3, 11, width=width, rotary=rotary)
    rows = in_rows(entries)
    prefix = jax.jit(entry_rows.prefix, static_argnums=(2, 3))
    want = np.asarray(stored.decoded(entries))
    for dtype in (jnp.float32, jnp.bfloat16):
        got = prefix(jax.tree.map(jnp.asarray, rows), jnp.int32(1), 9, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(jnp.float32), want[1, :, :9])
    assert rows.shape == (2, 3, 11, width)
    np.testing.assert_array_equal(stored.decoded(rows), want)
    words = entry_rows.words_of(Fp8Entries(*map(jnp.asarray, entries)))
    for part, whole in zip(entry_rows.entries_of(words, rows.layout), entries, strict=True):
        np.testing.assert_array_equal(np.asarray(part).view(np.uint8), whole.view(np.uint8))


def test_planes_are_a_permutation_of_channels():
    for layout in (FLASH, Layout(80, 16), Layout(144, 16)):
        order = entry_rows.plane_order(layout)
        assert sorted(order) == list(range(layout.num_channels))
        np.testing.assert_array_equal(order[: layout.values], 4 * np.arange(layout.values))


WIDTH, SIZE = 80, 23  # three entries share a row of `rest`; the last row holds two
write = jax.jit(entry_rows.write)


@settings(max_examples=40, deadline=None)
@given(
    num_new=st.sampled_from([1, 2, 9]),
    seed=st.integers(0, 2**16),
    first=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)),
    count=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_writing_changes_what_it_should(num_new, seed, first, count):
    rng = np.random.default_rng(seed)
    old = fp8_entries(rng, 2, 2, SIZE, width=WIDTH)
    new = fp8_entries(rng, 2, num_new, width=WIDTH)
    count = [min(n, num_new, SIZE - f) for n, f in zip(count, first, strict=True)]
    rows = jax.tree.map(jnp.asarray, in_rows(old))
    words = entry_rows.words_of(Fp8Entries(*map(jnp.asarray, new)))
    got = write(rows, jnp.int32(1), words, jnp.asarray(first, jnp.int32), jnp.asarray(count, jnp.int32))
    assert isinstance(got, Fp8Rows) and got.num_rotary == 16
    for b in range(2):
        for part, fresh in zip(old, new, strict=True):
            part[1, b, first[b] : first[b] + count[b]] = fresh[b, : count[b]]
    np.testing.assert_array_equal(stored.decoded(got), stored.decoded(old))
