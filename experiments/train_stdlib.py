"""A training run to copy: the quickstart's model on the sources of Python's standard library.

    dsv4 train experiments/train_stdlib.py --dry-run
    dsv4 train experiments/train_stdlib.py --plot
    dsv4 train experiments/train_stdlib.py --resume          # after an end of any kind

A run is a function without parameters, called `run`, that returns a `RunConfig`; the file is an ordinary
Python module, executed when it is loaded.
"""

import pathlib

from dsv4_jax.training.recipe import QUICKSTART
from dsv4_jax.training.run_config import Checkpoints, Logging, RunConfig, Stage, Validation
from dsv4_jax.training.schedules import LearningRate
from dsv4_jax.training.sources import StandardLibrary


def run() -> RunConfig:
    """Dense attention first; then the indexers alone, a little; then sparse attention at twice the length."""
    return RunConfig(
        model=QUICKSTART.config,
        policy=QUICKSTART.policy,
        source=StandardLibrary(),
        stages=(
            Stage(num_steps=1000, seq_len=256, batch_size=4, attention="dense"),
            Stage(num_steps=100, seq_len=256, batch_size=4, attention="dense", indexer="warm-up"),
            Stage(num_steps=900, seq_len=512, batch_size=2, indexer="sparse"),
        ),
        learning_rate=LearningRate(QUICKSTART.peak_learning_rate, warmup_steps=100, decay_steps=1000),
        optimizer=QUICKSTART.optimizer,
        out=pathlib.Path("stdlib_run"),
        checkpoints=Checkpoints(every=200, keep=3),
        logging=Logging(every=10),
        validation=Validation(StandardLibrary(part="validation"), every=200, prompt="def "),
    )
