"""The engine under load: one client, many clients, arrivals by chance, shared beginnings, clients who leave.

    python -m experiments.bench_engine                       # a quickstart-sized random model; minutes
    python -m experiments.bench_engine --checkpoint quickstart

All loads run in one process on one warm engine, in rounds that alternate, and the table has medians over the
rounds: absolute times depend on the machine, the ratio to one client does not. Random weights take as long as
trained ones.
"""

import dataclasses
import statistics
from pathlib import Path

import matplotlib
import tyro
from rich.console import Console

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.loading import load
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.engine import Engine
from dsv4_jax.serving.load import Load, run, summary
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.training.recipe import QUICKSTART
from experiments.study_record import stamp, table, write

BASE = Load(num_requests=32, prompt_tokens=96, answer_tokens=32)
LOADS = {
    "one client": dataclasses.replace(BASE, num_requests=8, at_once=1),
    "4 clients": dataclasses.replace(BASE, at_once=4),
    "16 clients": dataclasses.replace(BASE, at_once=16),
    "16 clients, 300 shared tokens": dataclasses.replace(
        BASE, at_once=16, shared_tokens=300, prompt_tokens=24
    ),
    "Poisson, 8 a second": dataclasses.replace(BASE, at_once=None, per_second=8.0),
    "16 clients, a third leaves": dataclasses.replace(BASE, at_once=16, cancelled=0.33),
}
SHOWN = (
    "output_tokens_per_second", "first_token_ms_p50", "first_token_ms_p99", "token_gap_ms_p50",
    "token_gap_ms_p99", "whole_answer_ms_p50", "prefix_hit_share",
)  # fmt: skip


def plot(rows: dict[str, dict[str, float]], out: Path) -> None:
    """Tokens a second and time to the first token of every load."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    names = list(rows)[::-1]
    for axis, key, label in zip(
        axes,
        ("output_tokens_per_second", "first_token_ms_p50"),
        ("output tokens a second", "median time to the first token, ms"),
        strict=True,
    ):
        axis.barh(names, [rows[name][key] for name in names], color="#4477aa")
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yticklabels([])
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(
    checkpoint: Path | None = None,
    rounds: int = 3,
    slots: int = 16,
    lanes: int = 4,
    max_length: int = 512,
    out: Path = Path("experiments/results/bench_engine.json"),
) -> None:
    """Serves every load `rounds` times and writes the medians.

    Args:
        checkpoint: a folder; None: a random model of the quickstart's size, float32.
        rounds: how often each load is sent.
        slots, lanes, max_length: of the engine.
    """
    if checkpoint is None:
        lm = LanguageModel.random(QUICKSTART.config, Policy.of("float32"))
    else:
        lm = load(checkpoint, dtype="float32")
    settings = EngineSettings(max_length=max_length, num_slots=slots, num_lanes=lanes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADS}
    with Engine(lm, settings) as engine:
        print(f"compiled in {engine.warm_up_seconds:.1f} s")
        for round_number in range(rounds):
            for name, sent in LOADS.items():
                seeded = dataclasses.replace(sent, seed=round_number)
                found[name].append(summary(*run(engine, seeded)))
                print(round_number, name, f"{found[name][-1]['output_tokens_per_second']:.1f} tokens/s")
    rows = {
        name: {key: statistics.median(one[key] for one in many) for key in many[0]}
        for name, many in found.items()
    }
    single = rows["one client"]["output_tokens_per_second"]
    for row in rows.values():
        row["times_one_client"] = row["output_tokens_per_second"] / single
    head = ["load", "times one client", *(key.replace("_", " ") for key in SHOWN)]
    lines = [
        [name, f"{row['times_one_client']:.2f}", *(f"{row[key]:.3g}" for key in SHOWN)]
        for name, row in rows.items()
    ]
    text = f"# The engine under load\n\n{table(head, lines)}"
    sizes = dataclasses.asdict(settings)
    write(out, stamp("bench_engine") | {"engine": sizes, "rounds": rounds, "rows": rows, "each": found}, text)
    plot(rows, out.with_suffix(".png"))
    Console().print(text)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
