"""A training run of a second: one layer with every kind of state, on numbers instead of text.

As a run file it is given to `dsv4 train`; its folder says how long it is (`settings.json` beside `out`).
"""

import dataclasses
import pathlib

import numpy as np

from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.run_config import Checkpoints, Logging, RunConfig, Stage
from dsv4_jax.training.schedules import LearningRate
from dsv4_jax.training.tokenizer import train_tokenizer
from tests.models import all_kinds

CONFIG = all_kinds(
    vocab_size=300,
    hidden_size=32,
    num_attention_heads=2,
    attention_kinds=("csa",),
    router_kinds=("learned",),
    num_nextn_predict_layers=0,
    initializer_range=0.1,
)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Rows of a walk through the vocabulary, which a model can learn a little of."""

    def open(self, tokenizer, batch_size, seq_len, seed, process_index=0, num_processes=1):
        """A stream."""
        return Walks(batch_size, seq_len, seed)


class Walks:
    """Its batches: each depends on the seed and its number."""

    def __init__(self, batch_size, seq_len, seed):
        self.shape, self.seed, self.next = (batch_size, seq_len), seed, 0

    def __next__(self):
        rng = np.random.default_rng([self.seed, self.next])
        self.next += 1
        tokens = (rng.integers(0, 4, self.shape).cumsum(axis=1) + rng.integers(2, 60)) % 290 + 2
        segments = np.ones(self.shape, np.int32)
        segments[:, self.shape[1] // 2 :] = 2
        return Batch(tokens.astype(np.int32), segments)

    def state(self):
        return {"next": self.next}

    def restore(self, state):
        self.next = state["next"]


def config(out: pathlib.Path, **changes) -> RunConfig:
    """A run in a folder; `changes` are fields of `RunConfig`."""
    tokenizer = out.parent / "tokenizer.json"
    if not tokenizer.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.write_text(train_tokenizer(["a b c"], 258).to_str())
    fields = dict(
        model=CONFIG,
        policy=Policy.of("float32"),
        source=Numbers(),
        stages=(Stage(8, 16, 2), Stage(4, 24, 2)),
        learning_rate=LearningRate(1e-2, warmup_steps=2, decay_steps=6),
        tokenizer=tokenizer,
        out=out,
        checkpoints=Checkpoints(every=3, keep=2),
        logging=Logging(every=1),
    )
    return RunConfig(**(fields | changes))
