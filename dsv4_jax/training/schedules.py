"""How the learning rate, the weights of the losses and the batch change over a run, as data.

Report, section 4.2.2: a linear warm-up of 2000 steps, a constant rate for most of the training, a cosine
decay to a tenth at the end; the weight of the MTP loss goes from 0.3 to 0.1 when that decay begins; the batch
grows from a small one to its full size and then stays.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from dsv4_jax.config.quantities import as_float, integer_problem


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Warm-up, constant, decay.

    Attributes:
        peak: of the constant part (report: 2.7e-4 for Flash, 2.0e-4 for Pro).
        warmup_steps: step s of these, counted from 0, has (s + 1) / warmup_steps of the peak.
        decay_steps: the last steps of the run, over which it falls; None: all steps after the warm-up.
        final_fraction: of the peak, at the last step; 0.1 in both of the report's schedules.
        shape: of the decay.
    """

    peak: float
    warmup_steps: int = 2000
    decay_steps: int | None = None
    final_fraction: float = 0.1
    shape: Literal["cosine", "linear"] = "cosine"

    def decay_start(self, num_steps: int) -> int:
        """The first step of the decay in a run of `num_steps`; `num_steps` if there is none."""
        longest = max(0, num_steps - self.warmup_steps)
        return num_steps - (longest if self.decay_steps is None else min(self.decay_steps, longest))

    def at(self, step: int, num_steps: int) -> float:
        """The rate of step `step`, counted from 0, in a run of `num_steps`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        start = self.decay_start(num_steps)
        if step < start:
            return self.peak
        progress = min(1.0, (step + 1 - start) / max(1, num_steps - start))
        if self.shape == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.peak * (1.0 - (1.0 - self.final_fraction) * progress)

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        found = [_real("learning_rate.peak", self.peak, above=0.0)]
        found.append(integer_problem("learning_rate.warmup_steps", self.warmup_steps, 0))
        if self.decay_steps is not None:
            found.append(integer_problem("learning_rate.decay_steps", self.decay_steps, 0))
        found.append(_real("learning_rate.final_fraction", self.final_fraction, below=1.0))
        if self.shape not in ("cosine", "linear"):
            found.append(f"learning_rate.shape={self.shape!r} must be 'cosine' or 'linear'")
        return [problem for problem in found if problem]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms beside the cross-entropy, and the speed of the balance rule.

    Attributes:
        mtp: of the MTP loss, until the learning rate decays (report, section 4.2.2).
        mtp_in_decay: from then on.
        balance: of the sequence-wise balance loss.
        indexer: of the indexers' loss, in stages that train them.
        z: of the z-loss; 0 leaves it out.
        bias_speed: of the router biases (report, section 4.2.2, as DeepSeek-V3).
    """

    mtp: float = 0.3
    mtp_in_decay: float = 0.1
    balance: float = 1e-4
    indexer: float = 1.0
    z: float = 0.0
    bias_speed: float = 1e-3

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        found = [_real(f"losses.{name}", value) for name, value in dataclasses.asdict(self).items()]
        return [problem for problem in found if problem]


@dataclasses.dataclass(frozen=True)
class BatchRamp:
    """A batch that doubles, at equal distances, until it is full.

    Doubling keeps the number of compiled programs small: one for each size.

    Attributes:
        first: rows of the first batches; the full size must be this times a power of two.
        num_steps: after so many steps of the stage the batch is full.
    """

    first: int
    num_steps: int

    def at(self, step: int, full: int) -> int:
        """Rows of step `step` of the stage, counted from 0."""
        doublings = (full // self.first).bit_length() - 1
        if step >= self.num_steps:
            return full
        return self.first << (doublings * step // max(1, self.num_steps))

    def problems(self, name: str, full: object) -> list[str]:
        """What is wrong with the fields, for a stage with batches of `full` rows."""
        found = [integer_problem(f"{name}.first", self.first, 1)]
        found.append(integer_problem(f"{name}.num_steps", self.num_steps, 1))
        problems = [problem for problem in found if problem]
        if not problems and isinstance(full, int) and full >= 1:
            times = full / self.first
            if times != int(times) or int(times).bit_count() != 1:
                problems.append(f"{name}.first={self.first} doubled some times must give batch_size={full}")
        return problems


def _real(name: str, value: object, *, above: float | None = None, below: float | None = None) -> str | None:
    number = as_float(value)
    if number is None or not math.isfinite(number) or number < 0 or (above is not None and number <= above):
        least = "above 0" if above is not None else "of at least 0"
        return f"{name}={value!r} must be a finite number {least}"
    if below is not None and number > below:
        return f"{name}={value!r} must be at most {below:g}"
    return None


def as_float32(value: float) -> np.float32:
    """Numbers of schedules go to the device as float32 of the host, so that nothing is compiled for them."""
    return np.float32(value)
