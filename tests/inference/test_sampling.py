"""Sampling: greedy, temperature, nucleus, independence of rows and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.inference.sampling import checked_sampling, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]], jnp.float32))


def draws(top_p: float, temperature: float = 1.0, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    one = lambda key: sample(LOGITS, key, jnp.float32(temperature), jnp.float32(top_p))[0]  # noqa: E731
    return np.bincount(jax.jit(jax.vmap(one))(keys), minlength=4) / count


def test_temperature_zero_is_argmax_with_ties_to_the_lowest_id():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 1.0, 0.0, 2.0]])
    got = sample(logits, jax.random.key(1), jnp.float32(0), jnp.float32(0.5))
    assert got.tolist() == [1, 0]


def test_temperature_one_draws_the_distribution():
    np.testing.assert_allclose(draws(1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_temperature_flattens():
    p = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(draws(1.0, temperature=2.0), p / p.sum(), atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)])
def test_nucleus_keeps_the_smallest_set_that_reaches_top_p(top_p, kept):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    p[kept:] = 0
    np.testing.assert_allclose(draws(top_p), p / p.sum(), atol=0.03)


def test_rows_draw_independently():
    logits = jnp.zeros((64, 16))
    got = sample(logits, jax.random.key(0), jnp.float32(1), jnp.float32(1))
    assert len(set(got.tolist())) > 8


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_temperature_is_refused_together_with_bad_top_p(value):
    with pytest.raises(ValueError, match=r"temperature=.*top_p=0"):
        checked_sampling(value, 0.0)
