"""AdamW: the schedule, what decays, what has no gradient, and one step against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv4_jax.config import DSpark, tiny
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.optimizer import (
    AdamW,
    Schedule,
    Sgd,
    apply_updates,
    decay_mask,
    merge_params,
    split_trainable,
)


@pytest.fixture(scope="module")
def shapes():
    return Network(tiny(), Policy.of("float32")).shapes()


def paths(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def test_what_decays_in_the_real_parameter_tree(shapes):
    trained, _ = split_trainable(shapes)
    decays = {path.rsplit("/")[-1] for path, flag in paths(decay_mask(trained)).items() if flag}
    stays = {path.rsplit("/")[-1] for path, flag in paths(decay_mask(trained)).items() if not flag}
    assert decays == {
        "embed", "head", "fn", "wq_a", "wq_b", "wkv", "wgate", "wo_a", "wo_b", "weight",
        "weights_proj", "gate_up", "down", "e_proj", "h_proj",
    }  # fmt: skip
    assert stays == {
        "attn_norm", "ffn_norm", "q_norm", "kv_norm", "norm", "enorm", "hnorm",
        "attn_sink", "ape", "base", "scale",
    }  # fmt: skip


def test_router_bias_and_hash_tables_are_left_out_and_nothing_is_lost(shapes):
    trained, fixed = split_trainable(shapes)
    assert {path.rsplit("/")[-1] for path in paths(fixed)} == {"bias", "tid2eid"}
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trained))
    assert paths(merge_params(trained, fixed)) == paths(shapes)
    assert paths(merge_params(fixed, trained)) == paths(shapes)
    with pytest.raises(ValueError, match="bias"):
        merge_params(fixed, fixed)


def test_a_dspark_head_is_left_alone():
    config = tiny(num_nextn_predict_layers=0, dspark=DSpark(5, 0, (4, 5, 6), 4))
    params = Network(config, Policy.of("float32")).shapes()
    trained, fixed = split_trainable(params)
    assert "dspark" not in trained and jax.tree.structure(fixed["dspark"]) == jax.tree.structure(
        params["dspark"]
    )


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_schedule_rises_to_the_peak_and_ends_at_a_tenth(shape):
    schedule = Schedule(2e-3, num_steps=100, warmup_fraction=0.1, shape=shape)
    rates = np.array([schedule.learning_rate(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 2e-3 * np.arange(1, 11) / 10)
    assert rates.argmax() == 9 and (np.diff(rates[9:]) < 0).all()
    np.testing.assert_allclose(rates[-1], 2e-4)
    np.testing.assert_allclose(schedule.learning_rate(500), 2e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_very_short_runs_have_a_usable_rate(num_steps):
    schedule = Schedule(1e-3, num_steps=num_steps)
    rates = [schedule.learning_rate(step) for step in range(num_steps)]
    assert all(0.99e-4 <= rate <= 1e-3 for rate in rates)


def test_first_step_is_the_formula_and_respects_the_clip():
    params = {"head": jnp.array([2.0, -4.0]), "norm": jnp.array([1.0])}
    grads = {"head": jnp.array([300.0, -400.0]), "norm": jnp.array([0.0])}
    transform = AdamW().transform()
    updates, moments = transform.update(grads, transform.init(params), params)
    # Whatever the norm, the first Adam step is sign(g); decay only on the matrix.
    new = apply_updates(params, updates, jnp.float32(0.1))
    np.testing.assert_allclose(new["head"], [2 - 0.1 * (1 + 0.2), -4 + 0.1 * (1 + 0.4)], rtol=1e-5)
    np.testing.assert_array_equal(new["norm"], [1.0])
    mu = optax.tree_utils.tree_get(moments, "mu")
    np.testing.assert_allclose(mu["head"], [0.06, -0.08], rtol=1e-5)  # (1 - 0.9) * g / 500


def test_updates_are_added_in_float32_whatever_the_parameter():
    params = {"wq_a": jnp.full(2, 1.0, jnp.bfloat16)}
    new = apply_updates(params, {"wq_a": jnp.full(2, 1.0, jnp.bfloat16)}, jnp.float32(0.1))
    assert new["wq_a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["wq_a"], jnp.full(2, 0.9, jnp.bfloat16))


def test_plain_sgd_leaves_gradients_as_they_are_unless_there_is_a_norm():
    grads = {"head": jnp.array([300.0, -400.0])}
    plain, clipped = Sgd().transform(), Sgd(max_grad_norm=1.0).transform()
    np.testing.assert_array_equal(plain.update(grads, plain.init(grads))[0]["head"], grads["head"])
    np.testing.assert_allclose(clipped.update(grads, clipped.init(grads))[0]["head"], [0.6, -0.8], rtol=1e-6)
