"""Schedules as data: learning rates, loss weights, and batches that grow."""

import math

import pytest

from dsv4_jax.training.schedules import BatchRamp, LearningRate, LossWeights


def test_warmup_constant_and_cosine_decay():
    rate = LearningRate(2.0, warmup_steps=4, decay_steps=10, final_fraction=0.1)
    rates = [rate.at(step, 30) for step in range(30)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:20] == [2.0] * 16 and rate.decay_start(30) == 20
    assert rates[29] == pytest.approx(0.2)
    assert rates[24] == pytest.approx(2.0 * (1 - 0.9 * (0.5 - 0.5 * math.cos(math.pi / 2))))
    assert all(after < before for before, after in zip(rates[19:], rates[20:], strict=False))


def test_linear_decay_right_after_the_warmup():
    rate = LearningRate(1.0, warmup_steps=2, final_fraction=0.0, shape="linear")
    assert [rate.at(step, 6) for step in range(6)] == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_run_shorter_than_its_warmup_only_warms_up(num_steps):
    rate = LearningRate(1.0, warmup_steps=3, decay_steps=5)
    assert rate.decay_start(num_steps) == num_steps
    assert [rate.at(step, num_steps) for step in range(num_steps)] == [
        (step + 1) / 3 for step in range(num_steps)
    ]


def test_no_warmup_and_no_decay():
    rate = LearningRate(1.0, warmup_steps=0, decay_steps=0)
    assert {rate.at(step, 7) for step in range(7)} == {1.0} and rate.decay_start(7) == 7


def test_a_batch_doubles_at_equal_distances():
    ramp = BatchRamp(2, 9)
    assert [ramp.at(step, 16) for step in range(12)] == [2, 2, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert [BatchRamp(3, 5).at(step, 3) for step in range(6)] == [3] * 6


def test_problems_name_value_and_rule():
    wrong = LearningRate(0.0, warmup_steps=-1, decay_steps=2.5, final_fraction=2.0, shape="step")
    words = " ".join(wrong.problems())
    assert len(wrong.problems()) == 5
    for part in ("peak=0.0", "warmup_steps=-1", "decay_steps=2.5", "final_fraction=2.0", "shape='step'"):
        assert part in words
    assert LossWeights(mtp=-1.0, z=math.nan).problems() == [
        "losses.mtp=-1.0 must be a finite number of at least 0",
        "losses.z=nan must be a finite number of at least 0",
    ]
    assert BatchRamp(3, 0).problems("ramp", 12) == ["ramp.num_steps=0 must be an integer of at least 1"]
    assert "doubled" in BatchRamp(3, 4).problems("ramp", 10)[0]
    assert BatchRamp(3, 4).problems("ramp", 12) == []
