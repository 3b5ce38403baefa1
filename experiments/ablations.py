"""What each part of the architecture and of the recipe is worth on one small budget.

    python -m experiments.ablations                     # two seeds; about half an hour of CPU time
    python -m experiments.ablations --seeds 0 --steps 4 --validation-batches 1 --long-steps 1

The quickstart's model, text, start and optimiser; every variant changes one thing and takes the same steps:

    base             float32, four residual streams, MTP, balance loss and biases that move
    no balance       biases stand still, and the balance loss weighs nothing
    one stream       hc_mult = 1: no mixing of streams (the gates before and after a sublayer remain)
    no MTP           no MTP block and no loss of it
    bfloat16         activations and products in bfloat16, float32 masters
    FP8              bfloat16, and weights, activations and cache entries on the grid of FP8
    FP4 QAT          the whole simulation of the release: FP8, FP4 routed experts, FP4 index keys

Held-out loss is that of the next token, computed as the model was trained. (Once more in float32 for models
that were trained in fewer bits: what they lose when they are used.) The spread of the experts' load is the
standard deviation over the mean, averaged over layers that learn their routing, in the last steps.

Then dense against sparse attention on long rows: from the state after `base`, both take the same few steps;
CPU seconds a step and losses are compared. Few steps, few tokens: differences below the spread of the seeds
say nothing.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import TrainingRows
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import Schedule
from dsv4_jax.training.recipe import QUICKSTART, Recipe, start
from dsv4_jax.training.step import Rates, StepSettings, TrainState, initial_state, train_step, validation_loss
from experiments import study_record
from experiments.qat_study import Data, quickstart_data

LOW = Policy.of("bfloat16", master="float32")
FP8 = Policy.of("bfloat16", "qat", switches={"act_fp8", "kv_fp8"}, master="float32", weights="fp8")
FP4 = Policy.of("bfloat16", "qat", master="float32", weights="fp8")
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "no balance": {"rates": {"balance": np.float32(0), "bias_speed": np.float32(0)}},
    "one stream": {"config": {"hc_mult": 1}},
    "no MTP": {"config": {"num_nextn_predict_layers": 0}},
    "bfloat16": {"policy": LOW},
    "FP8": {"policy": FP8},
    "FP4 QAT": {"policy": FP4},
}
"""What differs from `base`: fields of the configuration, rates of the step, or the policy."""

LAST = 20
"""Steps over which the training loss and the experts' loads are averaged at the end."""


@dataclasses.dataclass
class Options:
    """How much to train."""

    seeds: tuple[int, ...] = (0, 1)
    only: tuple[str, ...] = tuple(VARIANTS)
    steps: int = 150
    batch_size: int = 2
    """Rows of 256 tokens."""
    rate: float = 1e-2
    validation_batches: int = 8
    """Of 2 x 256 tokens."""
    long: tuple[int, ...] = (2048, 4096)
    """Lengths of the rows of dense and sparse attention."""
    long_steps: int = 4
    out: Path = Path("experiments/results/ablations.json")
    """Also names the table (`.md`) and the plot (`.png`)."""


def recipe_of(name: str, options: Options) -> Recipe:
    """The quickstart's, with the variant's configuration and policy."""
    changed = VARIANTS[name]
    config = dataclasses.replace(QUICKSTART.config, **changed.get("config", {}))
    policy = changed.get("policy", QUICKSTART.policy)
    return dataclasses.replace(QUICKSTART, config=config, policy=policy, batch_size=options.batch_size)


def load_spread(loads: np.ndarray, num_hash: int) -> float:
    """Standard deviation over mean of the experts' loads.

    Args:
        loads: f32[layers, E], summed over steps.
        num_hash: layers at the beginning that do not learn their routing; left out.
    """
    learned = loads[num_hash:]
    return float(np.mean(learned.std(axis=-1) / learned.mean(axis=-1)))


def run(name: str, seed: int, options: Options, data: Data) -> tuple[dict[str, Any], TrainState]:
    """Trains one variant; its row of the table and the state it ended with."""
    recipe, settings = recipe_of(name, options), StepSettings(Muon(), indexer="sparse")
    network = Network(recipe.config, recipe.policy)
    rows = TrainingRows(data.training, recipe.batch_size, recipe.seq_len, seed)
    schedule = Schedule(options.rate, options.steps, recipe.warmup_fraction)
    state = initial_state(start(recipe, seed), settings.optimizer)
    losses, loads, cpu, wall, compiling = [], [], 0.0, 0.0, 0.0
    for step in range(options.steps):
        rates = Rates(np.float32(schedule.learning_rate(step)), **VARIANTS[name].get("rates", {}))
        began, began_wall = time.process_time(), time.perf_counter()
        state, report = jax.block_until_ready(train_step(network, settings, state, rows.batch(step), rates))
        took, took_wall = time.process_time() - began, time.perf_counter() - began_wall
        if step:
            cpu, wall = cpu + took, wall + took_wall
        else:
            compiling = took
        losses.append(float(report.main))
        loads.append(np.asarray(report.loads)[: recipe.config.num_hidden_layers])
    plain = Network(recipe.config, QUICKSTART.policy)
    last = np.sum(loads[-LAST:], axis=0)
    row = {
        "variant": name,
        "seed": seed,
        "training": float(np.mean(losses[-LAST:])),
        "held_out": validation_loss(network, state.params, data.held_out),
        "held_out_in_float32": validation_loss(plain, state.params, data.held_out)
        if recipe.policy != QUICKSTART.policy
        else None,
        "load_spread": load_spread(last, recipe.config.router_kinds.count("hash")),
        "cpu_seconds_a_step": cpu / max(options.steps - 1, 1),
        "wall_seconds_a_step": wall / max(options.steps - 1, 1),
        "compile_cpu_seconds": compiling,
        "losses": losses,
    }
    return row, state


def attend(state: TrainState, length: int, seed: int, options: Options, data: Data) -> list[dict[str, Any]]:
    """The same few steps on one row of `length` tokens with sparse and with dense attention, alternating."""
    network = Network(QUICKSTART.config, QUICKSTART.policy)
    rows = TrainingRows(data.training, 1, length, seed + 100)
    kinds = ("sparse", "dense")
    # Copies: steps consume their state, and both begin with the same.
    states = {kind: jax.tree.map(jnp.copy, state) for kind in kinds}
    found = {kind: {"losses": [], "cpu": [], "wall": []} for kind in kinds}
    rates = Rates(np.float32(0.1 * options.rate))
    for step in range(-1, options.long_steps):  # the first compiles and does not count
        for kind in kinds:
            settings = StepSettings(Muon(), attention=kind)
            given = jax.tree.map(jnp.copy, state) if step < 0 else states[kind]
            began, began_wall = time.process_time(), time.perf_counter()
            after, report = jax.block_until_ready(
                train_step(network, settings, given, rows.batch(max(step, 0)), rates)
            )
            if step >= 0:
                states[kind] = after
                found[kind]["cpu"].append(time.process_time() - began)
                found[kind]["wall"].append(time.perf_counter() - began_wall)
                found[kind]["losses"].append(float(report.main))
    return [
        {
            "attention": kind,
            "length": length,
            "seed": seed,
            "losses": one["losses"],
            "loss": float(np.mean(one["losses"])),
            "cpu_seconds_a_step": float(np.median(one["cpu"])),
            "wall_seconds_a_step": float(np.median(one["wall"])),
        }
        for kind, one in found.items()
    ]


def differences(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Held-out loss less that of `base` with the same seed, of every variant; nats a token."""
    base = {row["seed"]: row["held_out"] for row in rows if row["variant"] == "base"}
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["variant"] != "base" and row["seed"] in base:
            found.setdefault(row["variant"], []).append(row["held_out"] - base[row["seed"]])
    return found


def markdown(record: dict[str, Any]) -> str:
    """Both tables so far."""
    apart, options = differences(record["rows"]), record["options"]
    lines = []
    for name in VARIANTS:
        chosen = [row for row in record["rows"] if row["variant"] == name]
        if not chosen:
            continue

        def numbers(key: str, digits: int, chosen: list[dict[str, Any]] = chosen) -> str:
            return ", ".join("" if row[key] is None else f"{row[key]:.{digits}f}" for row in chosen)

        lines.append(
            [
                name,
                numbers("held_out", 4),
                ", ".join(f"{value:+.4f}" for value in apart.get(name, [])),
                numbers("held_out_in_float32", 4).strip(", "),
                numbers("training", 4),
                numbers("load_spread", 2),
                numbers("cpu_seconds_a_step", 2),
            ]
        )
    header = ["variant", "held-out loss", "less base", "used in float32", "training loss, last steps"]
    header += ["spread of loads", "CPU s a step"]
    long = [
        [
            row["length"],
            row["attention"],
            row["seed"],
            f"{row['loss']:.4f}",
            f"{row['losses'][-1]:.4f}",
            f"{row['cpu_seconds_a_step']:.2f}",
        ]
        for row in record["long"]
    ]
    head_of_long = ["tokens", "attention", "seed", "mean loss", "last loss", "CPU s a step"]
    return (
        "# Ablations on one small budget\n\n"
        f"{record['date']}, {record['machine']}, jax {record['jax']}, `{record['command']}`\n\n"
        f"The quickstart's model, {options['steps']} steps of {options['batch_size']} x 256 tokens, Muon, "
        f"peak rate {options['rate']:g}; losses in nats a token, one number a seed. A time of a "
        "step is that of a busy machine, in CPU seconds; the simulated formats "
        f"are slower than what they simulate.\n\n"
        f"{study_record.table(header, lines)}\n"
        "Dense against sparse attention, from the state after `base` on the same rows "
        f"(index_topk {QUICKSTART.config.index_topk}):\n\n"
        f"{study_record.table(head_of_long, long)}"
    )


def plot(path: Path, record: dict[str, Any]) -> None:
    """Differences of held-out loss from `base`, and the experts' spread of loads, a dot a seed."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    apart = differences(record["rows"])
    if not apart:
        return
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(apart)[::-1]
    for place, name in enumerate(names):
        left.barh(place, float(np.mean(apart[name])), color="tab:blue", alpha=0.35)
        left.plot(apart[name], [place] * len(apart[name]), "o", color="tab:blue", ms=5)
    left.set(yticks=range(len(names)), yticklabels=names, title="Held-out loss less that of the base")
    left.set_xlabel("nats a token (right of 0: worse than the base)")
    left.axvline(0, color="black", lw=0.8)
    names = [name for name in VARIANTS if any(row["variant"] == name for row in record["rows"])][::-1]
    for place, name in enumerate(names):
        values = [row["load_spread"] for row in record["rows"] if row["variant"] == name]
        right.barh(place, float(np.mean(values)), color="tab:gray", alpha=0.35)
        right.plot(values, [place] * len(values), "o", color="tab:gray", ms=5)
    right.set(yticks=range(len(names)), yticklabels=names, title="Spread of the experts' loads")
    right.set_xlabel("standard deviation / mean, last steps")
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="x")
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    """Runs every variant of every seed; everything is written after every run."""
    if unknown := sorted(set(options.only) - VARIANTS.keys()):
        raise SystemExit(f"only={unknown} must be among {', '.join(VARIANTS)}")
    console = Console()
    data = quickstart_data(
        options.validation_batches, dataclasses.replace(QUICKSTART, batch_size=options.batch_size)
    )
    shown = {key: value for key, value in dataclasses.asdict(options).items() if key != "out"}
    record = study_record.stamp("ablations") | {"options": shown, "rows": [], "long": []}

    def keep() -> None:
        study_record.write(options.out, record, markdown(record))
        plot(options.out.with_suffix(".png"), record)

    for seed in options.seeds:
        after_base = None
        for name in options.only:
            row, state = run(name, seed, options, data)
            record["rows"].append(row)
            keep()
            console.print(f"seed {seed}, {name}: held-out {row['held_out']:.4f}")
            after_base = state if name == "base" else after_base
        for length in options.long if after_base is not None else ():
            record["long"] += attend(after_base, length, seed, options, data)
            keep()
    console.print(f"written: {options.out}, .md and .png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
