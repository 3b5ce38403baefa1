"""The batches of a run, stage after stage, from the streams of its sources."""

from typing import Any

import numpy as np

from dsv4_jax.training.data import Batch, BatchStream
from dsv4_jax.training.run_config import Place, RunConfig


class Streams:
    """Opens the stream of a stage when its first batch is asked for.

    A stage whose rows are like those of the stage before (source, length, smallest batch) goes on with its
    stream. Every process draws whole batches, the same ones, and keeps of them what its devices hold: the
    order of the data depends on neither the number of processes nor the mesh.

    Args:
        config: of the run.
        tokenizer: that the sources get.
    """

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._opened: int | None = None  # stage by which the open stream was opened
        self._stream: BatchStream | None = None

    def batch(self, place: Place) -> Batch:
        """The next batch, of the rows that `place` says."""
        if self._opened is None or self._kind(place.stage) != self._kind(self._opened):
            self._open(place.stage)
        assert self._stream is not None
        units = place.rows // self._config.stages[place.stage].unit
        return joined([next(self._stream) for _ in range(units)])

    def state(self) -> dict:
        """Where the data stands, as a JSON object."""
        stream = None if self._stream is None else self._stream.state()
        return {"stage": self._opened, "stream": stream}

    def restore(self, state: dict) -> None:
        """Goes to where `state` was taken."""
        self._opened, self._stream = None, None
        if state["stage"] is not None:
            self._open(state["stage"])
            self._stream.restore(state["stream"])

    def _open(self, number: int) -> None:
        stage = self._config.stages[number]
        source = self._config.source_of(number)
        seed = stage_seed(self._config.seed, number)
        self._stream = source.open(self._tokenizer, stage.unit, stage.seq_len, seed)
        self._opened = number

    def _kind(self, number: int) -> tuple:
        stage = self._config.stages[number]
        return self._config.source_of(number), stage.seq_len, stage.unit


def stage_seed(seed: int, stage: int) -> int:
    """Of the order of a stage's data: the run's own for the first one."""
    if stage == 0:
        return seed
    return int(np.random.SeedSequence([seed, stage]).generate_state(1, np.uint64)[0] >> 1)


def joined(batches: list[Batch]) -> Batch:
    """The rows of all batches, in order."""
    if len(batches) == 1:
        return batches[0]
    fields = zip(*batches, strict=True)
    return Batch(
        *(None if any(each is None for each in field) else np.concatenate(field) for field in fields)
    )
