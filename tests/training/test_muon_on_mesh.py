"""Training steps with Muon on eight devices are those of one, keep where things lie, and compile once."""

import jax
import numpy as np

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from tests.models import compressed_kinds

CONFIG = compressed_kinds(initializer_range=0.2, num_nextn_predict_layers=0)
OPTIMIZER = Muon()
MESH = "fsdp=2,expert=2,tensor=2"


TOKENS = np.random.default_rng(0).integers(0, 256, (8, 12)).astype(np.int32)
BATCH = Batch(TOKENS, np.ones_like(TOKENS))


def steps(model, count=3):
    """(reports of so many steps, the state after them)."""
    state = initial_state(model.parameters, OPTIMIZER)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    before, reports = train_step._cache_size(), []
    for _ in range(count):
        state, report = train_step(
            model.network, StepSettings(OPTIMIZER), state, BATCH, Rates(np.float32(2e-3))
        )
        reports.append(jax.device_get(report))
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert got.sharding.is_equivalent_to(want, got.ndim)
    assert train_step._cache_size() == before + 1
    return reports, state


def test_steps_on_eight_devices_are_those_of_one():
    wanted, alone = steps(LanguageModel.random(CONFIG, Policy.of("float32")))
    reports, spread = steps(LanguageModel.random(CONFIG, Policy.of("float32"), mesh=MESH, rules="train"))
    for got, want in zip(reports, wanted, strict=True):
        np.testing.assert_allclose(got.main, want.main, rtol=1e-5)
        np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=1e-4)
    assert wanted[0].main - wanted[-1].main > 0.01
    for tree in (alone, spread):
        assert int(tree.step) == 3 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree.trained))
