"""Everybody who wants to know what a run does: files, TensorBoard, and a display."""

import pathlib
import time
from typing import Any

import numpy as np

from dsv4_jax.training.live import Display
from dsv4_jax.training.metrics import EVENTS_FILE, METRICS_FILE, TENSORBOARD_FOLDER, RecordFile, TensorBoard


class Silent:
    """A teller that keeps everything for itself: of every process but the first."""

    def step(self, record: dict[str, Any], loads: np.ndarray | None) -> None:
        """Nothing."""

    def event(self, kind: str, step: int, words: str) -> None:
        """Nothing."""

    def validated(self, step: int, loss: float, sample: str | None) -> None:
        """Nothing."""

    def restarted(self, step: int) -> int:
        """Nothing is told again."""
        return 0


class Spoken:
    """Writes the records of a run below its folder and shows them.

    Args:
        out: folder of the run.
        display: for people.
        tensorboard: whether event files are written.
        every: steps between two records with the loads of all experts, which are long.
    """

    def __init__(self, out: pathlib.Path, display: Display, *, tensorboard: bool, every: int) -> None:
        self.metrics = RecordFile(out / METRICS_FILE)
        self.events = RecordFile(out / EVENTS_FILE)
        self._tensorboard = TensorBoard(out / TENSORBOARD_FOLDER) if tensorboard else None
        self._display, self._every = display, every
        self.loads: np.ndarray | None = None  # f32[layers, E] of the last step

    def step(self, record: dict[str, Any], loads: np.ndarray | None) -> None:
        """One line of metrics; a layer's imbalance is the load of its busiest expert over the mean."""
        if loads is not None:
            self.loads = np.asarray(loads)
            mean = np.maximum(self.loads.mean(axis=-1), 1e-9)
            record = record | {"imbalance": [round(float(x), 4) for x in self.loads.max(axis=-1) / mean]}
            if record["step"] % self._every == 0:
                record["loads"] = [[int(each) for each in layer] for layer in self.loads]
        self.metrics.write(record)
        if self._tensorboard is not None:
            self._tensorboard.write(record)
        self._display.step(record, self.loads)

    def event(self, kind: str, step: int, words: str) -> None:
        """One line of events."""
        self.events.write({"kind": kind, "step": step, "at": round(time.time(), 3), "words": words})
        self._display.say(words)

    def validated(self, step: int, loss: float, sample: str | None) -> None:
        """One line of metrics, and what the model wrote among the events."""
        record = {"step": step, "validation_loss": loss}
        self.metrics.write(record)
        if self._tensorboard is not None:
            self._tensorboard.write(record)
        self._display.validated(step, loss)
        if sample is not None:
            self.event("sample", step, f"sample: {sample!r}")
            if self._tensorboard is not None:
                self._tensorboard.write_text("sample", sample, step)

    def restarted(self, step: int) -> int:
        """Drops the records of steps that will come again."""
        self._display.restarted(step)
        return self.metrics.keep_steps(step)

    def close(self) -> None:
        """Writes what is left, and says what could not be written."""
        self.metrics.close()
        self.events.close()
        files: list[RecordFile | TensorBoard] = [self.metrics, self.events]
        if self._tensorboard is not None:
            self._tensorboard.close()
            files.append(self._tensorboard)
        for file in files:
            if file.num_lost:
                self._display.say(f"WARNING: {file.num_lost} lines of {file.path} could not be written")
