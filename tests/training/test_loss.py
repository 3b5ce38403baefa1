"""Losses against plain formulas: values, gradients, masks, chunking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.model.operations import Operation, rows_cross_entropy
from dsv4_jax.training.loss import (
    LossParts,
    Targets,
    mean_cross_entropy,
    shifted_targets,
)
from dsv4_jax.training.step_settings import Rates


def chunked(hidden, head, targets, chunk):
    settings = (("impl", "xla"), ("chunk", chunk))
    return mean_cross_entropy(hidden, head, targets, Operation("cross_entropy", rows_cross_entropy, settings))


jitted = jax.jit(chunked, static_argnums=3)
gradients = jax.jit(jax.grad(chunked, (0, 1)), static_argnums=3)


def plain_cross_entropy(hidden, head, targets):
    logits = jnp.einsum("btd,vd->btv", hidden, head, precision="highest")
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets.ids[..., None], axis=-1)[..., 0]
    valid = targets.valid.astype(jnp.float32)
    return -jnp.sum(picked * valid) / jnp.maximum(valid.sum(), 1)


def random_problem(batch=3, length=7, width=5, vocab=11, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32) * 3
    head = rng.normal(size=(vocab, width)).astype(np.float32)
    ids = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    return jnp.array(hidden), jnp.array(head), Targets(jnp.array(ids), jnp.array(rng.random(ids.shape) < 0.7))


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 1000])
def test_cross_entropy_and_gradients_match_the_plain_formula(chunk):
    hidden, head, targets = random_problem()

    def ours(hidden, head):
        return 1.7 * chunked(hidden, head, targets, chunk)

    def plain(hidden, head):
        return 1.7 * plain_cross_entropy(hidden, head, targets)

    got, got_grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(ours)(hidden, head), want, rtol=1e-6)  # the path without gradients
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_invalid_targets_have_no_influence_at_all():
    hidden, head, targets = random_problem(seed=1)
    other = Targets(jnp.where(targets.valid, targets.ids, 0), targets.valid)
    moved = jnp.where(targets.valid[..., None], hidden, 1e3)
    grad = gradients(hidden, head, targets, 4)[0]
    assert not np.asarray(grad)[~np.asarray(targets.valid)].any()
    np.testing.assert_array_equal(jitted(hidden, head, targets, 4), jitted(moved, head, other, 4))


def test_no_target_is_zero_with_zero_gradients_and_large_logits_stay_finite():
    hidden, head, targets = random_problem(seed=2)
    empty = Targets(targets.ids, jnp.zeros_like(targets.valid))
    assert jitted(hidden, head, empty, 8) == 0
    assert not any(np.asarray(grad).any() for grad in gradients(hidden, head, empty, 4))
    assert np.isfinite(jitted(hidden * 1e4, head, targets, 8))
    assert all(np.isfinite(grad).all() for grad in gradients(hidden * 1e4, head, targets, 4))


def test_half_precision_inputs_are_computed_in_float32():
    hidden, head, targets = random_problem(seed=3)
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    want = plain_cross_entropy(hidden.astype(jnp.float32), head.astype(jnp.float32), targets)
    loss = jitted(hidden, head, targets, 4)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert all(grad.dtype == jnp.bfloat16 for grad in gradients(hidden, head, targets, 4))


def test_logits_are_never_whole_in_memory():
    hidden = jax.ShapeDtypeStruct((4, 512, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((3001, 8), jnp.float32)
    targets = Targets(jax.ShapeDtypeStruct((4, 512), jnp.int32), jax.ShapeDtypeStruct((4, 512), jnp.bool_))
    step = jax.jit(jax.grad(lambda h, w, t: chunked(h, w, t, 64), (0, 1)))
    temporary = step.lower(hidden, head, targets).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 512 * 3001 * 4 / 4  # the logits alone would be 24.6 MB


@pytest.mark.parametrize("offset", [1, 2])
def test_targets_stay_inside_their_segment(offset):
    tokens = jnp.arange(10, 20, dtype=jnp.int32)[None]
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 3, 3, 0, 0]])
    targets = shifted_targets(tokens, segments, offset)
    expected = {1: [0, 1, 4, 5, 6], 2: [0, 4, 5]}[offset]
    assert np.flatnonzero(targets.valid[0]).tolist() == expected
    for t in expected:
        assert targets.ids[0, t] == tokens[0, t + offset]


def test_targets_longer_than_the_row_do_not_exist():
    targets = shifted_targets(jnp.ones((2, 1), jnp.int32), jnp.ones((2, 1), jnp.int32), 2)
    assert targets.ids.shape == (2, 1) and not targets.valid.any()


def test_terms_are_weighted_as_specified():
    parts = LossParts(jnp.float32(2.0), jnp.float32(3.0), jnp.float32(10.0))
    np.testing.assert_allclose(parts.total(), 2.0 + 0.3 * 3.0 + 1e-4 * 10.0, rtol=1e-6)
    rates = Rates(np.float32(1), mtp=np.float32(0.1), balance=np.float32(0.5), indexer=np.float32(2))
    parts = parts._replace(indexer=jnp.float32(7.0), z=jnp.float32(4.0))
    rates = rates._replace(z=np.float32(0.25))
    np.testing.assert_allclose(parts.total(rates), 2.0 + 0.1 * 3.0 + 0.5 * 10.0 + 2 * 7.0 + 1.0, rtol=1e-6)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_a_z_loss_is_the_mean_squared_log_sum_exp(impl):
    hidden, head, targets = random_problem(seed=4)
    settings = (("impl", impl), *((("chunk", 5),) if impl == "xla" else ()))
    operation, weight = Operation("cross_entropy", rows_cross_entropy, settings), jnp.float32(0.3)

    def ours(hidden, head):
        return mean_cross_entropy(hidden, head, targets, operation, z_weight=weight)

    def plain(hidden, head):
        lse = jax.nn.logsumexp(jnp.einsum("btd,vd->btv", hidden, head, precision="highest"), axis=-1)
        valid = targets.valid.astype(jnp.float32)
        squares = jnp.sum(valid * lse**2) / valid.sum()
        return plain_cross_entropy(hidden, head, targets) + weight * squares, jax.lax.stop_gradient(squares)

    (got, got_grads), (want, want_grads) = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head) for loss in (ours, plain)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(ours)(hidden, head), want, rtol=1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert np.abs(want_grads[0] - gradients(hidden, head, targets, 4)[0]).max() > 0.1
