"""The loop around the step: stages, saved states, stops, and what it does when numbers go wrong.

The step here is one line that remembers every batch and rate it was given, so that a run that was cut and
went on is compared with one that was not; `test_run_of_a_model.py` does the same with a model.
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.training import run as runs
from dsv4_jax.training.health import Health
from dsv4_jax.training.keeping import STATES_FOLDER
from dsv4_jax.training.metrics import GOODPUT_FILE, Goodput, RecordFile, goodput_share, read_lines
from dsv4_jax.training.run_config import Checkpoints, Stage, Validation
from dsv4_jax.training.saved_states import SavedStates
from dsv4_jax.training.schedules import BatchRamp
from dsv4_jax.training.step import StepReport, TrainState
from dsv4_jax.training.telling import Spoken
from tests.training.tiny_run import Numbers, config

NAN = float("nan")
SESSIONS = itertools.count()


class Placing:
    """In place of a network."""

    def put(self, x, dims):
        assert dims in ("B T", "layers B T Ke")
        return jnp.asarray(x)


class Watching:
    """A display that only remembers."""

    def __init__(self):
        self.records, self.lines = [], []

    def step(self, record, loads):
        self.records.append(record)

    def say(self, words):
        self.lines.append(words)

    def validated(self, step, loss):
        self.lines.append(f"validated {step}")

    def restarted(self, step):
        self.lines.append(f"restarted {step}")


@jax.jit
def remembering(state, tokens, rate, spoilt):
    seen = state.trained["seen"] * 1.5 + rate * tokens.astype(jnp.float32).mean()
    loss = jnp.where(spoilt != 0, spoilt, 3.0 + 0.001 * jnp.sin(seen))
    after = TrainState({"seen": seen}, {"count": state.fixed["count"] + tokens.shape[0]}, (), state.step + 1)
    kept = jnp.isfinite(loss)
    after = jax.tree.map(lambda old, new: jnp.where(kept, new, old), state, after)
    report = StepReport(**dict.fromkeys(StepReport._fields, loss))._replace(loads=jnp.ones((2, 4)))
    return after._replace(step=state.step + 1), report


def fresh():
    return TrainState({"seen": jnp.float32(0)}, {"count": jnp.int32(0)}, (), jnp.int32(0))


@pytest.fixture
def spoilt(monkeypatch):
    """Losses by the number of the batch, counted over the whole session, in place of the usual ones."""
    losses, calls = {}, []

    def step(network, settings, state, batch, rates, experts=None):
        calls.append((settings, batch.tokens.shape, rates))
        step.given.append((experts, batch.tokens.astype(jnp.float32).mean()))
        loss = np.float32(losses.get(len(calls), 0))
        return remembering(state, batch.tokens, rates.learning_rate, loss)

    monkeypatch.setattr(runs, "guarded_step", step)
    step.calls, step.given = calls, []

    def chosen_experts(network, params, batch, mode):
        """In place of experts: the steps of two rows that the parameters have seen, and which batch it is."""
        return jnp.stack([params["count"] / 2, batch.tokens.astype(jnp.float32).mean()])

    monkeypatch.setattr(runs, "chosen_experts", chosen_experts)
    losses["step"] = step
    return losses


def go(run_config, *, resume=False, watching=None, **options):
    """(the result, the display) of a session."""
    run_config.out.mkdir(parents=True, exist_ok=True)
    watching = Watching() if watching is None else watching
    teller = Spoken(run_config.out, watching, tensorboard=False, every=1)
    goodput = Goodput(RecordFile(run_config.out / GOODPUT_FILE), f"session {next(SESSIONS)}")
    try:
        result = runs.run(run_config, Placing(), fresh(), None, teller, goodput, resume=resume, **options)
    finally:
        goodput.close()
        teller.close()
    return result, watching


def trace(run_config):
    """The numbers of every step, without times."""
    records = read_lines(run_config.out / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def stopping_at(step, number):
    """A display in which a signal arrives after the numbers of a step."""

    class Stopping(Watching):
        def step(self, record, loads):
            super().step(record, loads)
            if record["step"] == step:
                os.kill(os.getpid(), number)

    return Stopping()


@pytest.fixture
def whole(tmp_path, spoilt):
    """An uninterrupted run."""
    run_config = config(tmp_path / "whole", stages=(Stage(7, 16, 4, BatchRamp(2, 3)), Stage(5, 24, 2)))
    result, watching = go(run_config)
    assert result.ending == "finished" and result.step == 12
    assert [record["step"] for record in watching.records] == list(range(1, 13))
    return run_config, result


def with_out(run_config, out, **changes):
    return dataclasses.replace(run_config, out=out, **changes)


def test_stages_rates_and_rows(whole, spoilt):
    run_config, _ = whole
    shapes = [shape for _, shape, _ in spoilt["step"].calls]
    assert shapes == [(2, 16)] * 3 + [(4, 16)] * 4 + [(2, 24)] * 5
    rates = [float(rates.learning_rate) for *_, rates in spoilt["step"].calls]
    np.testing.assert_allclose(rates, [run_config.learning_rate.at(s, 12) for s in range(12)], rtol=1e-6)
    assert SavedStates(run_config.out / STATES_FOLDER, 2).steps() == [9, 12]
    assert [record["stage"] for record in trace(run_config)] == [0] * 7 + [1] * 5


@pytest.mark.parametrize(("stop_at", "number"), [(1, signal.SIGINT), (4, signal.SIGTERM), (8, signal.SIGINT)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(whole, tmp_path, stop_at, number, capfd):
    run_config, wanted = whole
    cut = with_out(run_config, tmp_path / "cut")
    first, _ = go(cut, watching=stopping_at(stop_at, number))
    assert first.ending == ("interrupted" if number == signal.SIGINT else "terminated")
    assert stop_at < first.step <= stop_at + 1  # the step that was running is kept
    assert SavedStates(cut.out / STATES_FOLDER, 2).steps()[-1] == first.step
    assert "saving the state and stopping" in capfd.readouterr().err
    last, watching = go(cut, resume=True)
    assert last.ending == "finished" and watching.records[0]["step"] == first.step + 1
    assert trace(cut) == trace(run_config)
    np.testing.assert_array_equal(last.state.trained["seen"], wanted.state.trained["seen"])
    assert int(last.state.fixed["count"]) == int(wanted.state.fixed["count"])


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C: a shell that starts programs in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_ends_at_once_and_the_state_before_is_good(whole, tmp_path, capfd):
    run_config, wanted = whole
    cut = with_out(run_config, tmp_path / "cut")

    class Impatient(Watching):
        def step(self, record, loads):
            super().step(record, loads)
            if record["step"] >= 4:
                os.kill(os.getpid(), signal.SIGINT)

    watching = Impatient()
    with pytest.raises(KeyboardInterrupt):
        go(cut, watching=watching)
    assert [record["step"] for record in watching.records] == [1, 2, 3, 4, 5]
    assert capfd.readouterr().err.count("saving the state and stopping") == 1
    assert SavedStates(cut.out / STATES_FOLDER, 2).steps() == [3]
    last, _ = go(cut, resume=True)
    assert trace(cut) == trace(run_config)
    np.testing.assert_array_equal(last.state.trained["seen"], wanted.state.trained["seen"])


def test_records_of_steps_that_come_again_are_dropped(whole, tmp_path):
    """As after a kill: metrics reach further than the saved state."""
    run_config, _ = whole
    cut = with_out(run_config, tmp_path / "cut")
    go(cut, watching=stopping_at(6, signal.SIGINT))
    states = sorted((cut.out / STATES_FOLDER).glob("[0-9]*"), key=lambda path: int(path.name))
    assert [path.name for path in states] == ["6", "7"]
    shutil.rmtree(states[-1])
    with open(cut.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "los')  # a line that was being written
    last, watching = go(cut, resume=True)
    assert watching.lines[0] == "restarted 6" and last.step == 12
    assert trace(cut) == trace(run_config)
    sessions = {record["session"]: record for record in read_lines(cut.out / GOODPUT_FILE)}
    assert [each["repeated_steps"] for each in sessions.values()] == [0, 1]
    assert 0 < goodput_share(cut.out / GOODPUT_FILE) < 1


def test_resume_without_a_state_starts_anew_and_says_so(whole, tmp_path):
    run_config, _ = whole
    cut = with_out(run_config, tmp_path / "cut")
    _, watching = go(cut, resume=True)
    assert any("no saved state" in line for line in watching.lines)
    assert trace(cut) == trace(run_config)


def test_a_finished_run_that_goes_on_has_nothing_to_do(whole, spoilt):
    run_config, wanted = whole
    before = len(spoilt["step"].calls)
    result, _ = go(run_config, resume=True)
    assert result.ending == "finished" and len(spoilt["step"].calls) == before
    np.testing.assert_array_equal(result.state.trained["seen"], wanted.state.trained["seen"])


def test_a_damaged_step_is_told_and_the_one_before_is_used(whole, tmp_path):
    run_config, _ = whole
    cut = with_out(run_config, tmp_path / "cut")
    go(cut, watching=stopping_at(8, signal.SIGINT))
    files = [path for path in (cut.out / STATES_FOLDER / "9" / "state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(b"")
    _, watching = go(cut, resume=True)
    assert any("UNREADABLE" in line and f"{STATES_FOLDER}/9" in line for line in watching.lines)
    assert any("going on after step 6" in line for line in watching.lines)
    assert trace(cut) == trace(run_config)


def test_another_run_is_refused_with_what_differs(whole, tmp_path):
    run_config, _ = whole
    other = with_out(run_config, run_config.out, seed=5)
    with pytest.raises(ProblemsError, match="seed is 5 now, and was 0"):
        go(other, resume=True)
    model = dataclasses.replace(run_config.model, hidden_size=64)
    with pytest.raises(ProblemsError, match="model.hidden_size is 64 now, and was 32"):
        go(with_out(run_config, run_config.out, model=model), resume=True)
    with pytest.raises(ProblemsError, match="has done 12 steps, and the run has only 5"):
        go(run_config.limited_to(5), resume=True)


def losses(run_config):
    return [(record["step"], record["loss"]) for record in trace(run_config)]


def test_a_step_that_is_no_number_is_skipped(tmp_path, spoilt):
    spoilt[4] = NAN
    run_config = config(tmp_path / "out", health=Health(on_nan="skip"))
    result, watching = go(run_config)
    assert result.step == 12 and any("step 4: loss nan" in line for line in watching.lines)
    told = dict(losses(run_config))
    assert told[4] is None and len(told) == 12
    # Its rows are not in the parameters.
    assert int(result.state.fixed["count"]) == 22


def test_a_step_that_is_no_number_halts_and_the_state_before_it_is_saved(tmp_path, spoilt):
    spoilt[4] = NAN
    run_config = config(tmp_path / "out")
    with pytest.raises(ProblemsError, match="halted by its policy") as halted:
        go(run_config)
    assert "step 4: loss nan" in str(halted.value) and "saved as step 5" in str(halted.value)
    result, _ = go(run_config, resume=True)  # goes on with the batches after it
    assert result.step == 12 and int(result.state.fixed["count"]) == 22


def test_too_many_of_them_halt(tmp_path, spoilt):
    spoilt.update({call: NAN for call in (4, 5, 6)})
    with pytest.raises(ProblemsError, match="3 times in a row"):
        go(config(tmp_path / "out", health=Health(on_nan="skip", most=3)))


def test_a_spike_goes_back_and_on_with_other_data(tmp_path, spoilt):
    """Step 25 jumps; the state of step 24 is taken up again, and the batches after it follow."""
    spoilt[25] = 9.0
    run_config = config(
        tmp_path / "out",
        stages=(Stage(30, 16, 2),),
        checkpoints=Checkpoints(every=6),
        health=Health(on_spike="roll back", anticipation_steps=3),
    )
    result, watching = go(run_config)
    assert result.step == 30
    told = [record.get("routing_lag") for record in watching.records]
    # A lag of 4 is longer than these three steps: all route by the parameters that were gone back to.
    assert told == [None] * 26 + [0, 1, 2] + [None] * 3
    assert any("experts are chosen up to 4 steps ahead until step 27" in line for line in watching.lines)
    assert any("went back from step 26 to step 24" in line for line in watching.lines)
    steps = [step for step, _ in losses(run_config)]
    assert steps == [*range(1, 27), *range(25, 31)]
    # The 25th and 26th batch were consumed and never seen again: the 27th batch makes the new step 25.
    stream = Numbers().open(None, 2, 16, 0)
    batches = [next(stream) for _ in range(32)]
    seen = jnp.float32(0)
    for step, number in enumerate([*range(24), *range(26, 32)]):
        rate = run_config.rates(step).learning_rate
        seen = remembering(
            TrainState({"seen": seen}, {"count": jnp.int32(0)}, (), jnp.int32(0)),
            jnp.asarray(batches[number].tokens), rate, np.float32(0),
        )[0].trained["seen"]  # fmt: skip
    np.testing.assert_array_equal(result.state.trained["seen"], seen)


@pytest.fixture
def anticipating(tmp_path, spoilt):
    """A run whose 25th step jumps, and which then routes by parameters two steps older until step 31."""
    spoilt[25] = 9.0
    return config(
        tmp_path / "out",
        stages=(Stage(28, 16, 2), Stage(6, 24, 2)),
        checkpoints=Checkpoints(every=6, keep=9),
        health=Health(on_spike="roll back", anticipation_steps=7, anticipation_lag=2),
    )


def test_experts_come_from_parameters_of_some_steps_before(anticipating, spoilt):
    """Each batch of the window, of two stages, goes in with what the parameters of two steps before chose."""
    result, watching = go(anticipating)
    assert result.step == 34
    told = [(each["step"], each["routing_lag"]) for each in watching.records if "routing_lag" in each]
    assert told == [(25, 0), (26, 1), (27, 2), (28, 2), (29, 2), (30, 2), (31, 2)]
    assert [each for each in trace(anticipating) if "routing_lag" in each][-1]["step"] == 31
    given = spoilt["step"].given
    assert [experts is not None for experts, _ in given] == [False] * 26 + [True] * 7 + [False] * 3
    for number, (experts, batch) in enumerate(given[26:33]):
        steps_done, chosen_for = map(float, experts)
        assert steps_done == max(24, 24 + number - 2) and chosen_for == float(batch)


@pytest.mark.parametrize("stop_at", [25, 27, 30])
def test_a_run_that_stops_while_it_anticipates_goes_on_so(anticipating, tmp_path, spoilt, stop_at):
    """What was chosen ahead is saved with the state, and not chosen anew by later parameters."""
    go(anticipating)
    cut, step = with_out(anticipating, tmp_path / "cut"), spoilt["step"]
    whole = step.given[:]
    step.calls.clear(), step.given.clear()

    class Stopping(Watching):
        def step(self, record, loads):
            super().step(record, loads)
            if record["step"] == stop_at and "routing_lag" in record:
                os.kill(os.getpid(), signal.SIGTERM)

    first, _ = go(cut, watching=Stopping())
    assert first.ending == "terminated" and first.step == stop_at + 1
    saved = SavedStates(cut.out / STATES_FOLDER, 9).restore(fresh())
    left = min(2, 31 - first.step)
    assert saved.about["anticipates_until"] == 31
    assert saved.about["experts_chosen_at"] == [first.step - 2 + number for number in range(left)]
    assert sorted(saved.beside) == [str(number) for number in range(left)]
    result, _ = go(cut, resume=True)
    assert result.step == 34 and trace(cut) == trace(anticipating)
    for got, want in zip(step.given, whole, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_spike_that_halts_leaves_the_states_before_it(tmp_path, spoilt):
    spoilt[25] = 9.0
    run_config = config(
        tmp_path / "out", stages=(Stage(30, 16, 2),), checkpoints=Checkpoints(every=12),
        health=Health(on_spike="halt"),
    )  # fmt: skip
    with pytest.raises(ProblemsError, match=r"saved states: \[12, 24\]"):
        go(run_config)


def test_a_disk_that_is_full_for_a_while_is_told_and_tried_again(tmp_path, spoilt, monkeypatch):
    run_config = config(tmp_path / "out")
    save, full = SavedStates.save, [3, 6]

    def failing(self, state, about, beside):
        if int(state.step) in full:
            raise ProblemsError("cannot save the state", ["No space left on device"])
        save(self, state, about, beside)

    monkeypatch.setattr(SavedStates, "save", failing)
    result, watching = go(run_config)
    assert sum("NOT SAVED" in line and "No space left" in line for line in watching.lines) == 2
    assert result.step == 12 and SavedStates(run_config.out / STATES_FOLDER, 2).steps() == [9, 12]


def test_a_last_state_that_finds_no_room_goes_elsewhere_and_says_where(tmp_path, spoilt, monkeypatch):
    run_config = config(tmp_path / "out")
    save = SavedStates.save

    def failing(self, state, about, beside):
        if "unsaved" not in str(self.folder):
            raise ProblemsError("cannot save the state", ["No space left on device"])
        save(self, state, about, beside)

    monkeypatch.setattr(SavedStates, "save", failing)
    with pytest.raises(ProblemsError, match="the state after step 12 is in") as moved:
        go(run_config)
    place = next(tmp_path.glob("out-unsaved-*"))
    assert str(place) in str(moved.value)
    assert SavedStates(place / STATES_FOLDER, 1).restore(fresh()).about["step"] == 12


def test_validations_and_samples_come_at_intervals_and_at_the_end(tmp_path, spoilt, monkeypatch):
    run_config = config(tmp_path / "out", validation=Validation(Numbers(), every=5, num_batches=3))
    measured = []

    def validation_loss(network, params, batches, mode):
        measured.append([batch.tokens.tolist() for batch in batches])
        return 1.5

    monkeypatch.setattr(runs, "validation_loss", validation_loss)
    result, watching = go(run_config, sample=lambda params: f"é{sorted(params)}")
    assert result.validation_loss == 1.5 and measured[0] == measured[1] == measured[2]
    assert len(measured[0]) == 3
    assert [line for line in watching.lines if "validated" in line] == [
        "validated 5", "validated 10", "validated 12"
    ]  # fmt: skip
    events = read_lines(run_config.out / "events.jsonl")
    assert sum(event["kind"] == "sample" and "é['count', 'seen']" in event["words"] for event in events) == 3
    found = [r for r in read_lines(run_config.out / "metrics.jsonl") if "validation_loss" in r]
    assert found == [{"step": step, "validation_loss": 1.5} for step in (5, 10, 12)]


def test_numbers_are_read_one_step_late_except_where_they_are_needed(tmp_path, spoilt, monkeypatch):
    events = []
    fetched = runs.fetched

    def reading(tree):
        if isinstance(tree, StepReport):
            events.append("read")
        return fetched(tree)

    step = spoilt["step"]

    def starting(*args):
        events.append("start")
        return step(*args)

    monkeypatch.setattr(runs, "fetched", reading)
    monkeypatch.setattr(runs, "guarded_step", starting)
    go(config(tmp_path / "out", stages=(Stage(5, 16, 2),), checkpoints=Checkpoints(every=3)))
    assert events == ["start", "start", "read", "start", "read", "read", "start", "start", "read", "read"]


def test_metrics_that_cannot_be_written_do_not_end_a_run(tmp_path, spoilt):
    run_config = config(tmp_path / "out")
    run_config.out.mkdir()
    (run_config.out / "metrics.jsonl").mkdir()
    result, watching = go(run_config)
    assert result.step == 12 and any("12 lines of" in line for line in watching.lines)


def test_what_a_record_holds(whole):
    run_config, _ = whole
    record = json.loads((run_config.out / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "stage", "tokens", "loss", "main", "grad_norm", "rate_learning_rate", "seconds"} <= set(
        record
    )
    assert record["tokens"] == 32 and record["seconds"] >= 0
