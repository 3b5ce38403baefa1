"""Muon against singular values, and against the report's formula written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.training.muon import muon, trailing_matrices
from dsv4_jax.training.newton_schulz import orthogonalized
from dsv4_jax.training.orthogonal_momentum import Matrices, MuonState, scale_by_muon

SHAPES = [(16, 16), (24, 40), (40, 24), (3, 7, 20), (2, 3, 13, 9), (1, 30), (30, 1), (1, 1)]


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def float64_newton_schulz(a):
    """The report's Algorithm 1 for one matrix, without transposing, chunks or float32."""
    y = a / np.linalg.norm(a) if np.any(a) else a
    for step in range(10):
        alpha, beta, gamma = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        gram = y @ y.T
        y = alpha * y + beta * gram @ y + gamma * gram @ gram @ y
    return y


def float64_steps(weight, gradients, rate=0.02, mu=0.95, decay=0.1, gamma=0.18):
    """Weights after each step of Muon on one matrix."""
    weight, kept = weight.astype(np.float64), np.zeros(weight.shape)
    for gradient in np.asarray(gradients, np.float64):
        kept = mu * kept + gradient
        update = float64_newton_schulz(mu * kept + gradient) * gamma * np.sqrt(max(weight.shape))
        weight = weight * (1 - rate * decay) - rate * update
        yield weight


def conditioned(shape, seed=0):
    """Matrices with singular values between 0.2 and 1."""
    u, s, vt = np.linalg.svd(normal(shape, seed).astype(np.float64), full_matrices=False)
    values = np.random.default_rng(seed).uniform(0.2, 1, s.shape)
    return (u * values[..., None, :]) @ vt, u @ vt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_singular_values_become_one_and_vectors_stay(shape, scale):
    matrices, wanted = conditioned(shape)
    got = np.asarray(jax.jit(orthogonalized)(jnp.asarray(scale * matrices, jnp.float32)))
    values = np.linalg.svd(got.astype(np.float64), compute_uv=False)
    assert values.min() >= 0.9999 and values.max() <= 1.001
    assert np.linalg.svd(got - wanted, compute_uv=False).max() <= 1.1e-3


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (5, 32, 32)])
def test_bfloat16_iterations_are_within_its_rounding(shape):
    got = np.asarray(orthogonalized(jnp.asarray(conditioned(shape)[0], jnp.float32), "bfloat16"))
    assert got.dtype == np.float32
    values = np.linalg.svd(got.astype(np.float64), compute_uv=False)
    assert values.min() > 0.985 and values.max() < 1.015
    exact = np.asarray(orthogonalized(jnp.asarray(conditioned(shape)[0], jnp.float32)))
    assert 1e-4 < np.abs(got - exact).max() < 0.02  # it is bfloat16, and no worse


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
def test_matrices_in_chunks_are_those_alone(count):
    matrices = jnp.asarray(normal((count, 32, 32)))  # 16 go at once
    together = np.asarray(orthogonalized(matrices))
    for number in {0, count // 2, count - 1}:
        alone = np.asarray(orthogonalized(matrices[number]))
        np.testing.assert_allclose(together[number], alone, rtol=0, atol=1e-6)


def test_zero_and_rank_one():
    assert not np.asarray(orthogonalized(jnp.zeros((2, 5, 7)))).any()
    assert orthogonalized(jnp.zeros((0, 5, 7))).shape == (0, 5, 7)
    mixed = jnp.stack([jnp.zeros((5, 7)), jnp.asarray(normal((5, 7)))])
    got = np.asarray(orthogonalized(mixed))
    assert np.isfinite(got).all() and not got[0].any() and got[1].any()
    u, v = normal(20), normal(30)
    got = np.asarray(orthogonalized(jnp.asarray(np.outer(u, v))))
    want = np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v)
    # Rounding is of all ranks; what is far below the first singular value grows by 3.4445^8 4 = 80,000.
    assert np.linalg.norm(got - want, 2) < 8e4 * 2**-24


def test_a_gradient_that_is_no_number_shows():
    assert np.isnan(np.asarray(orthogonalized(jnp.full((3, 4), jnp.nan)))).all()


GRADIENTS = {
    "square": normal((5, 16, 16), 1),
    "wide": normal((5, 12, 40), 2),
    "tall": normal((5, 40, 12), 3),
    "one row": normal((5, 1, 9), 4),
    "zero": np.zeros((5, 6, 8), np.float32),
    "zero, then not": np.concatenate([np.zeros((2, 6, 8), np.float32), normal((3, 6, 8), 5)]),
    "not, then zero": np.concatenate([normal((2, 6, 8), 6), np.zeros((3, 6, 8), np.float32)]),
}
WEIGHTS = {name: normal(gradients.shape[1:], 7) for name, gradients in GRADIENTS.items()}
STACKS = normal((5, 2, 3, 10, 14), 8)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_five_steps_are_the_formula(decay):
    transform = muon(0.02, weight_decay=decay)
    params = jax.tree.map(jnp.asarray, WEIGHTS | {"stacks": normal((2, 3, 10, 14), 9)})
    before = jax.device_get(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, seen = transform.init(params), []
    for number in range(5):
        gradients = {name: each[number] for name, each in (GRADIENTS | {"stacks": STACKS}).items()}
        params, state = step(params, state, gradients)
        seen.append(jax.device_get(params))
    for name, gradients in GRADIENTS.items():
        for after, want in zip(seen, float64_steps(WEIGHTS[name], gradients, decay=decay), strict=True):
            np.testing.assert_allclose(after[name], want, rtol=0, atol=2e-5, err_msg=name)
    for i, j in np.ndindex(2, 3):
        wanted = float64_steps(before["stacks"][i, j], STACKS[:, i, j], decay=decay)
        for after, want in zip(seen, wanted, strict=True):
            np.testing.assert_allclose(after["stacks"][i, j], want, rtol=0, atol=2e-5)


def test_rank_one_gradients_over_five_steps_are_the_formula():
    u, v = normal(12, 1), normal(20, 2)
    transform, params = muon(0.02), jnp.asarray(normal((12, 20)))
    gradients = [np.outer(u, v) * np.float32(size) for size in (1.0, -2.0, 0.5, 3.0, 0.1)]
    state, wanted = transform.init(params), float64_steps(np.asarray(params), gradients)
    for number, gradient in enumerate(gradients):
        updates, state = transform.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        difference = np.asarray(params, np.float64) - next(wanted)
        along = u @ difference @ v / np.linalg.norm(u) / np.linalg.norm(v)
        assert abs(along) < 1e-5
        # In other directions there are six roundings, mu M + G twice, the division and the norm, which the
        # iteration makes 80,000 times larger, as it does whatever is that far below the first singular value.
        growth = 6 * 8e4 * 2**-24
        assert np.linalg.norm(difference, 2) < (number + 1) * 0.02 * 0.18 * np.sqrt(20) * growth


@pytest.mark.parametrize("shape", [(64, 64), (32, 200), (200, 32), (4, 24, 96)])
@pytest.mark.parametrize("rms", [0.18, 0.2])
def test_updates_have_the_root_mean_square_asked_for(shape, rms):
    transform = muon(1.0, weight_decay=0.0, update_rms=rms)
    gradient = jnp.asarray(1e-3 * normal(shape))
    updates, _ = transform.update(gradient, transform.init(gradient))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(updates))), rms, rtol=1e-3)


def test_other_leaves_are_adamw_of_the_report_and_rates_follow_a_schedule():
    params = {
        "bias": jnp.asarray(normal(6)),
        "scale": jnp.float32(2.0),
        "matrix": jnp.asarray(normal((4, 6))),
    }
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    ours, theirs = muon(schedule), optax.adamw(schedule, 0.9, 0.95, 1e-20, weight_decay=0.1)
    state, other = ours.init(params), theirs.init(params)
    update = jax.jit(ours.update)
    for number in range(5):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(normal(leaf.shape, number)), params)  # noqa: B023
        got, state = update(gradients, state, params)
        want, other = theirs.update(gradients, other, params)
        for name in ("bias", "scale"):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-8)
        assert np.any(got["matrix"]) == (number < 4)  # the rate has come down to 0


def test_any_pytree_and_matrices_as_the_caller_reads_them():
    leaves = [jnp.asarray(normal((2, 3, 4, 5))), (jnp.asarray(normal((7, 6))), jnp.asarray(normal((7, 6))))]

    def reading(path, leaf):
        if path[0].idx == 0:
            return Matrices(1, 2)  # [12, 5], two of them
        return None if path[1].idx == 0 else Matrices(0, 1, (2, 5))

    transform = muon(1.0, weight_decay=0.0, matrices=reading)
    updates, _ = transform.update(leaves, transform.init(leaves), leaves)
    for number in range(2):
        folded = -np.asarray(updates[0][number]).reshape(12, 5) / 0.18 / np.sqrt(12)
        np.testing.assert_allclose(folded, orthogonalized(leaves[0][number].reshape(12, 5)), atol=1e-6)
    np.testing.assert_allclose(updates[1][0], -np.sign(leaves[1][0]), rtol=1e-5)
    for part, longer in ((slice(0, 2), 6), (slice(2, 7), 6)):
        alone = orthogonalized(leaves[1][1][part]) * 0.18 * np.sqrt(longer)
        np.testing.assert_allclose(-updates[1][1][part], alone, atol=1e-6)
    wrong = muon(1.0, matrices=lambda path, leaf: Matrices(3, 1))
    with pytest.raises(ValueError, match="cannot be read"):
        wrong.update(leaves, wrong.init(leaves), leaves)


def test_momentum_is_a_plain_sum_in_float32_and_updates_have_the_gradients_dtype():
    transform = scale_by_muon(0.5, 0.18, trailing_matrices)
    state = transform.init({"w": jnp.zeros((4, 4), jnp.bfloat16)})
    gradient = {"w": jnp.full((4, 4), 1.0, jnp.bfloat16)}
    updates, state = transform.update(gradient, state)
    updates, state = transform.update(gradient, state)
    assert isinstance(state, MuonState) and state.momentum["w"].dtype == jnp.float32
    np.testing.assert_array_equal(state.momentum["w"], jnp.full((4, 4), 1.5))
    assert updates["w"].dtype == jnp.bfloat16


def test_hyperparameters_may_be_data():
    made = optax.inject_hyperparams(muon, static_args=("matrices", "layout", "compute_dtype"))
    ours, plain = made(0.1, momentum=0.5, weight_decay=0.2), muon(0.1, momentum=0.5, weight_decay=0.2)
    params, gradient = jnp.asarray(normal((6, 4))), jnp.asarray(normal((6, 4), 1))
    got, state = jax.jit(ours.update)(gradient, ours.init(params), params)
    want, _ = plain.update(gradient, plain.init(params), params)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    assert not np.any(jax.jit(ours.update)(gradient, state, params)[0])


def test_all_numbers_out_of_range_are_named():
    with pytest.raises(ProblemsError) as refused:
        muon(0.1, momentum=1.0, weight_decay=-1.0, update_rms=0.0, compute_dtype="float16")
    assert [problem.split("=")[0] for problem in refused.value.problems] == [
        "momentum", "weight_decay", "update_rms", "compute_dtype",
    ]  # fmt: skip
