"""Two commits against each other on this CPU: the same work in two processes that take turns.

    git worktree add ../old COMMIT
    python experiments/bench_trees.py --old ../old                # prefill, decode, training steps
    python experiments/bench_trees.py --old ../old --cases prefill-512 --repeats 9

Each tree runs in a process of its own that stays: it compiles a case once, then does one piece of work when
it is told to, and waits while the other works. The ratio is the median of the repeats' ratios (old / new:
above 1 the new tree is faster); beside wall time there is the CPU time of the process, which others on the
machine disturb less. Weights are random and the same in both. A case that a tree cannot run is said so.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

CASES = ("prefill-512", "prefill-2048", "decode-1", "decode-8", "train-adamw", "train-muon")
"""Prefill of so many tokens and decode steps of so many rows behind 512 tokens, both of `bench_cpu`'s model;
training steps of the quickstart's model."""

DECODE_STEPS = 8


def work_of(case: str) -> Callable[[], object]:
    """What a case repeats; imports from the tree that this process was started for."""
    import jax
    import numpy as np

    from dsv4_jax.language_model import LanguageModel
    from dsv4_jax.numerics.policy import Policy
    from experiments.bench_cpu import bench_config, our_decode, our_prefill

    kind, _, what = case.partition("-")
    random = np.random.default_rng(0)
    if kind == "train":
        from dsv4_jax.model.initial import Network, initial_parameters
        from dsv4_jax.training import optimizer as optimizers
        from dsv4_jax.training.data import Batch
        from dsv4_jax.training.recipe import QUICKSTART
        from dsv4_jax.training.step import initial_state, train_step

        optimizer = optimizers.AdamW() if what == "adamw" else _muon()
        network = Network(QUICKSTART.config, QUICKSTART.policy)
        tokens = random.integers(0, QUICKSTART.config.vocab_size, (4, 256)).astype(np.int32)
        batch = Batch(tokens, np.ones_like(tokens))
        held = [initial_state(initial_parameters(QUICKSTART.config, QUICKSTART.policy, 0), optimizer)]

        settings, rates = _told(optimizer, np.float32(1e-4))

        def step() -> None:
            held[0], _ = jax.block_until_ready(train_step(network, settings, held[0], batch, rates))

        return step
    lm = LanguageModel.random(bench_config(), Policy.of("float32"))
    rows, length = (1, int(what)) if kind == "prefill" else (int(what), 512)
    tokens = random.integers(0, lm.config.vocab_size, (rows, length))
    return our_prefill(lm, tokens) if kind == "prefill" else our_decode(lm, tokens, DECODE_STEPS)


def _muon() -> object:
    """Where the tree has it."""
    try:
        from dsv4_jax.training.muon import Muon
    except ModuleNotFoundError:
        from dsv4_jax.training.optimizer import Muon
    return Muon()


def _told(optimizer: Any, rate: Any) -> tuple[Any, Any]:
    """What a step is told; older trees took the optimiser and the rate themselves."""
    try:
        from dsv4_jax.training.step import Rates, StepSettings
    except ImportError:
        return optimizer, rate
    return StepSettings(optimizer), Rates(rate)


def child(tree: Path) -> None:
    """Does what it reads, one case a line, and answers each with a line of JSON: [wall, CPU] seconds."""
    import dsv4_jax

    if not Path(dsv4_jax.__file__).is_relative_to(tree):
        raise SystemExit(f"dsv4_jax comes from {dsv4_jax.__file__}, not from {tree}")
    known: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        case = line.strip()
        try:
            if case not in known:
                known.clear()  # one model at a time
                known[case] = work_of(case)
                known[case]()
            wall, cpu = time.perf_counter(), time.process_time()
            known[case]()
            answer: Any = [time.perf_counter() - wall, time.process_time() - cpu]
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print("answer " + json.dumps(answer), flush=True)


class Tree:
    """A process of one tree."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(self.root)]
        environment = os.environ | {"PYTHONPATH": str(self.root)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.root
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def measure(self, case: str) -> list[float]:
        """[wall, CPU] seconds. Raises RuntimeError with what the tree said."""
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer = json.loads(line.removeprefix("answer "))
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                return answer
        raise RuntimeError(f"the process of {self.root} ended")

    def commit(self) -> str:
        """Its short name."""
        command = ["git", "-C", str(self.root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclasses.dataclass
class Options:
    """What to compare."""

    old: Path
    """A checkout of the older commit."""
    new: Path = Path()
    cases: tuple[str, ...] = CASES
    repeats: int = 7
    out: Path = Path("experiments/results/bench_trees.json")
    """Also names the table (`.md`)."""


def row_of(case: str, pairs: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Medians of one case.

    Args:
        case: its name.
        pairs: ([wall, CPU] seconds of the old tree, of the new one) of each repeat.
    """
    row: dict[str, Any] = {"case": case, "pairs": pairs}
    for index, kind in enumerate(("wall", "cpu")):
        ratios = sorted(old[index] / new[index] for old, new in pairs)
        seconds = [statistics.median(pair[side][index] for pair in pairs) for side in (0, 1)]
        row[kind] = {"ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]], "seconds": seconds}
    return row


def markdown(record: dict[str, Any]) -> str:
    """The table so far."""
    from experiments.study_record import table

    rows = []
    for row in record["rows"]:
        if "error" in row:
            rows.append([row["case"], row["error"], "", "", ""])
            continue
        cells = [
            "{:.2f} ({:.2f} to {:.2f})".format(row[k]["ratio"], *row[k]["range"]) for k in ("wall", "cpu")
        ]
        times = [" / ".join(f"{1e3 * one:.0f}" for one in row[k]["seconds"]) for k in ("wall", "cpu")]
        rows.append([row["case"], *cells, *times])
    head = ["case", "old / new, wall", "old / new, CPU", "wall ms, old / new", "CPU ms, old / new"]
    return (
        f"# {record['new']} against {record['old']}\n\n{record['date']}, {record['machine']}, jax "
        f"{record['jax']}, medians of {record['repeats']} repeats in turn, load average between "
        f"{min(record['load']):.1f} and {max(record['load']):.1f}\n\n{table(head, rows)}"
    )


def main(options: Options) -> None:
    """Runs every case in both trees; everything is written after each."""
    from experiments.study_record import stamp, write

    if unknown := sorted(set(options.cases) - set(CASES)):
        raise SystemExit(f"cases={unknown} must be among {', '.join(CASES)}")
    with Tree(options.old) as old, Tree(options.new) as new:
        record = stamp("bench_trees") | {"old": old.commit(), "new": new.commit(), "repeats": options.repeats}
        record |= {"load": [os.getloadavg()[0]], "rows": []}
        for case in options.cases:
            try:
                pairs = []
                for repeat in range(options.repeats):
                    order = (old, new) if repeat % 2 else (new, old)
                    taken = {tree.root: tree.measure(case) for tree in order}
                    pairs.append((taken[old.root], taken[new.root]))
                record["rows"].append(row_of(case, pairs))
            except RuntimeError as error:
                record["rows"].append({"case": case, "error": str(error)[:200]})
            record["load"].append(os.getloadavg()[0])
            write(options.out, record, markdown(record))
            print(markdown(record).splitlines()[-1], flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        import tyro

        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        main(tyro.cli(Options, description=__doc__))
