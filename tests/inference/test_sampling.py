"""Sampling: greedy, temperature, nucleus, independence of rows and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.inference.sampling import NO_TOKEN, checked_sampling, keys_at, request_keys, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]], jnp.float32))


def draws(top_p: float, temperature: float = 1.0, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.broadcast_to(LOGITS, (count, 4))
    tokens = jax.jit(sample)(logits, keys, jnp.full(count, temperature), jnp.full(count, top_p))
    return np.bincount(tokens, minlength=4) / count


def test_temperature_zero_is_argmax_with_ties_to_the_lowest_id():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 1.0, 0.0, 2.0]])
    got = sample(logits, jax.random.split(jax.random.key(1), 2), jnp.zeros(2), jnp.full(2, 0.5))
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
    got = sample(logits, request_keys(0, 64), jnp.ones(64), jnp.ones(64))
    assert len(set(got.tolist())) > 8


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_temperature_is_refused_together_with_bad_top_p(value):
    with pytest.raises(ValueError, match=r"temperature=.*top_p=0"):
        checked_sampling(value, 0.0)


HEATS = np.array([0.0, 1.0, 0.7, 1.3], np.float32)
MASSES = np.array([0.9, 1.0, 0.5, 0.8], np.float32)


def test_a_row_draws_alone_what_it_draws_in_any_slot_of_a_batch():
    logits = jax.random.normal(jax.random.key(3), (4, 50)) * 2
    seeds, position = [7, 8, 2**40, 7], np.array([5, 90, 0, 6], np.int32)

    def drawn(rows: list[int]) -> list[int]:
        keys = keys_at(request_keys([seeds[r] for r in rows], len(rows)), jnp.asarray(position[rows]))
        picked = [jnp.asarray(x[np.array(rows)]) for x in (np.asarray(logits), HEATS, MASSES)]
        return sample(picked[0], keys, *picked[1:]).tolist()

    together = drawn([0, 1, 2, 3])
    assert drawn([3, 1, 0, 2]) == [together[r] for r in (3, 1, 0, 2)]
    assert [drawn([r])[0] for r in range(4)] == together
    assert together[0] == int(logits[0].argmax())


def test_a_mass_of_one_keeps_all_beside_rows_that_cut():
    logits = jnp.broadcast_to(LOGITS, (4000, 4))
    keys = jax.random.split(jax.random.key(0), 4000)
    masses = jnp.where(jnp.arange(4000) % 2 == 0, 1.0, 0.5)
    tokens = np.asarray(jax.jit(sample)(logits, keys, jnp.ones(4000), masses))
    assert set(tokens[1::2]) == {0} and set(tokens[::2]) == {0, 1, 2, 3}


def test_requests_of_one_seed_differ_and_its_first_is_that_of_a_row_alone():
    data = lambda keys: jax.random.key_data(keys).tolist()  # noqa: E731
    together = data(request_keys(5, 3))
    assert len({tuple(key) for key in together}) == 3
    assert data(request_keys([9, 5], 2))[1] == together[0] == data(request_keys(5, 1))[0]


def test_all_problems_of_seeds_are_told():
    with pytest.raises(ValueError, match=r"row 0: seed=-1 .*row 2: seed=1.5 .*3 seeds were given for 2 rows"):
        request_keys([-1, 0, 1.5], 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_no_token_where_logits_are_no_numbers(temperature, top_p):
    rows = [[1.0, 3.0, 0.0], [1.0, np.nan, 0.0], [np.inf, 0.0, 0.0], [-np.inf] * 3, [0.0, -np.inf, -np.inf]]
    count = len(rows)
    how = request_keys(2, count), jnp.full(count, temperature), jnp.full(count, top_p)
    logits = jnp.array(rows, jnp.float32)
    got = sample(logits, *how).tolist()
    assert got[1:] == [NO_TOKEN] * 3 + [0] and got[0] in (0, 1, 2)
    finite = sample(jnp.where(jnp.isfinite(logits).any(axis=1)[:, None], logits, 0.0), *how)
    assert got[0] == int(finite[0]), "a row does not depend on others"
