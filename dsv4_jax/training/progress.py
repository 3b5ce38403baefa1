"""How a run shows itself: a live line in a terminal, plain lines in a log."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_INTERVAL_SECONDS = 10.0
SMOOTHING_STEPS = 20.0
"""The shown loss is an average over about this many steps."""


def clock(seconds: float) -> str:
    """Minutes and seconds as m:ss (h:mm:ss from an hour on)."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Pace:
    """Speed and remaining time, from steps after the first (which contains the compilation).

    Args:
        num_steps: in the whole run.
        tokens_per_step: positions processed by a step.
        now: seconds from any origin; replaced in tests.
    """

    def __init__(
        self, num_steps: int, tokens_per_step: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_steps = num_steps
        self._tokens_per_step = tokens_per_step
        self._now = now
        self._first: float | None = None
        self._last = 0.0
        self.done = 0
        self.loss = float("nan")

    def advance(self, loss: float) -> None:
        """Counts one more step."""
        self._last = self._now()
        if self._first is None:
            self._first, self.loss = self._last, loss
        # A plain mean at first, an exponential one later.
        self.done += 1
        self.loss += (loss - self.loss) / min(self.done, SMOOTHING_STEPS)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over all steps after the first; None before the second."""
        if self._first is None or self.done < 2:
            return None
        return max(self._last - self._first, 1e-9) / (self.done - 1)

    def describe(self) -> str:
        """Loss, tokens per second and remaining time."""
        seconds = self.seconds_per_step
        if seconds is None:
            return f"loss {self.loss:.3f}" if self.done else "compiling the training step"
        left = clock((self._num_steps - self.done) * seconds)
        return f"loss {self.loss:.3f}  {self._tokens_per_step / seconds:,.0f} tokens/s  ETA {left}"


class TrainingDisplay:
    """Shows training steps while its `with` block runs; call `advance` after each step.

    Args:
        num_steps: in the whole run. tokens_per_step: positions processed by a step.
        console: where to; a terminal gets one live line, anything else a line every ten seconds.
    """

    def __init__(self, num_steps: int, tokens_per_step: int, console: Console) -> None:
        self._num_steps = num_steps
        self._console = console
        self._pace = Pace(num_steps, tokens_per_step)
        self._last_line = 0.0
        self._bars = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task("", total=num_steps, text=self._pace.describe())

    def __enter__(self) -> Self:
        self._bars.start()
        if not self._console.is_terminal:
            self._console.print(self._pace.describe())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def advance(self, loss: float) -> None:
        """One more step is done; `loss` in nats per token."""
        self._pace.advance(loss)
        text = self._pace.describe()
        self._bars.update(self._task, completed=self._pace.done, text=text)
        is_due = time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS
        is_edge = self._pace.done in (1, self._num_steps)
        if not self._console.is_terminal and (is_due or is_edge):
            self._last_line = time.monotonic()
            self._console.print(f"step {self._pace.done}/{self._num_steps}  {text}")
