"""The bias rule: direction, exact ties, stacks, and that it balances a skewed router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.training.balance import BIAS_SPEED, updated_bias


def test_overloaded_go_down_underloaded_go_up_equal_stays():
    bias = jnp.array([0.5, -0.25, 0.0])
    got = updated_bias(bias, jnp.array([9, 0, 3]), 0.125)
    np.testing.assert_array_equal(got, [0.375, -0.125, 0.0][:2] + [0.125])
    mean = updated_bias(bias, jnp.array([6, 0, 3]), 0.125)  # mean 3: the last is exactly average
    np.testing.assert_array_equal(mean, [0.375, -0.125, 0.0])
    assert BIAS_SPEED == 0.001


@pytest.mark.parametrize("num_experts", [3, 7, 48])
def test_equal_loads_change_nothing_although_the_mean_is_not_exact(num_experts):
    loads = jnp.full((2, num_experts), 341, jnp.int32)
    bias = jnp.zeros((2, num_experts))
    np.testing.assert_array_equal(updated_bias(bias, loads), bias)


def test_layers_of_a_stack_are_independent():
    bias = jnp.zeros((2, 3))
    got = updated_bias(bias, jnp.array([[4, 0, 2], [1, 1, 4]]), 1.0)
    np.testing.assert_array_equal(got, [[-1, 1, 0], [1, 1, -1]])


def test_repeated_updates_balance_a_skewed_router():
    scores = jax.random.uniform(jax.random.key(0), (400, 8)) + jnp.arange(8) * 0.05
    bias = jnp.zeros(8)

    @jax.jit
    def loads(bias):
        chosen = jax.lax.top_k(scores + bias, 2)[1]
        return jnp.bincount(chosen.reshape(-1), length=8)

    before = loads(bias)
    for _ in range(300):
        bias = updated_bias(bias, loads(bias))
    after = loads(bias)
    assert before.max() > 1.5 * before.mean() and after.max() < 1.1 * after.mean()
