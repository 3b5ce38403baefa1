"""The exchange of gradients in bfloat16: unbiased, the same everywhere, and what it does to a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv4_jax.errors import ConfigError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.batch_losses import BatchTotals, forward_losses
from dsv4_jax.training.data import Batch
from dsv4_jax.training.gradient_exchange import exchanged, mesh_problem, stochastically_rounded
from dsv4_jax.training.optimizer import Sgd, merge_params, split_trainable
from dsv4_jax.training.run_config import Stage
from dsv4_jax.training.schedules import BatchRamp
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from sharding.mesh import mesh_of
from tests.training.test_on_mesh import packed
from tests.training.tiny_run import CONFIG, config


def neighbours(x):
    """The bfloat16 numbers below and above each number."""
    words = np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000
    inner, outer = words.view(np.float32), (words + 0x10000).view(np.float32)
    return np.minimum(inner, outer), np.maximum(inner, outer)


def test_rounding_is_unbiased_and_to_a_neighbour():
    """Over 4000 draws the mean is the number, within five standard errors of a coin of that chance."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(200) * 10.0 ** rng.integers(-12, 12, 200)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.vmap(lambda key: stochastically_rounded(jnp.asarray(x), key))(keys), np.float64)
    low, high = (each.astype(np.float64) for each in neighbours(x))
    assert ((drawn == low) | (drawn == high)).all()
    share = (x - low) / (high - low)
    error = 5 * (high - low) * np.sqrt(share * (1 - share) / len(keys)) + 1e-7 * np.abs(x)
    assert (np.abs(drawn.mean(axis=0) - x) <= error).all()
    # Rounding to the nearest is what this test must tell apart.
    nearest = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    assert np.mean(np.abs(nearest - x) > error) > 0.9


def test_numbers_that_bfloat16_has_are_kept():
    x = jnp.asarray([0.0, -0.0, 1.0, -1.5, 3.0e38, np.inf, -np.inf, np.nan, 2.0**-130], jnp.float32)
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    for seed in range(20):
        got = np.asarray(stochastically_rounded(x, jax.random.key(seed)), np.float32)
        np.testing.assert_array_equal(got.view(np.uint32)[:7], np.asarray(x).view(np.uint32)[:7])
        assert np.isnan(got[7]) and got[8] == x[8]


@pytest.mark.parametrize("shape", [(3, 5), (16,), ()])
def test_the_sum_is_that_of_rounded_numbers_and_the_same_everywhere(shape):
    mesh = mesh_of("data=8")
    parts = np.random.default_rng(2).standard_normal((8, *shape)).astype(np.float32)
    split = jax.shard_map(
        lambda part, key: exchanged(part[0], key, 8)[None],
        mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data"),
        check_vma=False,
    )  # fmt: skip
    compiled = jax.jit(split).lower(parts, jax.random.key(0)).compile()
    sums = np.stack([np.asarray(compiled(parts, jax.random.key(seed))) for seed in range(200)])
    assert (sums == sums[:, :1]).all()
    exact = parts.astype(np.float64).sum(axis=0)
    steps = np.subtract(*reversed(neighbours(parts))).astype(np.float64)
    limit = np.sqrt((steps**2).sum(axis=0))
    assert (np.abs(sums[:, 0] - exact) <= steps.sum(axis=0)).all()
    assert (np.abs(sums[:, 0].mean(axis=0) - exact) <= 5 * 0.5 * limit / np.sqrt(200)).all()
    assert (sums.std(axis=0) > 0).any()
    # Two bytes a number travel to where they are added.
    sent = [line for line in compiled.as_text().splitlines() if " all-to-all(" in line]
    assert sent and all("u16[" in line for line in sent), sent


def stepped(mesh, *, seed=None, accumulate=1, start=0):
    """(report, what one step of gradient descent takes away) of a model on a mesh."""
    model = LanguageModel.random(CONFIG, Policy.of("float32"), mesh=mesh, rules=mesh and "train")
    before = jax.device_get(model.parameters)
    state = initial_state(model.parameters, Sgd())
    state = state._replace(step=state.step + start)
    settings = StepSettings(Sgd(), accumulate, exchange_seed=seed)
    rates = Rates(np.float32(1), bias_speed=np.float32(0))
    after, report = train_step(model.network, settings, state, packed(8, 16), rates)
    moved = jax.tree.map(lambda old, new: old - new, before, jax.device_get(after.params))
    return jax.device_get(report), split_trainable(moved)[0]


def shares(devices):
    """The gradients of each device's rows, one after the other on one device."""
    model, batch = LanguageModel.random(CONFIG, Policy.of("float32")), packed(8, 16)
    trained, fixed = split_trainable(model.parameters)
    totals = BatchTotals.of(batch)

    @jax.jit
    def gradients(trained, rows):
        def loss(trained):
            held = model.network.holding(merge_params(trained, fixed))
            return forward_losses(held, rows, totals=totals)[0].total()

        return jax.grad(loss)(trained)

    parts = zip(*(np.split(each, devices) for each in batch[:2]), strict=True)
    return [jax.device_get(gradients(trained, Batch(*rows))) for rows in parts]


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_is_that_of_one_device_but_for_rounding(accumulate):
    exact, _ = stepped(None)
    report, got = stepped("data=4", seed=3, accumulate=accumulate)
    for name, value in exact.scalars.items():
        limit = 2**-8 if "grad" in name else 2e-6
        np.testing.assert_allclose(report.scalars[name], value, rtol=limit, atol=1e-8, err_msg=name)
    np.testing.assert_array_equal(report.loads, exact.loads)
    again = stepped("data=4", seed=3, accumulate=accumulate)[1]
    other = stepped("data=4", seed=3, accumulate=accumulate, start=1)[1]
    differs = []
    for (path, one), two, later, *parts in zip(
        jax.tree_util.tree_leaves_with_path(got),
        *map(jax.tree.leaves, (again, other, *shares(4))),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(one, two, err_msg=name)
        # A bfloat16 number and its neighbour are 2^-7 of it apart, at most. What is taken away from a
        # parameter is rounded like the parameter.
        limit = 2.0**-7 * sum(map(np.abs, parts))
        rounding = 1e-5 * sum(np.abs(part).max() for part in parts) + 2e-7
        assert (np.abs(one - sum(parts)) <= limit + rounding).all(), name
        differs.append(np.any(one != later))
    assert np.mean(differs) > 0.5


def test_meshes_that_cannot():
    assert mesh_problem({"data": 2, "fsdp": 1}) is None
    assert "fsdp=2, expert=4 must be 1" in mesh_problem({"data": 2, "fsdp": 2, "expert": 4})
    assert "at least 2" in mesh_problem({}) and "at least 2" in mesh_problem({"data": 1})


def test_a_run_says_so(tmp_path):
    make = functools.partial(config, tmp_path / "out", exchange="bfloat16", seed=7)
    run = make(mesh="data=4", stages=(Stage(2, 16, 8, accumulate=2),))
    assert run.settings(run.place(0)).exchange_seed == 7
    assert config(tmp_path / "out").settings(run.place(0)).exchange_seed is None
    for mesh, said in ((None, "data must be at least 2"), ("data=2,fsdp=2", "fsdp=2 must be 1")):
        with pytest.raises(ConfigError, match=said):
            make(mesh=mesh)
    with pytest.raises(ConfigError) as refused:
        make(mesh="data=4", stages=(Stage(2, 16, 8, BatchRamp(2, 2)), Stage(1, 16, 8, accumulate=4)))
    assert len(refused.value.problems) == 2
    assert "stages[0]: batches of 2 rows must be a multiple of 4" in refused.value.problems[0]
    assert "stages[1]: batches of 8 rows must be a multiple of 16" in refused.value.problems[1]
    with pytest.raises(ConfigError, match="exchange='fp8' must be 'exact' or 'bfloat16'"):
        config(tmp_path / "out", exchange="fp8")
