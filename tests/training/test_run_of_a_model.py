"""A model that is trained, cut and trained on another mesh; bit for bit on the same one."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv4_jax.command_line.train import starting_model
from dsv4_jax.training import run as runs
from dsv4_jax.training.health import Finding, Health
from dsv4_jax.training.keeping import STATES_FOLDER
from dsv4_jax.training.metrics import Goodput, read_lines
from dsv4_jax.training.run_config import Checkpoints, Stage
from dsv4_jax.training.schedules import LearningRate
from dsv4_jax.training.step import initial_state
from dsv4_jax.training.telling import Spoken
from tests.training.test_run import Watching
from tests.training.tiny_run import config


def trained(run, *, resume=False):
    """The result of a run without its export."""
    run.out.mkdir(parents=True, exist_ok=True)
    model = starting_model(run)
    state = initial_state(model.parameters, run.optimizer)
    teller = Spoken(run.out, Watching(), tensorboard=False, every=1)
    try:
        return runs.run(run, model.network, state, None, teller, Goodput(None, "only"), resume=resume)
    finally:
        teller.close()


def losses(run):
    return np.array([record["loss"] for record in read_lines(run.out / "metrics.jsonl")])


def cut_after_three_steps(out, mesh):
    """A run of six steps whose last saved state is that of the third."""
    run = config(out, stages=(Stage(6, 16, 8),), checkpoints=Checkpoints(every=3), mesh=mesh)
    whole = trained(run)
    (run.out / STATES_FOLDER / "6").rename(out.parent / "aside")
    return run, whole


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Three steps with fsdp=2 and three with expert=2 have the losses of six steps with fsdp=2."""
    run, _ = cut_after_three_steps(tmp_path / "out", "fsdp=2")
    before = losses(run)
    result = trained(dataclasses.replace(run, mesh="expert=2"), resume=True)
    after = losses(run)
    assert len(before) == len(after) == 6 and result.step == 6
    np.testing.assert_array_equal(after[:3], before[:3])
    np.testing.assert_allclose(after[3:], before[3:], rtol=2e-5)
    assert {leaf.sharding.mesh.shape["expert"] for leaf in jax.tree.leaves(result.state.trained)} == {2}


@pytest.mark.slow
def test_the_same_mesh_goes_on_bit_for_bit(tmp_path):
    run, whole = cut_after_three_steps(tmp_path / "out", "fsdp=4,expert=2")
    wanted, kept = jax.device_get(whole.state), losses(run)
    result = trained(run, resume=True)
    np.testing.assert_array_equal(losses(run), kept)
    for got, want in zip(jax.tree.leaves(result.state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_after_a_spike_a_model_is_routed_by_older_parameters(tmp_path, monkeypatch):
    """By the real experts: with a lag beyond the window the first routed step is the usual one, later ones
    are not, and everything ends as it should."""
    judge, planted = runs.Observer.judge, []

    def spiking(self, step, loss, norm):
        found = judge(self, step, loss, norm)
        if step == 3 and not planted:
            planted.append(step)
            return Finding("spike", "roll back", "planted")
        return found

    def go(name, steps):
        planted.clear()
        health = Health(on_spike="roll back", anticipation_steps=steps, anticipation_lag=2)
        stages, rate = (Stage(6, 16, 2),), LearningRate(3e-2, warmup_steps=1, decay_steps=1)
        every = Checkpoints(every=2)
        return config(tmp_path / name, stages=stages, learning_rate=rate, checkpoints=every, health=health)

    monkeypatch.setattr(runs.Observer, "judge", spiking)
    found = []
    for name, steps in (("usual", 0), ("older", 3)):
        run = go(name, steps)
        assert trained(run).step == 6
        records = [each for each in read_lines(run.out / "metrics.jsonl") if "loss" in each]
        found.append(records[-4:])
        assert [each["step"] for each in found[-1]] == [3, 4, 5, 6]
    usual, older = found
    assert [each.get("routing_lag") for each in usual] == [None] * 4
    assert [each.get("routing_lag") for each in older] == [0, 1, 2, None]
    np.testing.assert_allclose(older[0]["loss"], usual[0]["loss"], rtol=1e-6)
    assert older[2]["loads"] != usual[2]["loads"]
