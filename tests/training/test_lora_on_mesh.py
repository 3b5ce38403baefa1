"""LoRA on eight devices: losses, gradients of the small matrices and steps are those of one."""

import jax
import numpy as np

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import LORA
from dsv4_jax.training.lora import Lora, lora_state, with_lora
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, train_step
from tests.models import all_kinds
from tests.training.test_lora import random_factors
from tests.training.test_on_mesh import FLOOR, packed

CONFIG = all_kinds(
    vocab_size=64,
    attention_kinds=("csa",),
    router_kinds=("learned",),
    num_nextn_predict_layers=0,
)
# Matrices that the mesh splits by experts, by both of their dims, and not at all.
TARGETS = Lora(3, 6.0, ("*/experts/*", "*/attn/wo_a", "*/attn/wq_b", "embed", "head", "*/compressor/wkv"))


def trained(mesh):
    """(reports of three steps, gradients of the first, small matrices after the last) on a mesh."""
    model = LanguageModel.random(CONFIG, Policy.of("float32"), mesh=mesh, rules=mesh and "train")
    network = with_lora(model.network, TARGETS)
    optimizer = AdamW(weight_decay=0.0, max_grad_norm=1e9)
    state = lora_state(network, model.parameters, 0, optimizer)
    # As after some training: where `b` is zero, `a` has no gradient.
    factors = jax.tree.map(
        lambda drawn, held: jax.device_put(drawn, held.sharding), random_factors(network), state.trained[LORA]
    )
    state = state._replace(trained={LORA: factors})
    kept, before = [leaf.sharding for leaf in jax.tree.leaves(state)], train_step._cache_size()
    rates, reports, gradients = Rates(np.float32(1e-3), bias_speed=np.float32(0)), [], None
    for _ in range(3):
        state, report = train_step(network, StepSettings(optimizer), state, packed(8, 16), rates)
        reports.append(jax.device_get(report))
        if (
            gradients is None
        ):  # the first moment of a first step is the gradient, times what AdamW makes of it
            mu = next(part.mu for part in jax.tree.leaves(state.moments, is_leaf=is_adam) if is_adam(part))
            gradients = jax.tree.map(lambda leaf: leaf / (1 - optimizer.beta1), jax.device_get(mu))
    if mesh is not None:  # alone, the factors that were put there count as other arguments than a step's
        assert train_step._cache_size() == before + 1
    for leaf, sharding in zip(jax.tree.leaves(state), kept, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return reports, gradients, jax.device_get(state.trained)


def is_adam(node):
    return hasattr(node, "mu") and hasattr(node, "nu")


def test_steps_of_lora_on_a_mesh_are_those_of_one_device():
    reports, gradients, after = trained("fsdp=2,expert=2,tensor=2")
    wanted_reports, wanted, wanted_after = trained(None)
    for report, other in zip(reports, wanted_reports, strict=True):
        for name, value in other.scalars.items():
            np.testing.assert_allclose(report.scalars[name], value, rtol=2e-5, atol=1e-8, err_msg=name)
        np.testing.assert_array_equal(report.loads, other.loads)
    leaves = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, want), got in zip(leaves, jax.tree.leaves(gradients), strict=True):
        name = jax.tree_util.keystr(path)
        if "indexer" in name:  # has none by the losses of text
            assert not np.any(got) and not np.any(want), name
            continue
        assert np.abs(want).max() > 1e-6, name
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max() + FLOOR, name
    for got, want in zip(jax.tree.leaves(after), jax.tree.leaves(wanted_after), strict=True):
        # Three steps of 1e-3 each; a sign that rounding turned would be two of them.
        assert np.mean(np.abs(got - want) > 1e-4) < 0.01
