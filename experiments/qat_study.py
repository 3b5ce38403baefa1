"""What FP4 weights cost, and how much of it FP4 quantisation-aware training wins back.

    python -m experiments.qat_study                  # three seeds, about 40 minutes on 2 shared cores
    python -m experiments.qat_study --seeds 0 --base-steps 8 --more-steps 4 --validation-batches 1

Trains the quickstart's model in float32, then continues twice from the same state, with the same batches and
learning rates: without any rounding, and with fake FP4 weights (straight-through, float32 masters). Every
result is evaluated with and without FP4 weights on the same held-out tokens. With

    gap       = FP4(trained without) - plain(trained without)       what post-training FP4 costs
    recovered = (FP4(trained without) - FP4(trained with)) / gap    1: as good as the unquantised model

in nats a token. Two trainings never end alike: how far they differ when both are used without rounding is
printed beside the gap, and a gap no larger than that gives no share. What rounding costs each of the two
*after* its training is free of that noise, because it compares a model with itself:

    cost without = gap,   cost with = FP4(trained with) - plain(trained with)       below 0: FP4 is its home

Setting "experts" is the released
recipe (`expert_fp4`: routed experts, groups of 32 inputs). Setting "every matrix" is harsher than any:
all matrices of the attention and expert sublayers but the router are in FP4, the MTP block's too; it is here
because the first gap is small.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.command_line.quickstart import spread, tokenized
from dsv4_jax.config import ModelConfig
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.model.transformer import Transformer
from dsv4_jax.numerics import qat
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import DECAYED, Parameters
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.data import Batch, TrainingRows, validation_batches
from dsv4_jax.training.optimizer import AdamW, Schedule, role_of
from dsv4_jax.training.recipe import QUICKSTART, Recipe
from dsv4_jax.training.step import Rates, StepSettings, TrainState, initial_state, train_step, validation_loss
from experiments import study_record

PLAIN = Network(QUICKSTART.config, QUICKSTART.policy)
OPTIMIZER, PEAK = AdamW(), 4e-3
"""The quickstart's when the study's results were made."""


class EveryMatrixFp4(NamedTuple):
    """A network whose sublayers' matrices are rounded to FP4 before use; gradient 1, masters as they are."""

    config: ModelConfig
    policy: Policy
    placement = None  # one device

    def holding(self, parameters: Parameters) -> Transformer:
        """As `Network.holding`."""
        rounded = jax.tree_util.tree_map_with_path(_in_fp4, parameters)
        return Network(*self).holding(rounded)


def _in_fp4(path: tuple, leaf: jax.Array) -> jax.Array:
    keys = [str(key.key) for key in path]
    inside = ("attn" in keys or "ffn" in keys) and "gate" not in keys
    return qat.fake_mxfp4(leaf) if inside and role_of(path) in DECAYED else leaf


SETTINGS = {
    "experts": Network(QUICKSTART.config, Policy.of("float32", "qat", switches={"expert_fp4"})),
    "every matrix": EveryMatrixFp4(QUICKSTART.config, QUICKSTART.policy),
}
"""What is in FP4."""


@dataclasses.dataclass
class Options:
    """How much to train."""

    seeds: tuple[int, ...] = (0, 1, 2)
    base_steps: int = 900
    more_steps: int = 200
    """Steps of each continuation."""
    more_learning_rate: float = 1e-3
    """Peak of the continuations; the base's is the quickstart's."""
    evaluate_every: int = 50
    validation_batches: int = 16
    """Of 4 x 256 tokens."""
    out: Path = Path("experiments/results/qat_study.json")
    """Also names the table (`.md`) and the plot (`.png`)."""


class Data(NamedTuple):
    """Token ids of the training documents, and the batches everything is evaluated on."""

    training: list[np.ndarray]
    held_out: list[Batch]


def quickstart_data(num_batches: int, recipe: Recipe = QUICKSTART) -> Data:
    """The quickstart's text and tokenizer."""
    _, training, validation = tokenized(gather_corpus(recipe.corpus_bytes), recipe)
    batches = validation_batches(validation, recipe.batch_size, recipe.seq_len)
    return Data(training, spread(batches, num_batches))


def train(
    network, state: TrainState, schedule: Schedule, rows: TrainingRows, watch=lambda step, params: None
):
    """Runs the schedule from the state's own place in the data; `watch` sees the parameters of every step."""
    first = int(state.step)
    for step in range(schedule.num_steps):
        rates = Rates(np.float32(schedule.learning_rate(step)))
        settings = StepSettings(OPTIMIZER)
        state, _ = train_step(network, settings, state, rows.batch(first + step), rates)
        watch(step + 1, state.params)
    return state


def study(options: Options, seed: int, data: Data, keep) -> None:
    """One seed: the base, the continuation without rounding, and one with rounding for every setting."""
    rows = TrainingRows(data.training, QUICKSTART.batch_size, QUICKSTART.seq_len, seed)
    parameters = initial_parameters(PLAIN.config, PLAIN.policy, seed)
    schedule = Schedule(PEAK, options.base_steps, QUICKSTART.warmup_fraction)
    base = train(PLAIN, initial_state(parameters, OPTIMIZER), schedule, rows)
    schedule = Schedule(options.more_learning_rate, options.more_steps)

    def losses(params: Parameters, settings) -> dict[str, float]:
        return {name: validation_loss(network, params, data.held_out) for name, network in settings.items()}

    def continued(name: str, network, settings) -> None:
        points = [{"step": 0} | losses(base.params, settings)]

        def watch(step: int, params: Parameters) -> None:
            if step % options.evaluate_every == 0 or step == options.more_steps:
                points.append({"step": step} | losses(params, settings))

        # A copy: steps consume their state, and every continuation starts from the base.
        train(network, jax.tree.map(jnp.copy, base), schedule, rows, watch)
        keep({"seed": seed, "trained_with": name, "losses": points})

    continued("plain", PLAIN, {"plain": PLAIN} | SETTINGS)
    for name, network in SETTINGS.items():
        continued(name, network, {"plain": PLAIN, name: network})


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every seed and setting whose two continuations are done."""
    last = {(run["seed"], run["trained_with"]): run["losses"][-1] for run in runs}
    found = []
    for (seed, setting), trained in last.items():
        if setting == "plain":
            continue
        without = last[seed, "plain"]
        gap = without[setting] - without["plain"]
        won = without[setting] - trained[setting]
        found.append(
            {
                "setting": setting,
                "seed": seed,
                "plain": without["plain"],
                "post_training_fp4": without[setting],
                "qat_fp4": trained[setting],
                "qat_plain": trained["plain"],
                "gap": gap,
                "training_noise": abs(trained["plain"] - without["plain"]),
                "recovered": won / gap,
                "rounding_cost_with": trained[setting] - trained["plain"],
            }
        )
    return sorted(found, key=lambda row: (row["setting"] != "experts", row["setting"], row["seed"]))


def markdown(record: dict[str, Any]) -> str:
    """The table of all seeds so far."""
    rows = [
        [
            row["setting"],
            row["seed"],
            *(f"{row[name]:.4f}" for name in ("plain", "post_training_fp4", "qat_fp4", "qat_plain")),
            *(f"{row[name]:+.4f}" for name in ("gap", "rounding_cost_with")),
            f"{row['training_noise']:.4f}",
            f"{row['recovered']:.0%}" if row["gap"] > row["training_noise"] else "gap too small",
        ]
        for row in record["rows"]
    ]
    header = [
        "in FP4",
        "seed",
        "trained without, used without",
        "trained without, used in FP4",
        "trained with FP4, used in FP4",
        "trained with FP4, used without",
        "rounding costs (gap)",
        "rounding costs, trained with FP4",
        "trainings differ by",
        "recovered",
    ]
    options = record["options"]
    return (
        "# FP4 weights: post-training rounding against quantisation-aware training\n\n"
        f"{record['date']}, {record['machine']}, jax {record['jax']}, `{record['command']}`\n\n"
        "The quickstart's model (2.8M parameters; float32 masters and compute: the baseline is float32, "
        f"not bfloat16), {options['base_steps']} steps of 4 x 256 tokens, then {options['more_steps']} more "
        "from that state with each kind of weights, peak learning rate "
        f"{options['more_learning_rate']}. Losses in nats a token on {options['validation_batches']} x 4 x "
        "256 held-out tokens. In FP4: 'experts' is the released recipe, 'every matrix' is harsher than any "
        f"release.\n\n{study_record.table(header, rows)}\n{means(record['rows'])}"
    )


def means(rows: list[dict[str, Any]]) -> str:
    """A line for every setting: shares are of the summed gaps, so that a tiny gap weighs little."""
    lines = []
    for setting in SETTINGS:
        chosen = [row for row in rows if row["setting"] == setting]
        if not chosen:
            continue
        gap, won, noise, cost = (
            np.mean([value(row) for row in chosen])
            for value in (
                lambda row: row["gap"],
                lambda row: row["gap"] * row["recovered"],
                lambda row: row["training_noise"],
                lambda row: row["rounding_cost_with"],
            )
        )
        verdict = f"{won / gap:.0%} of the mean gap" if gap > noise else "no share: the gap is within it"
        lines.append(
            f"* {setting}, mean of {len(chosen)} seeds: gap {gap:.4f}, won back {won:.4f} nats, trainings "
            f"differ by {noise:.4f}; {verdict}. Rounding after training costs {gap:+.4f} without and "
            f"{cost:+.4f} with FP4 training\n"
        )
    return "".join(lines)


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """Losses along the continuations, one panel a setting: the mean over seeds, and each seed thinly."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    lines = {
        "trained without, used without": ("plain", "plain", "tab:gray"),
        "trained without, used in FP4": ("plain", None, "tab:red"),
        "trained with FP4, used in FP4": (None, None, "tab:blue"),
    }
    for axes, setting in zip(figure.subplots(1, len(SETTINGS)), SETTINGS, strict=True):
        for label, (trained, used, color) in lines.items():
            chosen = [run["losses"] for run in runs if run["trained_with"] == (trained or setting)]
            if not chosen:
                continue
            steps = [point["step"] for point in chosen[0]]
            curves = np.array([[point[used or setting] for point in points] for points in chosen])
            axes.plot(steps, curves.T, color=color, lw=0.6, alpha=0.5)
            axes.plot(steps, curves.mean(axis=0), color=color, lw=1.8, label=label)
        axes.set(title=f"FP4: {setting}", xlabel="further steps", ylabel="validation loss (nats per token)")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    """Runs all seeds; everything is written after every continuation."""
    console = Console()
    data = quickstart_data(options.validation_batches)
    record = study_record.stamp("qat_study")
    shown = {key: value for key, value in dataclasses.asdict(options).items() if key != "out"}
    record |= {"options": shown, "rows": [], "runs": []}

    def keep(run: dict[str, Any]) -> None:
        record["runs"].append(run)
        record["rows"] = summary(record["runs"])
        study_record.write(options.out, record, markdown(record))
        plot(options.out.with_suffix(".png"), record["runs"])
        console.print(f"seed {run['seed']}, trained with {run['trained_with']}: {run['losses'][-1]}")

    for seed in options.seeds:
        study(options, seed, data, keep)
    console.print(f"written: {options.out}, .md and .png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
