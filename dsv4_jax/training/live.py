"""A run for the eye: a live panel in a terminal, plain lines in a log."""

import resource
import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsv4_jax.training.progress import PLAIN_INTERVAL_SECONDS, SMOOTHING_STEPS, clock

BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 64
"""Experts shown; of more of them neighbours are taken together."""


class Display(Protocol):
    """Who shows a run."""

    def step(self, record: dict[str, Any], loads: np.ndarray | None) -> None:
        """The numbers of a step, and f32[layers, E]."""

    def say(self, words: str) -> None:
        """A line."""

    def validated(self, step: int, loss: float) -> None:
        """A validation loss."""

    def restarted(self, step: int) -> None:
        """The run goes on after `step` steps."""


class Speed:
    """Tokens a second and the rest of the time, from the steps after the first, which contains compiling.

    Args:
        num_steps: of the run. num_tokens: of the run.
        flops_per_token: forward and backward; None: not known.
        peak_flops: of all devices together; None: not known.
    """

    def __init__(
        self, num_steps: int, num_tokens: int, flops_per_token: float | None, peak_flops: float | None
    ) -> None:
        self._num_steps, self._num_tokens = num_steps, num_tokens
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self.done_steps, self._tokens, self._seconds = 0, 0, 0.0
        self.loss = float("nan")
        self._counted = 0
        self._left = num_tokens

    def restart(self, step: int) -> None:
        """The run goes on after `step` steps."""
        self.done_steps = step
        self._left = round(self._num_tokens * (1 - step / self._num_steps))

    def step(self, record: dict[str, Any]) -> None:
        """One more."""
        self.done_steps = record["step"]
        self._left = max(0, self._left - record["tokens"])
        self._counted += 1
        loss = record.get("main", record["loss"])
        if np.isfinite(loss):
            before = loss if np.isnan(self.loss) else self.loss
            self.loss = before + (loss - before) / min(self._counted, SMOOTHING_STEPS)
        if self._counted > 1:
            self._tokens += record["tokens"]
            self._seconds += record["seconds"]

    @property
    def tokens_per_second(self) -> float | None:
        """None before the second step of this session."""
        return self._tokens / max(self._seconds, 1e-9) if self._tokens else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over the peak of the chips; None where either is not known."""
        speed = self.tokens_per_second
        if speed is None or self._flops_per_token is None or self._peak_flops is None:
            return None
        return speed * self._flops_per_token / self._peak_flops

    @property
    def seconds_left(self) -> float | None:
        """At this speed; None before it is known."""
        speed = self.tokens_per_second
        return None if speed is None else self._left / speed

    def words(self) -> str:
        """All of it in a line."""
        parts = [f"loss {self.loss:.3f}"]
        if (speed := self.tokens_per_second) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if (mfu := self.mfu) is not None:
            parts.append(f"MFU {100 * mfu:.1f} %")
        if (left := self.seconds_left) is not None:
            parts.append(f"ETA {clock(left)}")
        return "  ".join(parts)


class Shown:
    """A `Display` on a console.

    Args:
        console: a terminal gets a panel that changes, anything else a line now and then.
        num_steps: of the run.
        speed: what it shows of time.
        every: steps between two lines that are not a terminal's.
    """

    def __init__(self, console: Console, num_steps: int, speed: Speed, every: int) -> None:
        self._console, self._num_steps, self._speed, self._every = console, num_steps, speed, every
        self._record: dict[str, Any] = {}
        self._loads: np.ndarray | None = None
        self._validation: float | None = None
        self._last_line = 0.0
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._panel, transient=False)
        self._is_live = console.is_terminal

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def step(self, record: dict[str, Any], loads: np.ndarray | None) -> None:
        """The numbers of a step."""
        self._record, self._loads = record, loads
        self._speed.step(record)
        if self._is_live:
            return
        step = record["step"]
        is_due = step % self._every == 0 and time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS
        if is_due or step in (1, self._num_steps) or self._speed.tokens_per_second is None:
            self._last_line = time.monotonic()
            self._console.print(f"step {step}/{self._num_steps}  {self._speed.words()}  {self._further()}")

    def say(self, words: str) -> None:
        """A line above the panel."""
        self._console.print(words)

    def validated(self, step: int, loss: float) -> None:
        """A validation loss."""
        self._validation = loss
        self.say(f"step {step}: validation loss {loss:.4f} nats per token")

    def restarted(self, step: int) -> None:
        """The run goes on."""
        self._speed.restart(step)

    def _further(self) -> str:
        parts = []
        if "grad_norm" in self._record:
            parts.append(f"gradient {self._record['grad_norm']:.3g}")
        if "rate_learning_rate" in self._record:
            parts.append(f"rate {self._record['rate_learning_rate']:.2e}")
        return "  ".join([*parts, f"memory {memory_words()}"])

    def _panel(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_row("training", f"step {self._speed.done_steps}/{self._num_steps}", self._speed.words())
        bar = ProgressBar(self._num_steps, self._speed.done_steps, width=60)
        lines: list[Any] = [table, bar, Text(self._further())]
        if self._validation is not None:
            lines.append(Text(f"validation {self._validation:.4f}"))
        if self._loads is not None:
            lines.append(Text(f"experts {load_bars(self._loads)}"))
        return Group(*lines)


def load_bars(loads: np.ndarray) -> str:
    """A bar for each expert, or for a few neighbours: its share of the tokens of all layers; four of eight
    lines are an even share. f32[layers, E]."""
    by_expert = np.asarray(loads, np.float64).sum(axis=0)
    parts = np.array_split(by_expert, min(len(by_expert), MOST_BARS))
    share = np.array([part.mean() for part in parts]) / max(by_expert.mean(), 1e-9)
    return "".join(BARS[min(len(BARS) - 1, int(each * 4))] for each in share)


def memory_words() -> str:
    """What the first device of this process holds at most so far; of a CPU the whole process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        most, limit = stats["peak_bytes_in_use"], stats.get("bytes_limit")
        return f"{most / 2**30:.1f} GiB" + (f" of {limit / 2**30:.1f}" if limit else "")
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
