"""What a run does about numbers that are no numbers, about losses that jump, and about a device that hangs.

A step whose loss or gradient is not finite never changes the parameters: that is decided on the device, by
`kept_if_finite`, because its numbers reach the host only when the next step is on its way. What the run does
then, and what it does about a spike, is policy. The report (section 4.2.3) tells that rolling back alone did
not cure spikes; it went back a little and then routed by older parameters for a while.
"""

import collections
import dataclasses
import math
import statistics
from typing import Literal

import jax
import jax.numpy as jnp

from dsv4_jax.config.quantities import as_float, integer_problem
from dsv4_jax.training.step import StepReport, TrainState

Action = Literal["halt", "skip", "roll back"]
LEAST_STEPS = 20
"""Losses that must have been seen before one of them can be a spike."""

FLOOR = 1e-2
"""Nats; the spread of losses counts as at least this."""


@dataclasses.dataclass(frozen=True)
class Health:
    """What to do when training goes wrong.

    Attributes:
        on_nan: about a loss or gradient that is not finite: "halt" ends the run after saving the state before
            it; "skip" goes on with the next batch and unchanged parameters; "roll back" goes back to the last
            saved state, and on with the batches after this one.
        on_spike: the same about a loss far above those before it; "ignore" only tells. A skipped spike has
            already changed the parameters; "skip" is not offered.
        spike_size: how many times the usual distance from the median a loss must lie above it.
        window: losses that are looked back on.
        most: after so many steps in a row that were not finite, or rollbacks without `window` good steps
            between them, the run halts.
        anticipation_steps: after a rollback for a spike, steps that route by older parameters; 0: none.
        anticipation_lag: how many steps older they are, d in the report, which does not tell it; the first of
            these steps route by the parameters that were gone back to.
        hang_seconds: without a sign of life after which the run ends with a dump of all stacks; compiling
            counts too. None: waits for ever.
    """

    on_nan: Action = "halt"
    on_spike: Literal["ignore", "halt", "roll back"] = "ignore"
    spike_size: float = 12.0
    window: int = 64
    most: int = 5
    anticipation_steps: int = 0
    anticipation_lag: int = 4
    hang_seconds: float | None = 3600.0

    @property
    def rolls_back(self) -> bool:
        """Whether a saved state may be needed."""
        return "roll back" in (self.on_nan, self.on_spike)

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        found = []
        if self.on_nan not in ("halt", "skip", "roll back"):
            found.append(f"health.on_nan={self.on_nan!r} must be 'halt', 'skip' or 'roll back'")
        if self.on_spike not in ("ignore", "halt", "roll back"):
            found.append(f"health.on_spike={self.on_spike!r} must be 'ignore', 'halt' or 'roll back'")
        found += [
            integer_problem("health.window", self.window, LEAST_STEPS),
            integer_problem("health.most", self.most, 1),
            integer_problem("health.anticipation_steps", self.anticipation_steps, 0),
            integer_problem("health.anticipation_lag", self.anticipation_lag, 1),
        ]
        for name, value in (("spike_size", self.spike_size), ("hang_seconds", self.hang_seconds)):
            number = as_float(value)
            if value is not None and (number is None or not 0 < number < math.inf):
                found.append(f"health.{name}={value!r} must be a number above 0")
        return [problem for problem in found if problem]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one step's numbers say.

    Attributes:
        kind: "fine", "not finite" or "spike".
        action: what follows.
        words: for a person; empty if all is well.
    """

    kind: Literal["fine", "not finite", "spike"] = "fine"
    action: Literal["go on", "halt", "skip", "roll back"] = "go on"
    words: str = ""


class Observer:
    """Judges one step after the other; what it has seen is saved with the state, so that a run that goes on
    judges as one that never ended.

    Args:
        health: the policy.
    """

    def __init__(self, health: Health) -> None:
        self._health = health
        self._losses: collections.deque[float] = collections.deque(maxlen=health.window)
        self._bad = 0  # steps that were not finite, in a row
        self._rollbacks = 0
        self._good = 0  # steps since the last rollback

    def judge(self, step: int, loss: float, grad_norm: float) -> Finding:
        """What to do after step `step`, counted from 1, with these numbers."""
        health = self._health
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._bad += 1
            words = f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}: no finite numbers"
            if self._bad >= health.most:
                return Finding("not finite", "halt", f"{words}, {self._bad} times in a row")
            return self._rolled("not finite", health.on_nan, words)
        self._bad = 0
        self._good += 1
        if self._good >= health.window:
            self._rollbacks = 0
        finding = self._spike(step, loss)
        if finding.kind == "fine" or finding.action == "go on":
            self._losses.append(loss)
        return finding

    def _spike(self, step: int, loss: float) -> Finding:
        if len(self._losses) < LEAST_STEPS:
            return Finding()
        median = statistics.median(self._losses)
        usual = max(statistics.fmean(abs(each - median) for each in self._losses), FLOOR)
        if loss <= median + self._health.spike_size * usual:
            return Finding()
        words = (
            f"step {step}: loss {loss:.4f} is {(loss - median) / usual:.0f} usual distances above the median"
            f" {median:.4f} of the last {len(self._losses)}"
        )
        if self._health.on_spike == "ignore":
            return Finding("spike", "go on", words)
        return self._rolled("spike", self._health.on_spike, words)

    def _rolled(self, kind: Literal["not finite", "spike"], action: Action, words: str) -> Finding:
        if action != "roll back":
            return Finding(kind, action, words)
        if self._rollbacks >= self._health.most:
            return Finding(kind, "halt", f"{words}, after {self._rollbacks} rollbacks")
        self._rollbacks += 1
        self._good = 0
        return Finding(kind, action, words)

    def state(self) -> dict:
        """What it has seen, as a JSON object."""
        return {
            "losses": list(self._losses),
            "bad": self._bad,
            "rollbacks": self._rollbacks,
            "good": self._good,
        }

    def restore(self, state: dict, *, counting: bool = True) -> None:
        """Goes back to what it had seen; `counting` False leaves the number of rollbacks as it is now."""
        self._losses = collections.deque(state["losses"], maxlen=self._health.window)
        self._bad = state["bad"]
        if counting:
            self._rollbacks, self._good = state["rollbacks"], state["good"]


def kept_if_finite(before: TrainState, after: TrainState, report: StepReport) -> TrainState:
    """`after`, or what was before where the step's loss or gradient is not finite; inside a compiled step.

    The count of steps goes on either way: the batch has been seen.
    """
    numbers = (report.loss, report.grad_norm, report.indexer_grad_norm)
    fine = jnp.isfinite(jnp.stack(numbers)).all()
    kept = jax.tree.map(lambda old, new: jnp.where(fine, new, old), before, after)
    return kept._replace(step=after.step)


def worse(first: Finding, second: Finding) -> Finding:
    """The finding with the stronger action; the first if they are equal."""
    order = ["go on", "skip", "roll back", "halt"]
    return max(first, second, key=lambda finding: order.index(finding.action))
