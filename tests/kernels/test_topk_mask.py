"""`topk_mask`: exact against sorting, ties, NaN, infinities, too few visible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.topk_mask import topk_mask


def by_hand(scores, visible, k):
    mask = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:-1]):
        candidates = [i for i in np.flatnonzero(visible[row]) if not np.isnan(scores[row][i])]
        level = np.where(np.abs(scores[row]) < np.finfo(np.float32).tiny, 0, scores[row])
        best = sorted(candidates, key=lambda i, level=level: (-level[i], i))[:k]
        mask[row][best] = True
    return mask


# As the model calls it: XLA rewrites floating point in ways that single operations do not show.
compiled = functools.partial(jax.jit, static_argnums=2, static_argnames="impl")(topk_mask)


def check(scores, visible, k):
    want = by_hand(scores, visible, k)
    for impl in ("xla", "reference"):
        got = compiled(scores, visible, k, impl=impl)
        np.testing.assert_array_equal(got, want, err_msg=impl)


@pytest.mark.parametrize(("shape", "k"), [((1, 1), 1), ((3, 7), 2), ((2, 3, 65), 64), ((4, 100), 200)])
def test_random_scores(shape, k):
    rng = np.random.default_rng(0)
    check(rng.standard_normal(shape, np.float32), rng.random(shape) < 0.7, k)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_ties_go_to_the_lowest_index(k):
    scores = np.array([[0, 1, 1, 1, 0, -0.0, 1], [2, 2, 2, 2, 2, 2, 2]], np.float32)
    check(scores, np.array([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]], bool), k)


def test_special_values():
    scores = np.array([[np.nan, np.inf, -np.inf, 0, -1, 1e-30, -3e38, np.nan]], np.float32)
    for k in range(1, 9):
        check(scores, np.ones((1, 8), bool), k)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_subnormal_scores_equal_zero(k):
    scores = np.array([[-1e-40, 0.0, 1e-42, -0.0, 1e-38, 1.2e-38, -1.2e-38]], np.float32)
    check(scores, np.ones(scores.shape, bool), k)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_without_rows_or_scores(shape, impl):
    got = compiled(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool), 2, impl=impl)
    assert got.shape == shape and got.dtype == bool


def test_rows_in_every_state_together():
    """Too few visible, exactly k, ties for the last place, no ties, all equal: one search serves them all."""
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((6, 70)).astype(np.float32)
    visible = np.ones((6, 70), bool)
    visible[0, 5:] = False
    visible[1, 9:] = False
    scores[2] = np.round(scores[2] * 2) / 2
    scores[4] = 7.0
    visible[4, ::3] = False
    scores[5, 20:] *= 1e38  # up to the largest numbers, both signs
    scores[5, :3] = [np.nan, np.inf, -np.inf]
    for k in (1, 9, 40, 69, 70, 71):
        check(scores, visible, k)


def test_nothing_visible():
    assert not topk_mask(jnp.ones((2, 5)), jnp.zeros((2, 5), bool), 3).any()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 3.0, 3.0000002]), min_size=24, max_size=24),
    st.lists(st.booleans(), min_size=24, max_size=24),
    st.sampled_from([1, 4, 24]),
)
def test_crowded_scores(values, seen, k):
    check(np.array([values], np.float32), np.array([seen]), k)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="k=0"):
        topk_mask(jnp.ones((1, 3)), jnp.ones((1, 3), bool), 0)
    with pytest.raises(ValueError, match="one shape"):
        topk_mask(jnp.ones((1, 3)), jnp.ones((3,), bool), 1)
