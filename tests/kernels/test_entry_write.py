"""`write_entries`: bits beside their neighbours, from anywhere in a block, of arrays that lie either way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.entry_write import kernel_tpu, write_entries
from pallas_kernels.formats.columns import Columns, columns_of
from tests.kernels.ahead_of_time import CHIPS, compile_for
from tests.kernels.checks import STRICT

REPEATS, BATCH, SIZE = 2, 3, 200
# Every width of number, and one word a row.
ARRAYS = ((64, jnp.float8_e4m3fn), (8, jnp.uint8), (8, jnp.bfloat16), (1, jnp.float32))
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
ROWS = (0, 1, 2)  # the arrays that keep their rows in the second way

# new entries, first, count of each sequence
CASES = {
    "one, at the ends of blocks": (1, [0, 127, 199], [1, 1, 1]),
    "one, or none, or no room": (1, [128, 5, 200], [1, 0, 1]),
    "over the edge of a block, over the end": (5, [126, 198, 31], [5, 5, 3]),
    "more than a block": (150, [0, 40, 127], [150, 150, 73]),
    "all, none, the first": (200, [0, 0, 0], [200, 0, 1]),
}


def drawn(rng, *shape, dtype):
    """Any bits but those of NaN, which a CPU that computes bfloat16 in float32 does not keep."""
    unsigned = UNSIGNED[jnp.dtype(dtype).itemsize]
    numbers = rng.integers(0, jnp.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True)
    values = jax.lax.bitcast_convert_type(jnp.asarray(numbers), dtype)
    return jnp.where(jnp.isnan(values.astype(jnp.float32)), jnp.zeros((), dtype), values)


def bits(tree):
    return [
        np.asarray(jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize]))
        for leaf in jax.tree.leaves(tree)
    ]


def operands(num_new, first, count, keep_rows=(), size=SIZE):
    rng = np.random.default_rng(0)
    stack = tuple(drawn(rng, REPEATS, BATCH, size, width, dtype=dtype) for width, dtype in ARRAYS)
    new = tuple(drawn(rng, BATCH, num_new, width, dtype=dtype) for width, dtype in ARRAYS)
    at = (jnp.asarray(first, jnp.int32), jnp.asarray(count, jnp.int32))
    return columns_of(stack, keep_rows), jnp.int32(1), new, *at


def expected(stack, repeat, new, first, count):
    """By numpy, one entry after the other."""
    arrays = [array.copy() for array in bits(stack.rows)]
    for array, added in zip(arrays, bits(new), strict=True):
        for b in range(BATCH):
            for p in range(int(count[b])):
                if int(first[b]) + p < stack.size:
                    array[int(repeat), b, int(first[b]) + p] = added[b, p]
    return arrays


run = functools.partial(jax.jit, static_argnames=("impl", "interpret"))(write_entries)


@pytest.mark.parametrize("keep_rows", [(), ROWS], ids=["turned", "rows"])
@pytest.mark.parametrize("case", CASES)
def test_only_the_new_entries_change(case, keep_rows):
    given = operands(*CASES[case], keep_rows)
    for settings in ({"impl": "reference"}, {"interpret": True}):
        written = run(*given, **settings)
        assert written.turned == given[0].turned
        for got, want in zip(bits(written.rows), expected(*given), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("keep_rows", [(), ROWS], ids=["turned", "rows"])
def test_late_copies_and_uninitialised_memory(keep_rows):
    """Whole blocks: the strict interpreter gives back what it padded, if an argument becomes the result."""
    given = operands(5, [126, 254, 31], [5, 5, 3], keep_rows, size=256)
    written = run(*given, interpret=STRICT)
    for got, want in zip(bits(written.rows), expected(*given), strict=True):
        np.testing.assert_array_equal(got, want)


def test_blocks_that_entries_touch():
    for unit in (32, 128):
        for num_new in (1, 2, unit - 1, unit, unit + 1, unit + 2, 3 * unit):
            touched = max((first + num_new - 1) // unit + 1 for first in range(unit))
            assert kernel_tpu.num_blocks(num_new, unit) == touched


def test_columns_say_how_they_lie():
    stack, *_ = operands(1, [0, 0, 0], [1, 1, 1], ROWS)
    assert stack.turned == (False, False, False, True)
    assert [leaf.shape[2:] for leaf in stack.stored] == [(200, 64), (200, 8), (200, 8), (1, 200)]
    assert [leaf.shape[2:] for leaf in stack.rows] == [(200, 64), (200, 8), (200, 8), (200, 1)]
    assert stack.size == SIZE and columns_of(stack.rows).size == SIZE


def test_errors_name_every_problem():
    stack, repeat, new, first, count = operands(1, [0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="impl='fast' .*first is float32.*must be int32"):
        write_entries(stack, repeat, new, first.astype(jnp.float32), count, impl="fast")
    with pytest.raises(ValueError, match=r"\[0\]: new \(3, 1, 63\) must be \(3, 1, 64\)"):
        write_entries(stack, repeat, (new[0][..., 1:], *new[1:]), first, count)
    with pytest.raises(ValueError, match="new is float8_e4m3fn, must be uint8"):
        write_entries(stack, repeat, (new[0], new[0][..., :8], *new[2:]), first, count)
    with pytest.raises(ValueError, match="has the structure"):
        write_entries(stack, repeat, new[:2], first, count)
    narrow = Columns((jnp.zeros((1, 3, 3, 8), jnp.uint8),), (True,))
    with pytest.raises(ValueError, match="3 numbers of 1 bytes must fill whole words"):
        write_entries(narrow, repeat, (jnp.zeros((3, 1, 3), jnp.uint8),), first, count)


def test_no_gradients():
    stack, repeat, new, first, count = operands(1, [0, 0, 0], [1, 1, 1])
    wide = Columns((stack.stored[3],), (True,))
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda x: write_entries(wide, repeat, (x,), first, count, interpret=True).stored[0].sum())(
            new[3]
        )


KEYS = ((64, jnp.uint8), (4, jnp.uint8))
ENTRIES = ((448, jnp.float8_e4m3fn), (8, jnp.uint8), (64, jnp.bfloat16))
FP8_KEYS = ((128, jnp.float8_e4m3fn), (1, jnp.float32))
V4 = {
    "FP4 keys": (KEYS, (), 16384),
    "FP8 entries": (ENTRIES, (), 512),
    "FP8 entries of a million tokens": (ENTRIES, (), 8200),
    "FP8 keys": (FP8_KEYS, (0,), 16384),
}


def compiled(chip, case, num_new):
    arrays, keep_rows, size = V4[case]
    turned = tuple(number not in keep_rows for number in range(len(arrays)))

    def of(width, dtype, is_turned):
        return jax.ShapeDtypeStruct((4, 4, width, size) if is_turned else (4, 4, size, width), dtype)

    def write(repeat, first, count, *leaves):
        half = len(leaves) // 2
        stack = Columns(leaves[:half], turned)
        return write_entries(stack, repeat, leaves[half:], first, count).stored

    stack = [of(width, dtype, own) for (width, dtype), own in zip(arrays, turned, strict=True)]
    new = [jax.ShapeDtypeStruct((4, num_new, width), dtype) for width, dtype in arrays]
    at = jax.ShapeDtypeStruct((4,), jnp.int32)
    return compile_for(chip, write, jax.ShapeDtypeStruct((), jnp.int32), at, at, *stack, *new)


def test_compiles_by_default_for_v6e():
    assert "tpu_custom_call" in compiled("v6e", "FP4 keys", 1).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("num_new", [1, 3, 513])
@pytest.mark.parametrize("case", V4)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, case, num_new):
    assert "tpu_custom_call" in compiled(chip, case, num_new).as_text()
