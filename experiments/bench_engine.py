"""The engine under load: one client, many clients, arrivals by chance, shared beginnings, clients who leave.

    python -m experiments.bench_engine                       # a quickstart-sized random model; minutes
    python -m experiments.bench_engine --checkpoint quickstart

All loads run in one process on one warm engine, in rounds that alternate, and the table has medians over the
rounds: absolute times depend on the machine, the ratio to one client does not. Random weights take as long as
trained ones. CPU milliseconds are of the whole process: clients, too. Goodput counts answers a second that
kept both limits (`--first-token-limit`, `--gap-limit`).

Before that, the same greedy requests at once (`Engine.complete_all`) against one after the other by
`LanguageModel.generate`, a batch of one each; at last, where drafts are asked for, the engine with a draft
head against the one without. Prompts of both are texts if the checkpoint has a tokenizer. Answers should be
equal, and the table says how many were.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.inference.drafters import Draft
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.loading import load
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.engine import Engine
from dsv4_jax.serving.load import Load, Seen, run, summary
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.training.corpus import gather_corpus
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
    "output_tokens_per_second", "cpu_ms_a_token", "goodput", "first_token_ms_p50", "first_token_ms_p90",
    "first_token_ms_p99", "token_gap_ms_p50", "token_gap_ms_p90", "token_gap_ms_p99", "whole_answer_ms_p50",
    "prefix_hit_share", "left_early",
)  # fmt: skip


def goodput(seen: Sequence[Seen], seconds: float, first_token: float, gap: float) -> float:
    """Complete answers a second whose first token came in time, and whose mean gap was short enough.

    Args:
        seen: what clients saw, in so many seconds.
        first_token, gap: limits in seconds.
    """
    good = [
        one
        for one in seen
        if one.finish_reason == "length"
        and one.first_token_seconds <= first_token
        and (not one.gaps or float(np.mean(one.gaps)) <= gap)
    ]
    return len(good) / seconds


def texts(lm: LanguageModel, count: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens: of the standard library's sources, or random ids without a tokenizer."""
    random = np.random.default_rng(0)
    if lm.tokenizer is None:
        return random.integers(0, lm.config.vocab_size, (count, length)).tolist()
    sources = "".join(document.text for document in gather_corpus(5_000_000).validation)
    starts = random.integers(0, len(sources) - 20 * length, count)
    return [lm.tokenizer.encode(sources[at : at + 20 * length]).ids[:length] for at in starts]


def timed(work: Callable[[], list[list[int]]]) -> dict[str, Any]:
    """Tokens that `work` gives, its wall seconds and the CPU seconds of this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "tokens": tokens}


def paired(
    rounds: int, slow: Callable[[], list[list[int]]], fast: Callable[[], list[list[int]]]
) -> dict[str, Any]:
    """How many times faster `fast` is: medians of the rounds' ratios, and how many answers are equal."""
    both = [(timed(slow), timed(fast)) for _ in range(rounds)]
    equal = [a == b for left, right in both for a, b in zip(left["tokens"], right["tokens"], strict=True)]
    found: dict[str, Any] = {"equal": sum(equal), "answers": len(equal)}
    for kind in ("wall", "cpu"):
        ratios = sorted(left[kind] / right[kind] for left, right in both)
        found[kind] = {"ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
        found[kind]["seconds"] = [
            statistics.median(side[kind] for side in sides) for sides in zip(*both, strict=True)
        ]
    found["tokens"] = sum(map(len, both[0][1]["tokens"]))
    return found


def served(engine: Engine, prompts: list[list[int]], answer_tokens: int) -> list[list[int]]:
    """Greedy answers of the engine to all prompts at once."""
    greedy = Sampling(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
    return [list(answer.token_ids) for answer in engine.complete_all(prompts, greedy)]


def one_by_one(lm: LanguageModel, prompts: list[list[int]], answer_tokens: int) -> list[list[int]]:
    """Greedy answers of `LanguageModel.generate`, a prompt at a time."""
    return [lm.generate([prompt], answer_tokens, stop_token_ids=())[0].tolist() for prompt in prompts]


def drafted(
    lm: LanguageModel, engine: Engine, settings: EngineSettings, draft: Draft, rounds: int, answer_tokens: int
) -> list[dict[str, Any]]:
    """The engine with a draft head against the one without, for one client and for 16."""
    prompts, found = texts(lm, 16, 96), []
    with Engine(lm, dataclasses.replace(settings, draft=draft)) as drafting:
        for clients in (1, 16):
            some = prompts[:clients]

            def work(used: Engine, some: list[list[int]] = some) -> list[list[int]]:
                return served(used, some, answer_tokens)

            work(drafting), work(engine)
            before = drafting.status().drafts
            row = paired(rounds, lambda: work(engine), lambda: work(drafting))
            after = drafting.status().drafts
            kept, tried = (after[0][place] - (before[0][place] if before else 0) for place in (0, 1))
            found.append({"draft": draft, "clients": clients, "acceptance": kept / max(tried, 1)} | row)
    return found


def plot(rows: dict[str, dict[str, float]], out: Path) -> None:
    """Tokens a second, time to the first token and gaps between tokens of every load."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(13, 3.4), layout="constrained")
    names = list(rows)[::-1]
    first, second, third = figure.subplots(1, 3)
    first.barh(names, [rows[name]["output_tokens_per_second"] for name in names], color="#4477aa")
    first.set_xlabel("output tokens a second")
    for axes, key, label in (
        (second, "first_token_ms", "time to the first token, ms"),
        (third, "token_gap_ms", "time between tokens, ms"),
    ):
        for percent, marker in ((50, "o"), (90, "s"), (99, "^")):
            values = [rows[name][f"{key}_p{percent}"] for name in names]
            axes.plot(values, names, marker, ms=5, label=f"p{percent}")
        axes.set(xlabel=label, yticklabels=[])
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
    second.legend(frameon=False, fontsize=8)
    for axes in (first, second, third):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)


def pairs_table(pairs: list[dict[str, Any]]) -> str:
    """One row for every comparison of `paired`."""
    rows = [
        [
            row["what"],
            *("{:.2f} ({:.2f} to {:.2f})".format(row[k]["ratio"], *row[k]["range"]) for k in ("wall", "cpu")),
            f"{row['tokens'] / row['wall']['seconds'][1]:.1f}",
            f"{row['acceptance']:.0%}" if "acceptance" in row else "",
            f"{row['equal']} of {row['answers']}",
        ]
        for row in pairs
    ]
    head = ["compared", "times faster, wall", "CPU", "tokens/s", "acceptance", "equal answers"]
    return table(head, rows)


def main(
    checkpoint: Path | None = None,
    rounds: int = 3,
    slots: int = 16,
    lanes: int = 4,
    max_length: int = 512,
    answer_tokens: int = 32,
    draft: Draft | None = "mtp",
    first_token_limit: float = 2.0,
    gap_limit: float = 0.2,
    out: Path = Path("experiments/results/bench_engine.json"),
) -> None:
    """Serves every load `rounds` times and writes the medians, then compares in pairs.

    Args:
        checkpoint: a folder; None: a random model of the quickstart's size, float32.
        rounds: how often each load is sent.
        slots, lanes, max_length: of the engine.
        answer_tokens: of every answer; 16 at once are also compared at four times as many.
        draft: a draft head to compare with; None: none.
        first_token_limit, gap_limit: seconds an answer may take to count for goodput.
    """
    if checkpoint is None:
        lm = LanguageModel.random(QUICKSTART.config, Policy.of("float32"))
    else:
        lm = load(checkpoint, dtype="float32")
    settings = EngineSettings(max_length=max_length, num_slots=slots, num_lanes=lanes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADS}
    record = stamp("bench_engine") | {"engine": dataclasses.asdict(settings), "rounds": rounds}
    record |= {"load": [os.getloadavg()[0]], "rows": {}, "each": found, "pairs": []}

    def keep() -> None:
        record["load"].append(os.getloadavg()[0])
        record["rows"] = medians(found)
        write(out, record, markdown(record))
        if record["rows"]:
            plot(record["rows"], out.with_suffix(".png"))

    with Engine(lm, settings) as engine:
        print(f"compiled in {engine.warm_up_seconds:.1f} s")
        prompts = texts(lm, 16, 96)

        for length in (answer_tokens, 4 * answer_tokens):  # a prompt's cost weighs less in a long answer

            def at_once(length: int = length) -> list[list[int]]:
                return served(engine, prompts, length)

            def apart(length: int = length) -> list[list[int]]:
                return one_by_one(lm, prompts, length)

            one_by_one(lm, prompts[:1], length), at_once()  # warm
            what = f"16 at once, answers of {length}, against generate one by one"
            record["pairs"].append({"what": what} | paired(rounds, apart, at_once))
            keep()
        for round_number in range(rounds):
            for name, sent in LOADS.items():
                seeded = dataclasses.replace(sent, seed=round_number, answer_tokens=answer_tokens)
                cpu = time.process_time()
                seen, seconds = run(engine, seeded)
                tokens = sum(len(one.arrived) for one in seen)
                found[name].append(
                    summary(seen, seconds)
                    | {
                        "goodput": goodput(seen, seconds, first_token_limit, gap_limit),
                        "cpu_ms_a_token": 1e3 * (time.process_time() - cpu) / max(tokens, 1),
                    }
                )
                print(round_number, name, f"{found[name][-1]['output_tokens_per_second']:.1f} tokens/s")
            keep()
        if draft is not None:
            for row in drafted(lm, engine, settings, draft, rounds, answer_tokens):
                what = f"{draft} drafts, {row['clients']} at once, against none"
                record["pairs"].append(row | {"what": what})
            keep()
    Console().print(markdown(record))


def medians(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Over rounds, of the loads that have any; beside them how many times the tokens/s of one client."""
    rows = {
        name: {key: statistics.median(one[key] for one in many) for key in many[0]}
        for name, many in found.items()
        if many
    }
    if rows:
        single = found["one client"]
        for name, row in rows.items():
            pairs = zip(found[name], single, strict=False)
            key = "output_tokens_per_second"
            row["times_one_client"] = statistics.median(one[key] / alone[key] for one, alone in pairs)
    return rows


def markdown(record: dict[str, Any]) -> str:
    """Both tables so far."""
    head = ["load", "times one client", *(key.replace("_", " ") for key in SHOWN)]
    lines = [
        [name, f"{row['times_one_client']:.2f}", *(f"{row[key]:.3g}" for key in SHOWN)]
        for name, row in record["rows"].items()
    ]
    return (
        f"# The engine under load\n\n{record['date']}, {record['machine']}, jax {record['jax']}, "
        f"`{record['command']}`; medians over {record['rounds']} rounds, load average between "
        f"{min(record['load']):.1f} and {max(record['load']):.1f}\n\n"
        f"{table(head, lines)}\n{pairs_table(record['pairs'])}"
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
