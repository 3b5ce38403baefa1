"""The loop: which batches and rates it uses, when it reads reports, how it ends, and what Ctrl-C does."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from dsv4_jax.training import loop
from dsv4_jax.training.data import TrainingRows
from dsv4_jax.training.loop import InterruptRequest, train
from dsv4_jax.training.optimizer import AdamW, Schedule
from dsv4_jax.training.step import StepReport, StepSettings, TrainState


@pytest.fixture
def calls(monkeypatch):
    """(batch tokens, learning rate) of every step that `train` asked for; steps cost nothing."""
    made = []

    def fake_step(network, settings, state, batch, rates):
        made.append((batch.tokens.tolist(), float(rates.learning_rate)))
        report = StepReport(*(np.float32(len(made)) for _ in StepReport._fields))
        return state._replace(step=state.step + 1), report

    monkeypatch.setattr(loop, "train_step", fake_step)
    return made


ROWS = TrainingRows([np.arange(90, dtype=np.int32)], batch_size=2, seq_len=5, seed=1)
SCHEDULE = Schedule(1.0, num_steps=6, warmup_fraction=0.5)


def run(first_step=0, **options):
    state = TrainState({}, {}, (), np.int32(first_step))
    return train(None, StepSettings(AdamW()), SCHEDULE, state, ROWS, **options)


def test_every_step_has_its_own_batch_and_rate(calls):
    seen = []
    result = run(on_step=seen.append)
    assert result.ending == "finished" and int(result.state.step) == 6
    assert [tokens for tokens, _ in calls] == [ROWS.batch(step).tokens.tolist() for step in range(6)]
    np.testing.assert_allclose([rate for _, rate in calls], [SCHEDULE.learning_rate(i) for i in range(6)])
    assert seen == list(result.reports) and isinstance(seen[0].loss, float)


def test_a_restart_continues_with_the_steps_that_are_left(calls):
    run()
    whole = list(calls)
    calls.clear()
    assert len(run(first_step=4).reports) == 2
    assert calls == whole[4:]


class Number:
    """A number that is still on the device: reading its value is an event."""

    def __init__(self, step, events):
        self.step, self.events = step, events

    def __array__(self, dtype=None, copy=None):
        self.events.append(("read", self.step))
        return np.asarray(self.step, dtype)


def test_a_step_starts_before_the_numbers_of_the_last_one_are_read(monkeypatch):
    events = []

    def fake_step(network, settings, state, batch, rates):
        step = int(state.step)
        events.append(("start", step))
        report = StepReport(*[Number(step, events)] * len(StepReport._fields))
        return state._replace(step=np.int32(step + 1)), report

    monkeypatch.setattr(loop, "train_step", fake_step)
    result = run(first_step=3, on_step=lambda report: events.append(("told", report.loss)))
    assert list(dict.fromkeys(events)) == [
        ("start", 3),
        ("start", 4), ("read", 3), ("told", 3),
        ("start", 5), ("read", 4), ("told", 4),
        ("read", 5), ("told", 5),
    ]  # fmt: skip
    assert [report.loss for report in result.reports] == [3, 4, 5]


def test_an_exhausted_schedule_runs_nothing(calls):
    result = run(first_step=6)
    assert result.ending == "finished" and result.reports == () and calls == []


def test_the_clock_lets_one_step_run_and_says_so(calls):
    result = run(stop_at=time.monotonic() - 1)
    assert result.ending == "out of time" and len(result.reports) == 1
    assert run(stop_at=time.monotonic() + 60).ending == "finished"


def test_the_first_interrupt_ends_after_the_running_step_and_keeps_the_state(calls):
    announced = []
    with InterruptRequest(lambda: announced.append(True)) as interrupt:

        def on_step(report):
            if report.loss == 3:
                os.kill(os.getpid(), signal.SIGINT)

        result = run(on_step=on_step, interrupt=interrupt)
    # When the report of step 3 is read, step 4 is running; its report belongs to the result too.
    assert result.ending == "interrupted" and [report.loss for report in result.reports] == [1, 2, 3, 4]
    assert int(result.state.step) == 4 and announced == [True]


def test_an_interrupt_in_the_last_step_is_a_finished_run(calls):
    with InterruptRequest() as interrupt:
        interrupt.received = signal.SIGINT
        assert run(first_step=5, interrupt=interrupt).ending == "finished"


@pytest.fixture
def usual_interrupt():
    """Python's own handler: a shell starts a process in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
def test_the_second_interrupt_acts_as_usual_and_the_handler_is_restored():
    before = signal.getsignal(signal.SIGINT)
    with InterruptRequest() as interrupt:
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with InterruptRequest():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter():
        with InterruptRequest() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
