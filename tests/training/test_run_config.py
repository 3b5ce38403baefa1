"""What a run is told: where each step lies, what it is given, and refusals with all problems at once."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dsv4_jax.errors import ConfigError
from dsv4_jax.training.health import Health
from dsv4_jax.training.lora import Lora
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.run_config import Checkpoints, Logging, Place, Stage
from dsv4_jax.training.schedules import BatchRamp, LearningRate, LossWeights
from dsv4_jax.training.stage_streams import Streams, joined, stage_seed
from tests.training.tiny_run import Numbers, config


def test_steps_lie_in_stages(tmp_path):
    run = config(tmp_path / "out", stages=(Stage(3, 16, 8, BatchRamp(2, 2), accumulate=4), Stage(2, 32, 1)))
    assert [run.place(step) for step in range(5)] == [
        Place(0, 0, 2), Place(0, 1, 4), Place(0, 2, 8), Place(1, 0, 1), Place(1, 1, 1)
    ]  # fmt: skip
    assert [run.settings(run.place(step)).accumulate for step in range(5)] == [1, 2, 4, 1, 1]
    assert run.num_steps == 5 and run.num_tokens == 16 * (2 + 4 + 8) + 2 * 32
    assert run.stages[0].num_tokens == 16 * 14
    with pytest.raises(ValueError, match="step=5"):
        run.place(5)


def test_rates_of_a_step(tmp_path):
    run = config(tmp_path / "out", losses=LossWeights(balance=1e-3, z=0.5))
    rates = [run.rates(step) for step in range(12)]
    assert [float(each.mtp) for each in rates] == [pytest.approx(0.3)] * 6 + [pytest.approx(0.1)] * 6
    assert all(isinstance(each, np.float32) for each in rates[0])
    assert rates[0].z == np.float32(0.5) and run.settings(run.place(0)).z_loss
    assert not config(tmp_path / "out").settings(Place(0, 0, 2)).z_loss


def test_a_limit_cuts_stages_or_makes_the_last_one_longer(tmp_path):
    run = config(tmp_path / "out")
    assert [stage.num_steps for stage in run.limited_to(5).stages] == [5]
    assert [stage.num_steps for stage in run.limited_to(10).stages] == [8, 2]
    assert [stage.num_steps for stage in run.limited_to(20).stages] == [8, 12]


def test_lora_leaves_the_model_alone(tmp_path):
    with pytest.raises(ConfigError) as refused:
        config(tmp_path / "out", lora=Lora(0, 1.0, ()), optimizer=Muon())
    words = "\n".join(refused.value.problems)
    for part in ("lora: rank=0", "lora: targets=()", "must be AdamW with lora", "bias_speed=0.001 must be 0"):
        assert part in words
    assert len(refused.value.problems) == 4


def test_all_problems_at_once(tmp_path):
    with pytest.raises(ConfigError) as refused:
        config(
            tmp_path / "out",
            model="flash",
            source=None,
            stages=(Stage(0, 16, 3, accumulate=2), Stage(1, 1, 1, indexer="warm-up")),
            learning_rate=LearningRate(-1.0),
            mesh="expert=0,foo=2",
            seed=-1,
            checkpoints=Checkpoints(every=0),
            logging=Logging(profile_steps=(3, 2)),
            health=Health(on_nan="ignore", window=3, hang_seconds=-1.0),
        )
    words = "\n".join(refused.value.problems)
    for part in (
        "model='flash'", "source=None", "stages[0].num_steps=0", "stages[1].indexer='warm-up'", "peak=-1.0",
        "expert=0", "'foo'", "seed=-1", "checkpoints.every=0", "profile_steps=(3, 2)", "on_nan='ignore'",
        "window=3", "hang_seconds=-1.0",
    ):  # fmt: skip
        assert part in words, part
    with pytest.raises(ConfigError, match="must divide batch_size=3"):
        config(tmp_path / "out", stages=(Stage(1, 16, 3, accumulate=2),))
    with pytest.raises(ConfigError, match="at least one Stage"):
        config(tmp_path / "out", stages=())


def test_fields_of_another_type_are_all_named(tmp_path):
    """What is wrong elsewhere is told with them."""
    with pytest.raises(ConfigError) as refused:
        dataclasses.replace(
            config(tmp_path / "out"),
            learning_rate=1e-3, losses=0.3, checkpoints=5, logging=None, health="careful", out="here",
            tokenizer="tokenizer.json", lora=8, mesh=4, validation="often", optimizer="adam",
            policy="float32", stages=[Stage(1, 16, 2)], seed=-1,
        )  # fmt: skip
    words = "\n".join(refused.value.problems)
    for part in (
        "learning_rate=0.001 must be of type LearningRate", "losses=0.3 must be of type LossWeights",
        "checkpoints=5 must be", "logging=None must be of type Logging", "health='careful' must be",
        "out='here' must be of type Path", "tokenizer='tokenizer.json' must be of type Path or None",
        "lora=8 must be of type Lora or None", "mesh=4 must be of type str or None", "validation='often'",
        "optimizer='adam' must be AdamW(...)", "policy='float32' must be of type Policy",
        "must be a tuple of Stage", "seed=-1",
    ):  # fmt: skip
        assert part in words, part
    assert len(refused.value.problems) == 14
    with pytest.raises(ConfigError) as refused:
        config(
            tmp_path / "out",
            stages=(Stage("3", 16.5, 2, ramp=4, source="text"),),
            logging=Logging(every="x", profile_steps=3),
        )
    words = "\n".join(refused.value.problems)
    for part in (
        "stages[0].num_steps='3'", "stages[0].seq_len=16.5", "stages[0].ramp=4 must be of type BatchRamp",
        "stages[0].source='text' must have a method open", "logging.every='x'", "logging.profile_steps=3",
    ):  # fmt: skip
        assert part in words, part


def test_a_ramp_and_a_stage_of_the_same_rows_go_on_with_the_stream(tmp_path):
    stages = (Stage(2, 16, 4, BatchRamp(2, 1)), Stage(2, 16, 2), Stage(1, 24, 2))
    run = config(tmp_path / "out", stages=stages)
    streams, plain = Streams(run, None), Numbers().open(None, 2, 16, run.seed)
    got = [streams.batch(run.place(step)) for step in range(4)]
    wanted = [joined([next(plain) for _ in range(count)]) for count in (1, 2, 1, 1)]
    for each, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(each.tokens, other.tokens)
    state = streams.state()
    other = Streams(run, None)
    other.restore(state)
    last, again = streams.batch(run.place(4)), other.batch(run.place(4))
    assert last.tokens.shape == (2, 24)
    np.testing.assert_array_equal(last.tokens, again.tokens)
    own = next(Numbers().open(None, 2, 24, stage_seed(run.seed, 2)))
    np.testing.assert_array_equal(last.tokens, own.tokens)


def test_a_run_is_hashable_and_says_where_it_writes(tmp_path):
    run = config(tmp_path / "out")
    assert hash(run) == hash(dataclasses.replace(run)) and isinstance(run.out, pathlib.Path)
