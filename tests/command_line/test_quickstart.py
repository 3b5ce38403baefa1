"""The quickstart from text to completion, on a small model: files, reproducibility, Ctrl-C, refusals."""

import dataclasses
import io
import json
import os
import signal

import jax
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.command_line import quickstart as quickstart_module
from dsv4_jax.command_line.quickstart import CURVE_FILE, RECORD_FILE, check_arguments, quickstart, spread
from dsv4_jax.config import tiny
from dsv4_jax.errors import ProblemsError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.recipe import QUICKSTART, Recipe, planned_steps, start

SMALL = Recipe(
    config=tiny(
        4,
        vocab_size=300,
        hidden_size=32,
        num_attention_heads=2,
        attention_kinds=("csa", "hca"),
        router_kinds=("hash", "learned"),
        sliding_window=16,
        initializer_range=0.1,
    ),
    policy=Policy.of("float32"),
    batch_size=2,
    seq_len=48,
    peak_learning_rate=1e-2,
    warmup_fraction=0.1,
    corpus_bytes=300_000,
    validation_batches=2,
    setup_minutes=0.5,
    steps_per_minute=40,
)
STEPS = 20
PROMPT = "def main(é"


def run(out, **options):
    text = io.StringIO()
    options = {"steps": STEPS, "seed": 5, "prompt": PROMPT, "max_new_tokens": 12} | options
    return quickstart(out=out, recipe=SMALL, results=text, **options), text.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a finished run, its result, and what it printed."""
    out = tmp_path_factory.mktemp("quickstart") / "new" / "model"
    result, text = run(out)
    return out, result, text


def test_a_run_writes_a_checkpoint_a_record_and_a_curve(first):
    out, result, text = first
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", RECORD_FILE, CURVE_FILE} <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert (out / CURVE_FILE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["model_type"] == "deepseek_v4"
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["ending"] == result.ending == "finished"
    assert record["steps_done"] == record["steps_planned"] == len(record["steps"]) == STEPS
    assert record["validation_loss"] == result.validation_loss
    assert np.mean([s["main"] for s in record["steps"][-5:]]) < record["steps"][0]["main"] - 0.3
    percent = f"{result.percent_below_unigram:.1f} % below"
    assert f"{result.validation_loss:.3f}" in text and f"{result.unigram_loss:.3f}" in text
    assert percent in text and PROMPT + result.completion in text


def test_the_folder_loads_and_scores_as_recorded(first):
    out, result, _ = first
    model = dsv4_jax.load(out, dtype="float32")
    assert model.config == SMALL.config
    assert model.tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == 0
    # The recorded validation loss, recomputed through the public face.
    corpus = gather_corpus(SMALL.corpus_bytes)
    _, _, validation = quickstart_module.tokenized(corpus, SMALL)
    batches = quickstart_module.validation_batches(validation, SMALL.batch_size, SMALL.seq_len)
    total, count = 0.0, 0
    for batch in spread(batches, SMALL.validation_batches):
        log_p = jax.nn.log_softmax(model.logits(batch.tokens, segment_ids=batch.segment_ids))
        same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
        picked = np.take_along_axis(np.asarray(log_p)[:, :-1], batch.tokens[:, 1:, None], -1)[..., 0]
        total, count = total - picked[same].sum(), count + same.sum()
    np.testing.assert_allclose(result.validation_loss, total / count, rtol=1e-5)


def test_the_same_seed_gives_the_same_model_and_completion_bit_for_bit(first, tmp_path):
    out, result, _ = first
    again, _ = run(tmp_path / "again")
    assert again.completion == result.completion and len(result.completion) > 0
    assert again.validation_loss == result.validation_loss
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()


def test_another_seed_gives_another_model_and_replaces_an_earlier_quickstart(first, tmp_path):
    _, result, _ = first
    run(tmp_path / "out", steps=1, max_new_tokens=0)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    other, _ = run(tmp_path / "out", seed=6, max_new_tokens=4)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert other.validation_loss != result.validation_loss
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["seed"] == 6


def test_ctrl_c_keeps_what_was_trained(tmp_path, monkeypatch):
    advance = quickstart_module.TrainingDisplay.advance
    done = []

    def press(display, loss):
        advance(display, loss)
        done.append(loss)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(quickstart_module.TrainingDisplay, "advance", press)
    result, text = run(tmp_path / "out", max_new_tokens=4)
    # The numbers of the third step arrive while the fourth is running, which is kept too.
    assert result.ending == "interrupted" and result.steps == 4 == len(done)
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert (record["steps_done"], record["steps_planned"]) == (4, STEPS)
    assert dsv4_jax.load(tmp_path / "out", dtype="float32").tokenizer is not None
    assert PROMPT in text


def test_a_machine_far_too_slow_stops_loudly_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart_module, "GRACE_SECONDS", -30.0)  # half a minute is over at once
    result, _ = run(tmp_path / "out", steps=None, minutes=0.5, max_new_tokens=2)
    assert result.ending == "out of time" and result.steps == 1
    assert "WARNING" in capsys.readouterr().err
    assert dsv4_jax.load(tmp_path / "out", dtype="float32").config == SMALL.config


def test_bad_arguments_are_refused_together_and_before_any_work(tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ProblemsError) as error:
        quickstart(minutes=-1, out=tmp_path, seed=-2, max_new_tokens=-3, steps=0)
    message = str(error.value)
    assert len(error.value.problems) == 5
    for value in ("minutes=-1", "seed=-2", "max_new_tokens=-3", "steps=0", f"out={tmp_path}"):
        assert value in message
    with pytest.raises(ProblemsError, match="is not a directory"):
        check_arguments(1, tmp_path / "thesis.txt", 0, 0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_steps_follow_from_minutes_alone():
    assert planned_steps(0.1, SMALL) == SMALL.min_steps
    assert planned_steps(3.0, SMALL) == 100
    assert planned_steps(1e9, dataclasses.replace(SMALL, steps_per_minute=1)) > 1e8


def test_the_real_recipe_has_every_part():
    config = QUICKSTART.config
    assert set(config.attention_kinds) == {"window", "csa", "hca"}
    assert set(config.router_kinds) == {"hash", "learned"}
    assert config.num_nextn_predict_layers == 1 and config.hc_mult == 4
    assert (config.csa_ratio, config.hca_ratio, config.sliding_window) == (4, 128, 128)
    assert QUICKSTART.seq_len >= 2 * config.hca_ratio
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    # Five minutes on two cores must leave enough steps to beat the unigram model by a quarter.
    assert planned_steps(5.0, QUICKSTART) >= 220


def test_sublayers_of_the_real_recipe_add_nothing_at_first():
    recipe = dataclasses.replace(SMALL, zero_outputs=True)
    tokens = np.arange(24, dtype=np.int32)[None] % recipe.config.vocab_size
    model = LanguageModel(recipe.config, recipe.policy, start(recipe, 3), None)
    streams = np.asarray(model.streams(tokens))  # [L+1, B, T, N, D]
    # The maps of a layer mix one vector that is there four times: the result is that vector, scaled.
    embedded, last = streams[0, 0, :, 0], streams[-1, 0, :, 0]
    cosine = np.sum(embedded * last, -1) / np.linalg.norm(embedded, axis=-1) / np.linalg.norm(last, axis=-1)
    np.testing.assert_allclose(cosine, 1.0, atol=1e-5)
    ordinary = LanguageModel(recipe.config, recipe.policy, start(SMALL, 3), None)
    assert np.abs(np.asarray(ordinary.streams(tokens))[-1, 0, :, 0] - last).max() > 1e-3
    assert QUICKSTART.zero_outputs


def test_spread_covers_both_ends():
    assert spread(list(range(10)), 3) == [0, 4, 9]
    assert spread([1, 2], 5) == [1, 2]
