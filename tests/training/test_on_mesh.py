"""Losses, gradients and steps of training on eight devices are those of one."""

import jax
import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.training_mode import TrainingMode
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW, merge_params, split_trainable
from dsv4_jax.training.step import Rates, StepSettings, forward_losses, initial_state, train_step
from tests.models import all_kinds

CONFIG = all_kinds(
    vocab_size=64,
    attention_kinds=("window", *("csa", "hca") * 2),
    router_kinds=("hash", *("learned",) * 4),
    num_nextn_predict_layers=1,
)
FLOOR = 1e-9
"""Gradients of the last collapse are differences that cancel to 1e-7: what is left is rounding."""


def packed(rows=8, length=48):
    """Documents that end anywhere, one token long, or over a whole row; padding at ends."""
    rng = np.random.default_rng(1)
    segments = np.ones((rows, length), np.int32)
    for row, ends in enumerate([(17,), (1, 2, 30), (5, 47), (24,), (), (12, 13, 36), (40,), (23, 25)]):
        for end in ends:
            segments[row, end:] += 1
    segments[2, 20:] = 0
    segments[6, 45:] = 0
    return Batch(rng.integers(0, 64, (rows, length)).astype(np.int32), segments)


def losses_and_gradients(lm, batch):
    trained, fixed = split_trainable(lm.parameters)

    @jax.jit
    def run(trained, fixed, batch):
        def loss(trained):
            model = lm.network.holding(merge_params(trained, fixed))
            parts, report = forward_losses(model, batch, TrainingMode(index_loss=True))
            return parts.total(), (parts, report)

        return jax.value_and_grad(loss, has_aux=True)(trained)

    return jax.device_get(run(trained, fixed, batch))


@pytest.fixture(scope="module")
def wanted():
    return losses_and_gradients(LanguageModel.random(CONFIG, Policy.of("float32")), packed())


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=2,expert=2,tensor=2",
        "context=2,expert=2,tensor=2",  # the compiler got gradients of keys wrong that were split by tokens
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in (
                "data=1",
                "data=8",
                "fsdp=8",
                "expert=8",
                "tensor=2",
                "context=8",
                "data=2,fsdp=2,expert=2",
                "data=2,context=4",
            )
        ),
    ],
)
def test_losses_gradients_and_loads(wanted, mesh):
    spread = LanguageModel.random(CONFIG, Policy.of("float32"), mesh=mesh, rules="train")
    compare(losses_and_gradients(spread, packed()), wanted)


def compare(found, wanted):
    (loss, (parts, report)), gradients = found
    (other_loss, (other_parts, other_report)), others = wanted
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    np.testing.assert_allclose(parts, other_parts, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(report), jax.tree.leaves(other_report), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)  # loads are counts: equal
    leaves = jax.tree_util.tree_leaves_with_path(others)
    for (path, want), got in zip(leaves, jax.tree.leaves(gradients), strict=True):
        limit = 1e-5 * np.abs(want).max() + FLOOR
        assert np.abs(got - want).max() <= limit, jax.tree_util.keystr(path)


def test_a_step_keeps_the_shardings_and_is_compiled_once():
    spread = LanguageModel.random(CONFIG, Policy.of("float32"), mesh="fsdp=4,expert=2", rules="train")
    optimizer = AdamW()
    state = initial_state(spread.parameters, optimizer)
    settings, rates = StepSettings(optimizer), Rates(np.float32(1e-3))
    before = train_step._cache_size()
    wanted = jax.tree.map(lambda leaf: leaf.sharding, state)
    for _ in range(2):
        state, report = train_step(spread.network, settings, state, packed(8, 16), rates)
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert got.sharding.is_equivalent_to(want, got.ndim)
    assert train_step._cache_size() == before + 1
    assert np.isfinite(report.loss) and int(state.step) == 2
