"""The batches of a run, and after a spike the experts that older parameters chose for them.

Report, section 4.2.3: anticipatory routing fetches the data of step t at step t - d and lets the parameters
of that step choose its experts. Batches that are fetched ahead are given later, in their order, and where the
data stands is told as if they had not been fetched, so that a run that ends here loses none of them.
"""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dsv4_jax.training.data import Batch
from dsv4_jax.training.run_config import RunConfig
from dsv4_jax.training.stage_streams import Streams

Choose = Callable[[Batch, int], np.ndarray]
"""A batch and its step, counted from 0 -> the experts that the present parameters choose for it."""


class Ahead(NamedTuple):
    """One batch.

    Attributes:
        batch: of the host.
        experts: i16[layers, B, T, Ke] that older parameters chose; None: those of the step choose.
        chosen_at: steps that were done when they did.
    """

    batch: Batch
    experts: np.ndarray | None = None
    chosen_at: int = 0


class BatchesAhead:
    """Gives the batch of one step after the other.

    Args:
        config: of the run.
        streams: of its batches.
    """

    def __init__(self, config: RunConfig, streams: Streams) -> None:
        self._config, self._streams = config, streams
        self._waiting: collections.deque[tuple[dict, Ahead]] = collections.deque()

    def next(self, step: int, until: int, choose: Choose) -> Ahead:
        """The batch of step `step`, counted from 0, the one after the last that was asked for.

        Args:
            step: whose batch.
            until: steps before it are routed by older parameters.
            choose: asked for steps that come into reach.
        """
        last = min(step + self._config.health.anticipation_lag, until - 1, self._config.num_steps - 1)
        while step + len(self._waiting) <= last:
            number = step + len(self._waiting)
            state = self._streams.state()
            batch = self._streams.batch(self._config.place(number))
            self._waiting.append((state, Ahead(batch, choose(batch, number), step)))
        if self._waiting:
            return self._waiting.popleft()[1]
        return Ahead(self._streams.batch(self._config.place(step)))

    def state(self) -> dict[str, Any]:
        """Where the data of the next step stands, as a JSON object."""
        return self._waiting[0][0] if self._waiting else self._streams.state()

    def chosen(self) -> dict[str, np.ndarray]:
        """The experts of batches that were fetched and not given, to be saved: "0", "1", ... in order."""
        return {str(number): ahead.experts for number, (_, ahead) in enumerate(self._waiting)}

    def chosen_at(self) -> list[int]:
        """When they were chosen."""
        return [ahead.chosen_at for _, ahead in self._waiting]

    def restore(
        self, state: dict[str, Any], step: int = 0, chosen: dict[str, np.ndarray] | None = None, at: Any = ()
    ) -> None:
        """Goes to where `state` was taken; what `chosen` and `chosen_at` told then is taken up again.

        Args:
            state: where the data stands.
            step: steps done.
            chosen: experts of the batches from there on.
            at: when they were chosen.
        """
        self._waiting.clear()
        self._streams.restore(state)
        for number, chosen_at in enumerate(at):
            before = self._streams.state()
            batch = self._streams.batch(self._config.place(step + number))
            self._waiting.append((before, Ahead(batch, (chosen or {})[str(number)], chosen_at)))
