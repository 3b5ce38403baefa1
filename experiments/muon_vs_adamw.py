"""Muon against AdamW on the quickstart's model and text: how many fewer tokens Muon needs.

    python -m experiments.muon_vs_adamw                 # three seeds
    python -m experiments.muon_vs_adamw --seeds 0 --steps 4 --tuning-steps 2 --validation-batches 1

Both optimisers are tuned first, one seed and a shorter schedule for each rate, and judged by the held-out
loss; where the best rate is the first or last of those tried, the table says so. Then both train on the same
batches for the same number of steps, every seed, with the schedule of the quickstart. Muon also trains on
schedules of a part of the length. The tokens it needs for AdamW's final loss are interpolated between the
final losses of its schedules, not read off one run: in the middle of a schedule the rate has not come down
yet.

Muon is the report's (momentum 0.95, ten Newton-Schulz steps, update 0.18), with AdamW for embedding, head and
the rest; one rate serves both groups. Its steps cost more: CPU seconds a step are beside the losses.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.training.data import TrainingRows
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW, Schedule
from dsv4_jax.training.recipe import QUICKSTART, Recipe
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step, validation_loss
from experiments import study_record
from experiments.qat_study import Data, quickstart_data

OPTIMIZERS = {"AdamW": AdamW(), "Muon": Muon()}
TUNING_SEED = 1000
"""Of parameters and data while rates are compared; none of the seeds that are reported."""


@dataclasses.dataclass
class Options:
    """How much to train."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 80
    """Of the full schedule, 4 x 256 tokens each."""
    parts: tuple[float, ...] = (0.5, 0.75)
    """Lengths of Muon's shorter schedules, as parts of the full one."""
    tuning_steps: int = 40
    adamw_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2)
    muon_rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    evaluate_every: int = 20
    validation_batches: int = 6
    """Of 4 x 256 tokens."""
    resume: bool = False
    """Take over from `out` the trainings of an earlier call that are wanted again."""
    out: Path = Path("experiments/results/muon_vs_adamw.json")
    """Also names the table (`.md`) and the plot (`.png`)."""


def run(
    name: str, rate: float, steps: int, seed: int, data: Data, every: int, recipe: Recipe = QUICKSTART
) -> dict[str, Any]:
    """One training: held-out losses along it, and what a step cost in CPU seconds after the first."""
    network, settings = Network(recipe.config, recipe.policy), OPTIMIZERS[name]
    rows = TrainingRows(data.training, recipe.batch_size, recipe.seq_len, seed)
    schedule = Schedule(rate, steps, recipe.warmup_fraction)
    state = initial_state(initial_parameters(recipe.config, recipe.policy, seed), settings)
    points, cpu, counted = [], 0.0, 0
    for step in range(steps):
        start = time.process_time()
        learning_rate = np.float32(schedule.learning_rate(step))
        state, report = jax.block_until_ready(
            train_step(network, StepSettings(settings), state, rows.batch(step), Rates(learning_rate))
        )
        if step:
            cpu, counted = cpu + time.process_time() - start, counted + 1
        if (step + 1) % every == 0 or step + 1 == steps:
            tokens = (step + 1) * recipe.batch_size * recipe.seq_len
            held_out = validation_loss(network, state.params, data.held_out)
            points.append({"tokens": tokens, "training": float(report.main), "held_out": held_out})
    return {
        "optimizer": name,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "cpu_seconds_a_step": cpu / max(counted, 1),
        "points": points,
    }


def final(one: dict[str, Any]) -> float:
    """The held-out loss at the end of a run."""
    return one["points"][-1]["held_out"]


def best_rate(tuning: list[dict[str, Any]], name: str) -> float:
    """The rate of the run with the lowest final loss; a diverged one never is."""
    runs = [one for one in tuning if one["optimizer"] == name]
    return min(runs, key=lambda one: np.nan_to_num(final(one), nan=np.inf))["rate"]


def share_of_tokens(wanted: float, parts: list[float], losses: list[float]) -> float | None:
    """The part of the schedule after which Muon has the wanted loss, on straight lines between schedules.

    Args:
        wanted: AdamW's final loss.
        parts: of the full schedule, rising.
        losses: final ones of Muon on them.

    Returns:
        None when the full schedule does not reach it; the shortest part, as an upper bound, when all do.
    """
    if losses[-1] > wanted:
        return None
    if losses[0] <= wanted:
        return parts[0]
    last = max(number for number, loss in enumerate(losses) if loss > wanted)
    fraction = (losses[last] - wanted) / (losses[last] - losses[last + 1])
    return parts[last] + fraction * (parts[last + 1] - parts[last])


def summary(runs: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """One row for every seed whose runs are all there."""
    rows = []
    lengths = sorted({one["steps"] for one in runs})
    for seed in sorted({one["seed"] for one in runs}):
        own = {(one["optimizer"], one["steps"]): one for one in runs if one["seed"] == seed}
        if ("AdamW", steps) not in own or any(("Muon", length) not in own for length in lengths):
            continue
        losses = [final(own["Muon", length]) for length in lengths]
        adamw = final(own["AdamW", steps])
        share = share_of_tokens(adamw, [length / steps for length in lengths], losses)
        rows.append(
            {
                "seed": seed,
                "adamw": adamw,
                "muon": dict(zip(map(str, lengths), losses, strict=True)),
                "share_of_tokens": share,
                "share_is_bound": share == lengths[0] / steps,
                "adamw_cpu_seconds": own["AdamW", steps]["cpu_seconds_a_step"],
                "muon_cpu_seconds": own["Muon", steps]["cpu_seconds_a_step"],
            }
        )
    return rows


def _share(row: dict[str, Any]) -> str:
    if row["share_of_tokens"] is None:
        return "not reached"
    return f"{'at most ' * row['share_is_bound']}{row['share_of_tokens']:.0%}"


def _verdict(rows: list[dict[str, Any]]) -> str:
    shares = [row["share_of_tokens"] for row in rows]
    if not rows or None in shares:
        return "Muon did not reach AdamW's final loss with every seed.\n" if rows else ""
    at_most = "at most " * any(row["share_is_bound"] for row in rows)
    cost = np.mean([row["muon_cpu_seconds"] / row["adamw_cpu_seconds"] for row in rows])
    mean = np.mean(shares)
    return (
        f"Mean of {len(rows)} seeds: Muon needs {at_most}{mean:.0%} of the tokens ({1 - mean:.0%} fewer) for "
        f"AdamW's final loss. A step costs {cost:.2f} times the CPU time, so that loss costs {at_most}"
        f"{mean * cost:.2f} times AdamW's time.\n"
    )


def markdown(record: dict[str, Any]) -> str:
    """Both tables so far."""
    options = record["options"]
    tried = {name: options[f"{name.lower()}_rates"] for name in OPTIMIZERS}
    tuning = [
        [one["optimizer"], f"{one['rate']:g}", f"{final(one):.4f}", f"{one['cpu_seconds_a_step']:.2f}"]
        for one in record["tuning"]
    ]
    ends = [
        f"The best rate of {name}, {rate:g}, is at the end of those tried.\n"
        for name, rate in record["rates"].items()
        if rate in (min(tried[name]), max(tried[name])) and len(tried[name]) > 1
    ]
    lengths = sorted({one["steps"] for one in record["runs"]})
    header = ["seed", "AdamW", *(f"Muon, {length} steps" for length in lengths), "tokens for AdamW's loss"]
    header += ["AdamW, CPU s a step", "Muon, CPU s a step"]
    rows = [
        [
            row["seed"],
            f"{row['adamw']:.4f}",
            *(f"{loss:.4f}" for loss in row["muon"].values()),
            _share(row),
            f"{row['adamw_cpu_seconds']:.2f}",
            f"{row['muon_cpu_seconds']:.2f}",
        ]
        for row in record["rows"]
    ]
    return (
        "# Muon against AdamW at equal tokens\n\n"
        f"{record['date']}, {record['machine']}, jax {record['jax']}, `{record['command']}`\n\n"
        f"The quickstart's model, {options['steps']} steps of 4 x 256 tokens. Held-out loss in nats a token "
        f"on {options['validation_batches']} x 4 x 256 tokens; one rate for all parameters of a run.\n\n"
        f"{study_record.table(header, rows)}\n{_verdict(record['rows'])}\n"
        f"Rates, compared on {options['tuning_steps']} steps with a seed of their own:\n\n"
        f"{study_record.table(['optimizer', 'peak rate', 'held-out loss', 'CPU s a step'], tuning)}\n"
        + "".join(ends)
    )


def earlier(options: Options) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The trainings in `options.out`, by optimizer, rate, steps and seed.

    Raises:
        ValueError: they were evaluated otherwise.
    """
    record = json.loads(options.out.read_text())
    same = ("evaluate_every", "validation_batches")
    if other := [name for name in same if record["options"][name] != getattr(options, name)]:
        raise ValueError(f"{options.out} is of another {' and '.join(other)}")
    done = (*record["tuning"], *record["runs"])
    return {(one["optimizer"], one["rate"], one["steps"], one["seed"]): one for one in done}


def plot(path: Path, record: dict[str, Any]) -> None:
    """Held-out loss by tokens: the mean over seeds, and each seed thinly; AdamW's final loss as a line."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    steps = record["options"]["steps"]
    lengths = sorted({one["steps"] for one in record["runs"]}, reverse=True)
    colors = {"AdamW": ["tab:gray"], "Muon": ["tab:blue", "tab:green", "tab:orange", "tab:red"]}
    for name, shades in colors.items():
        for length, color in zip(
            [each for each in lengths if name == "Muon" or each == steps], shades, strict=False
        ):
            chosen = [
                one["points"] for one in record["runs"] if (one["optimizer"], one["steps"]) == (name, length)
            ]
            if not chosen:
                continue
            thousands = [point["tokens"] / 1000 for point in chosen[0]]
            curves = np.array([[point["held_out"] for point in points] for points in chosen])
            label = f"{name} {record['rates'][name]:g}, {length} steps"
            axes.plot(thousands, curves.T, color=color, lw=0.6, alpha=0.5)
            axes.plot(thousands, curves.mean(axis=0), color=color, lw=1.8, marker=".", label=label)
            if name == "AdamW":
                axes.axhline(curves.mean(axis=0)[-1], color=color, lw=0.8, ls="--")
    axes.set(xlabel="thousand tokens", ylabel="held-out loss (nats per token)", title="Muon against AdamW")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main(options: Options, recipe: Recipe = QUICKSTART) -> None:
    """Tunes, then runs all seeds; everything is written after every run."""
    console = Console()
    data = quickstart_data(options.validation_batches, recipe)
    shown = {key: value for key, value in dataclasses.asdict(options).items() if key != "out"}
    record = study_record.stamp("muon_vs_adamw")
    record |= {"options": shown, "rates": {}, "rows": [], "tuning": [], "runs": []}

    done = earlier(options) if options.resume else {}

    def keep(where: str, *arguments: Any) -> None:
        one = done.get(arguments) or run(*arguments, data, options.evaluate_every, recipe)
        record[where].append(one)
        record["rows"] = summary(record["runs"], options.steps)
        study_record.write(options.out, record, markdown(record))
        console.print(f"{where}: {one['optimizer']} {one['rate']:g}, {one['steps']} steps: {final(one):.4f}")

    for name in OPTIMIZERS:
        for rate in shown[f"{name.lower()}_rates"]:
            keep("tuning", name, rate, options.tuning_steps, TUNING_SEED)
        record["rates"][name] = best_rate(record["tuning"], name)
    lengths = sorted({options.steps, *(max(1, round(part * options.steps)) for part in options.parts)})
    for seed in options.seeds:
        keep("runs", "AdamW", record["rates"]["AdamW"], options.steps, seed)
        for length in lengths:
            keep("runs", "Muon", record["rates"]["Muon"], length, seed)
        plot(options.out.with_suffix(".png"), record)
    console.print(f"written: {options.out}, .md and .png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
