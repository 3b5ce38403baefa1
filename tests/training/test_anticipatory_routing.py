"""Experts chosen ahead: the same step if nothing changed since, and theirs if something did."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.anticipatory_routing import chosen_experts
from dsv4_jax.training.batch_losses import forward_losses
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import Sgd, merge_params, split_trainable
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from tests.models import compressed_kinds

CONFIG = compressed_kinds(
    vocab_size=64,
    attention_kinds=("window",) * 6,
    router_kinds=("hash", *("learned",) * 5),
    initializer_range=0.3,
)
"""A layer alone, and a stack of five, which is scanned."""
NETWORK = Network(CONFIG, Policy.of("float32"))
SETTINGS = StepSettings(Sgd())


def drawn(seed):
    return initial_parameters(CONFIG, NETWORK.policy, seed)


def batch():
    segments = np.ones((4, 10), np.int32)
    segments[1, 6:] = 2
    segments[2, 8:] = 0
    return Batch(np.random.default_rng(1).integers(2, 64, segments.shape).astype(np.int32), segments)


@functools.cache
def ahead(seed):
    return jax.device_get(chosen_experts(NETWORK, drawn(seed), batch()))


def step(experts, settings=SETTINGS):
    state = initial_state(drawn(3), settings.optimizer)
    return jax.device_get(train_step(NETWORK, settings, state, batch(), Rates(np.float32(0.1)), experts))


def test_experts_of_the_same_parameters_give_the_step_without_them():
    experts = ahead(3)
    assert experts.dtype == np.int16 and experts.shape == (7, 4, 10, CONFIG.num_experts_per_tok)
    (want, want_report), (got, report) = step(None), step(experts)
    np.testing.assert_array_equal(report.loads, want_report.loads)
    for name, value in want_report.scalars.items():
        np.testing.assert_allclose(report.scalars[name], value, rtol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-7)


def test_loads_and_biases_follow_the_experts_that_were_applied():
    experts = ahead(4)
    state, report = step(experts)
    _, own = step(None)
    segments = batch().segment_ids
    follows = np.zeros_like(segments, bool)
    follows[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    counted = [segments > 0] * 6 + [follows]
    loads = [
        np.bincount(e[c].reshape(-1), minlength=CONFIG.n_routed_experts)
        for e, c in zip(experts, counted, strict=True)
    ]
    np.testing.assert_array_equal(report.loads, loads)
    assert (report.loads != own.loads).any(axis=1).all()
    biases = state.fixed["stacks"][1]["blocks"][0]["ffn"]["gate"]["bias"]
    mean = np.mean(loads, axis=1, keepdims=True)
    np.testing.assert_allclose(biases, 1e-3 * np.sign(mean - loads)[1:6], rtol=1e-6)


def test_weights_are_the_current_scores_of_the_given_experts():
    """Wherever an expert is not given its score does not matter, and the router's gradient is not 0."""
    trained, fixed = split_trainable(drawn(3))

    @jax.jit
    def gradients(experts):
        def loss(trained):
            parts, _ = forward_losses(NETWORK.holding(merge_params(trained, fixed)), batch(), experts=experts)
            return parts.main

        return jax.grad(loss)(trained)

    only_two = np.zeros_like(ahead(3)) + np.arange(CONFIG.num_experts_per_tok, dtype=np.int16)
    router = gradients(only_two)["stacks"][1]["blocks"][0]["ffn"]["gate"]["weight"]
    used = np.abs(np.asarray(router)).max(axis=(0, 2)) > 0
    assert used.tolist() == [e < CONFIG.num_experts_per_tok for e in range(CONFIG.n_routed_experts)]


@pytest.mark.slow
def test_parts_of_a_batch_get_their_own_experts():
    experts = ahead(4)
    (want, want_report), (got, report) = (
        step(experts, dataclasses.replace(SETTINGS, accumulate=count)) for count in (1, 2)
    )
    np.testing.assert_array_equal(report.loads, want_report.loads)
    np.testing.assert_allclose(report.loss, want_report.loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * jnp.abs(b).max() + 1e-7)
