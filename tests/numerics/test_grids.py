"""The truth table of roundings: what each policy rounds, and to which grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.numerics import cache_formats, qat
from dsv4_jax.numerics.grids import Grids, as_it_is, grids
from dsv4_jax.numerics.policy import Policy

NUM_ROTARY = 16
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 128)), jnp.float32)

FUNCTIONS = ("activation", "entry", "index_query", "index_key", "score", "expert")

GRID = {
    "same": lambda x: x,
    "fp8 128": qat.fake_activation,
    "fp8 64": lambda x: qat.fake_entry(x, NUM_ROTARY),
    "entry": lambda x: cache_formats.round_entries(x, "fp8+fp8", NUM_ROTARY),
    "hadamard": qat.hadamard,
    "hadamard fp8": lambda x: cache_formats.round_keys(qat.hadamard(x), "fp8+fp8"),
    "hadamard fp4": qat.fake_index_vector,
    "bfloat16": qat.to_bfloat16,
    "fp4": qat.fake_mxfp4,
}
QAT = ("fp8 128", "fp8 64", "hadamard fp4", "hadamard fp4", "bfloat16", "fp4")

# (cache, switches or None for numerics="reference") -> the grid of each function, and the compressors' dtype
TABLE = {
    ("plain", None): ("same",) * 6 + (None,),
    ("fp8+fp8", None): ("same", "entry", "hadamard", "hadamard fp8", "same", "same", None),
    ("fp8+mxfp4", None): ("same", "entry", "hadamard fp4", "hadamard fp4", "same", "same", None),
    ("plain", tuple(qat.SWITCHES)): (*QAT, "float32"),
    ("fp8+mxfp4", tuple(qat.SWITCHES)): (QAT[0], "entry", *QAT[2:], "float32"),
    ("fp8+fp8", ("kv_fp8", "act_fp8")): (
        "fp8 128", "entry", "hadamard", "hadamard fp8", "same", "same", None,
    ),
    ("plain", ("act_fp8",)): ("fp8 128", *("same",) * 5, None),
    ("plain", ("kv_fp8",)): ("same", "fp8 64", *("same",) * 4, None),
    ("plain", ("idx_hadamard_fp4",)): (*("same",) * 2, *("hadamard fp4",) * 2, *("same",) * 2, None),
    ("plain", ("idx_score_bf16",)): (*("same",) * 4, "bfloat16", "same", None),
    ("plain", ("expert_fp4",)): (*("same",) * 5, "fp4", None),
    ("plain", ("compressor_fp32",)): (*("same",) * 6, "float32"),
    ("plain", ()): ("same",) * 6 + (None,),
}  # fmt: skip


@functools.cache
def rounded(grid):
    return np.asarray(jax.jit(GRID[grid])(X))


def test_the_grids_differ():
    """Or the table below could not tell one from another."""
    found = {rounded(grid).tobytes() for grid in GRID}
    assert len(found) == len(GRID)


@pytest.mark.parametrize(("cache", "switches"), TABLE, ids=str)
def test_truth_table(cache, switches):
    numerics = "reference" if switches is None else "qat"
    policy = Policy.of("float32", numerics, switches=switches, cache=cache)
    *expected, dtype = TABLE[cache, switches]
    found = grids(policy, NUM_ROTARY)
    for name, grid in zip(FUNCTIONS, expected, strict=True):
        function = getattr(found, name)
        assert (function is as_it_is) == (grid == "same"), name
        np.testing.assert_array_equal(jax.jit(function)(X), rounded(grid), err_msg=name)
    assert found.compressor_dtype == (dtype and jnp.dtype(dtype))
    assert policy.row_dtype == (dtype or "float32")
    assert found.hidden is (None if expected[0] == "same" else found.activation)
    assert found.rounds_scores == (expected[4] == "bfloat16")


def test_weights_of_training():
    """FP8 by 128 x 128; of experts only where they are not FP4, which FP8 holds exactly."""
    assert grids(Policy.of("float32", "qat"), NUM_ROTARY).weight is as_it_is
    fp8, wanted = grids(Policy.of("float32", weights="fp8"), NUM_ROTARY), qat.fake_fp8_weight(X)
    for function in (fp8.weight, fp8.expert):
        np.testing.assert_array_equal(function(X), wanted)
    both = grids(Policy.of("float32", "qat", weights="fp8"), NUM_ROTARY)
    np.testing.assert_array_equal(both.expert(X), qat.fake_mxfp4(X))
    assert both.weight is qat.fake_fp8_weight


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_pass_straight_through(name):
    """Of index vectors it is that of the transform: with its matrix of +-1, which is symmetric."""
    everything = Policy.of("float32", "qat", cache="fp8+mxfp4")
    function = getattr(grids(everything, NUM_ROTARY), name)
    d_y = jnp.roll(X, 1)
    got = jax.jit(lambda x, d: jax.vjp(function, x)[1](d)[0])(X, d_y)
    if not name.startswith("index"):
        np.testing.assert_array_equal(got, d_y)
        return
    matrix = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 7)
    want = np.asarray(d_y, np.float64) @ matrix / 128**0.5
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_equal_policies_give_equal_grids():
    """They are part of the key of a compiled program."""
    policy = Policy.of("bfloat16", "qat", cache="fp8+mxfp4")
    first = grids(policy, NUM_ROTARY)
    grids.cache_clear()
    again = grids(policy, NUM_ROTARY)
    assert first is not again and first == again and hash(first) == hash(again)
    assert first != grids(policy, 32) != Grids()
