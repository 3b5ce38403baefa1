"""The training loop: steps until they are done, somebody asks it to stop, or the clock says so."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Literal, Self

import jax
import numpy as np

from dsv4_jax.model.initial import Network
from dsv4_jax.training.data import TrainingRows
from dsv4_jax.training.optimizer import Schedule
from dsv4_jax.training.step import Rates, StepReport, StepSettings, TrainState, train_step

Ending = Literal["finished", "interrupted", "terminated", "out of time"]


class InterruptRequest:
    """Within its `with` block the first Ctrl-C or SIGTERM is only noted; the next one acts as usual.

    Outside the main thread, where signals cannot be caught, it does nothing.

    Args:
        announce: called once, from the signal handler, at the first of them.
    """

    def __init__(self, announce: Callable[[], None] = lambda: None) -> None:
        self.received: int | None = None
        self._announce = announce
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether somebody asked to stop."""
        return self.received is not None

    @property
    def ending(self) -> Ending:
        """What to call a run that stopped for it."""
        return "terminated" if self.received == signal.SIGTERM else "interrupted"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        self._announce()


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What came out of a loop."""

    state: TrainState
    reports: tuple[StepReport, ...]  # of each step, Python floats; the loads are numpy
    ending: Ending
    seconds: float  # of the loop, compilation included


def train(
    network: Network,
    settings: StepSettings,
    schedule: Schedule,
    state: TrainState,
    rows: TrainingRows,
    *,
    on_step: Callable[[StepReport], None] = lambda report: None,
    interrupt: InterruptRequest | None = None,
    stop_at: float | None = None,
) -> TrainingResult:
    """Runs the steps that `schedule.num_steps` still leaves after `state.step`.

    The result depends on the arguments alone, unless the run is cut short: neither the batches nor the
    learning rate look at a clock.

    A step's numbers are fetched when the next step is already on its way, so that the device does not wait
    for the host. What they cause, a request to stop for instance, therefore comes after that next step.

    Args:
        network: the model.
        settings: of its steps; schedule: learning rates and number of steps.
        state: consumed (its buffers are donated).
        rows: batches by step number.
        on_step: called with the report of every step, in order, after the next step has started.
        interrupt: ends the loop after the step that is running when it is requested.
        stop_at: `time.monotonic()` after which no further step starts; at least one runs.
    """
    start = time.monotonic()
    reports: list[StepReport] = []

    def fetch(report: StepReport) -> None:
        report = jax.device_get(report)
        numbers = {name: float(value) for name, value in report.scalars.items()}
        reports.append(StepReport(**numbers, loads=np.asarray(report.loads)))
        on_step(reports[-1])

    running: StepReport | None = None  # of the last step that was started, still on the device
    ending: Ending = "finished"
    for step in range(int(state.step), schedule.num_steps):
        rates = Rates(np.float32(schedule.learning_rate(step)))
        previous = running
        state, running = train_step(network, settings, state, rows.batch(step), rates)
        if previous is not None:
            fetch(previous)
        if step + 1 == schedule.num_steps:
            break
        if interrupt is not None and interrupt.requested:
            ending = interrupt.ending
            break
        if stop_at is not None and time.monotonic() > stop_at:
            ending = "out of time"
            break
    if running is not None:
        fetch(running)
    return TrainingResult(state, tuple(reports), ending, time.monotonic() - start)
