"""The step, its rates and the streams of batches as the loop calls them, over the step that there is."""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dsv4_jax.model.initial import Network
from dsv4_jax.training import step as plain
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.data import Batch, TrainingRows
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import StepReport, TrainState
from dsv4_jax.training.tokenizer import encode_documents


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What is static about a step."""

    optimizer: AdamW
    accumulate: int = 1
    attention: Literal["sparse", "dense"] = "sparse"
    indexer: Literal["none", "warm-up", "sparse"] = "none"
    z_loss: bool = False


class Rates(NamedTuple):
    """Numbers of one step that schedules change."""

    learning_rate: Any
    mtp: Any = np.float32(0.3)
    balance: Any = np.float32(1e-4)
    indexer: Any = np.float32(1)
    z: Any = np.float32(0)
    bias_speed: Any = np.float32(1e-3)


def train_step(
    network: Network, settings: StepSettings, state: TrainState, batch: Batch, rates: Rates
) -> tuple[TrainState, StepReport]:
    """One step."""
    return plain.train_step(network, settings.optimizer, state, batch, rates.learning_rate)


class BatchStream(Protocol):
    """Batches without end, from which a run can go on where it was."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state(self) -> dict:
        """Where the stream stands, as a small JSON object."""

    def restore(self, state: dict) -> None:
        """Goes to where `state` was taken."""


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The sources of Python's standard library."""

    max_bytes: int = 5_000_000
    part: Literal["train", "validation"] = "train"

    def open(
        self,
        tokenizer: Any,
        batch_size: int,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> "_Rows":
        """A stream of full rows."""
        corpus = gather_corpus(self.max_bytes)
        texts = [document.text for document in getattr(corpus, self.part)]
        return _Rows(TrainingRows(encode_documents(tokenizer, texts), batch_size, seq_len, seed))


class _Rows:
    def __init__(self, rows: TrainingRows) -> None:
        self._rows, self._next = rows, 0

    def __next__(self) -> Batch:
        self._next += 1
        return self._rows.batch(self._next - 1)

    def state(self) -> dict:
        return {"next": self._next}

    def restore(self, state: dict) -> None:
        self._next = state["next"]
