"""Which recipe makes the quickstart's model best for the same cost: bits per byte at equal CPU time.

    python -m experiments.quickstart_recipe                               # every variant, one seed
    python -m experiments.quickstart_recipe --cpu-seconds 60 --only "as it was" "zero start"

A variant says how the model starts, which optimiser trains it at which rate, and how many rows a step has.
Steps of different variants cost different amounts of time, so each gets as many steps as fit into the same
CPU seconds, by the cost of its own steps after compilation, measured first on a state that is thrown away.
CPU seconds, because wall time on a machine that does other work says little; both cores are counted. The
held-out loss is given in bits per byte of the held-out text, which does not depend on the tokenizer.

"Zero start": the last matrices of both sublayers (`wo_b`, and `down` of all experts, also in the MTP block)
start at zero, so that the model begins as the embedding and the head alone.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.command_line.quickstart import spread, tokenized
from dsv4_jax.model.initial import Network
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.data import TrainingRows, validation_batches
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW, Schedule
from dsv4_jax.training.recipe import QUICKSTART, Recipe, start
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step, validation_loss
from dsv4_jax.training.step_settings import Optimizer
from experiments import study_record


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the quickstart as it was."""

    optimizer: Optimizer = AdamW()
    rate: float = 4e-3
    zero_start: bool = True
    mtp: bool = True
    batch_size: int = 4
    seq_len: int = 256
    config: tuple[tuple[str, Any], ...] = ()  # fields of the model's config that change

    def recipe(self) -> Recipe:
        """The quickstart's with these differences."""
        fields = dict(self.config) | ({} if self.mtp else {"num_nextn_predict_layers": 0})
        config = dataclasses.replace(QUICKSTART.config, **fields)
        return dataclasses.replace(
            QUICKSTART,
            config=config,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            zero_outputs=self.zero_start,
        )


VARIANTS = {
    "as it was": Variant(zero_start=False),
    "zero start": Variant(),
    "Muon 1e-2": Variant(Muon(), 1e-2),
    "Muon 2e-2": Variant(Muon(), 2e-2),
    "Muon 2e-2, normal start": Variant(Muon(), 2e-2, zero_start=False),
    "no MTP": Variant(mtp=False),
    "Muon 2e-2, no MTP": Variant(Muon(), 2e-2, mtp=False),
    "Muon 2e-2, 8 rows": Variant(Muon(), 2e-2, batch_size=8),
    "Muon 2e-2, 8 rows of 128": Variant(Muon(), 2e-2, batch_size=8, seq_len=128),
    "2 rows": Variant(batch_size=2),
    "Muon 1e-2, 8 rows of 128": Variant(Muon(), 1e-2, batch_size=8, seq_len=128),
    "Muon 1e-2, 4 rows of 128": Variant(Muon(), 1e-2, batch_size=4, seq_len=128),
    "Muon 1e-2, no MTP": Variant(Muon(), 1e-2, mtp=False),
}


@dataclasses.dataclass
class Options:
    """What to compare."""

    cpu_seconds: float = 80.0
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = tuple(VARIANTS)
    out: Path = Path("experiments/results/quickstart_recipe.json")


def run(variant: Variant, seed: int, budget: float) -> dict[str, Any]:
    """Trains one variant for the budget."""
    recipe = variant.recipe()
    tokenizer, training, held_out = tokenized(gather_corpus(recipe.corpus_bytes), recipe)
    rows = TrainingRows(training, recipe.batch_size, recipe.seq_len, seed)
    network, settings = (
        Network(recipe.config, recipe.policy),
        StepSettings(variant.optimizer, indexer="sparse"),
    )

    def fresh():
        return initial_state(start(recipe, seed), variant.optimizer)

    def steps(state, schedule: Schedule, count: int):
        began, report = time.process_time(), None
        for step in range(count):
            rates = Rates(np.float32(schedule.learning_rate(step)))
            state, report = train_step(network, settings, state, rows.batch(step), rates)
        jax.block_until_ready(state)
        return state, report, time.process_time() - began

    warm, _, compiling = steps(fresh(), Schedule(1e-6, 10), 1)
    _, _, ten = steps(warm, Schedule(1e-6, 10), 10)
    count = max(1, round(budget / (ten / 10)))
    state, report, spent = steps(fresh(), Schedule(variant.rate, count, recipe.warmup_fraction), count)
    batches = spread(validation_batches(held_out, 4, 256), 24)
    nats = validation_loss(network, state.params, batches)
    num_bytes = sum(len(tokenizer.decode(list(map(int, document))).encode()) for document in held_out)
    bits = nats / math.log(2) * sum(map(len, held_out)) / num_bytes
    return {
        "steps": count,
        "tokens": count * recipe.batch_size * recipe.seq_len,
        "cpu_seconds": spent,
        "cpu_seconds_a_step": ten / 10,
        "compile_cpu_seconds": compiling,
        "training": float(report.main),
        "held_out": nats,
        "bits_per_byte": bits,
    }


HEAD = ("variant", "seed", "steps", "CPU s", "training", "held-out nats", "bits a byte")


def line(row: dict[str, Any]) -> list[object]:
    """A row of the table."""
    numbers = [f"{row[key]:.3f}" for key in ("training", "held_out", "bits_per_byte")]
    return [row["variant"], row["seed"], row["steps"], f"{row['cpu_seconds']:.0f}", *numbers]


def main(options: Options) -> None:
    """Runs the variants and writes JSON and a table after each."""
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in options.only:
            results.append({"variant": name, "seed": seed} | run(VARIANTS[name], seed, options.cpu_seconds))
            markdown = study_record.table(HEAD, [line(row) for row in results])
            Console().print(markdown)
            record = study_record.stamp("quickstart_recipe") | {"results": results}
            study_record.write(options.out, record, markdown)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
