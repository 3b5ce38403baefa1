"""Full-size steps compiled for slices of TPUs that are not here: memory, collectives and what is held whole.

    python -m experiments.full_size_compiles --cases v6e-decode tpu7x-decode
    python -m experiments.full_size_compiles --cases v5p-train-adamw

Nothing is run or allocated: every figure is the compiler's. The steps are those that `LanguageModel` and
`train` call, with kernels, and with the weights that official checkpoints hold (FP8, FP4) for serving. A row
per case: seconds to lower and to compile, GiB a device by kind beside what it has, bytes of the results of
collectives by the axes of the mesh that they move along, and the largest arrays that are whole on every
device or are brought together. A case that does not compile is a row too, with what the compiler said. Rows
of other cases that are in the file already stay. Needs libtpu (extra `test` or `tpu`).
"""

import dataclasses
import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tyro

from dsv4_jax.config import ModelConfig, v4_flash, v4_pro
from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning.compiled import LARGE, Compiled, compiled
from dsv4_jax.planning.held import held
from dsv4_jax.planning.job import Job, Optimizer, Work
from dsv4_jax.planning.slices import parse_slice
from experiments import study_record
from pallas_kernels.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        topology: as libtpu names it.
        mesh: over its devices.
        step: which of the model's.
        batch: rows over the whole slice.
        tokens: of the cache's capacity; of a row, where it trains.
        model: whose sizes.
        optimizer: where it trains.
    """

    topology: str
    mesh: str
    step: Work
    batch: int
    tokens: int
    model: str = "flash"
    optimizer: Optimizer = "adamw"


CHUNK = 2048
"""Tokens of a row in a step of prefill."""

CASES = {
    "v6e-decode": Case("v6e:4x8", "expert=16,tensor=2", "decode", 64, 2**16),
    "v6e-decode-1M": Case("v6e:4x8", "expert=8,tensor=4", "decode", 8, 2**20),
    "tpu7x-decode": Case("tpu7x:2x2x2", "expert=8,tensor=2", "decode", 64, 2**16),
    "tpu7x-decode-1M": Case("tpu7x:2x2x2", "expert=8,tensor=2", "decode", 8, 2**20),
    "v6e-prefill": Case("v6e:4x8", "expert=16,tensor=2", "prefill", 16, 2**16),
    "tpu7x-pro-decode": Case("tpu7x:4x4x4", "expert=64,tensor=2", "decode", 128, 2**16, "pro"),
    "v5p-train-adamw": Case("v5p:8x8x4", "fsdp=8,expert=32", "train", 256, 4096),
    "v5p-train-muon": Case("v5p:8x8x4", "fsdp=8,expert=32", "train", 256, 4096, optimizer="muon"),
}


@dataclasses.dataclass
class Options:
    """What to compile."""

    cases: tuple[str, ...] = tuple(CASES)
    layers: int | None = None
    """The first so many of the model, to try the program out; None: all of them."""
    text: Path | None = None
    """A folder for the compiled programs' texts."""
    out: Path = Path("experiments/results/full_size_compiles.json")
    """Also names the table (`.md`)."""


def job_of(case: Case, layers: int | None = None) -> Job:
    """The job of a case, of the model's first so many layers.

    Raises:
        ProblemsError: for a slice that there is not.
    """
    config: ModelConfig = {"flash": v4_flash, "pro": v4_pro}[case.model]()
    if layers is not None:
        kinds = config.attention_kinds[:layers], config.router_kinds[:layers]
        config = dataclasses.replace(config, attention_kinds=kinds[0], router_kinds=kinds[1])
    place, problems = parse_slice(case.topology)
    if place is None:
        raise ProblemsError(f"no slice {case.topology}", problems)
    how = {"chunk": CHUNK, "optimizer": case.optimizer}
    return Job(config, place, case.step, case.batch, case.tokens, case.mesh, **how)


def row_of(name: str, options: Options) -> dict[str, Any]:
    """The row of one case; where something fails, with what was said."""
    case = CASES[name]
    row: dict[str, Any] = {"case": name, **dataclasses.asdict(case), "layers": options.layers}
    text: list[str] = []
    try:
        found = compiled(job_of(case, options.layers), text)
    except ProblemsError as refused:
        return row | {"failed": str(refused)[:3000]}
    if options.text is not None:
        (options.text / f"{name}.txt").write_text(text[0])
    return row | measured(found)


def measured(found: Compiled) -> dict[str, Any]:
    """The columns of a step that compiled."""
    of_kinds = {name.replace("optimizer", "moments"): size for name, size in found.arguments.items()}
    of_kinds |= {
        "temporaries": found.temporary_bytes,
        "peak": found.peak_bytes,
        "arguments": found.argument_bytes,
    }
    return {
        "lower_s": found.lower_seconds,
        "compile_s": found.compile_seconds,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gib": {name: size / 2**30 for name, size in of_kinds.items()},
        "whole": [{"name": name, "bytes": size} for name, size in found.whole.items()],
        "kernel_calls": found.kernel_calls,
        "xla_ms": None if found.xla_seconds is None else 1e3 * found.xla_seconds,
        "moved": {
            f"{opcode} over {axes}": {"mib": size / 2**20, "runs": runs}
            for (opcode, axes), (size, runs) in found.moved_by_kind.items()
        },
        "largest": [
            {
                "mib": each.num_bytes / 2**20,
                "runs": each.runs,
                "opcode": each.opcode,
                "axes": each.axes,
                "shape": each.shape[:120],
                "scope": each.scope[-120:],
            }
            for each in sorted(found.moved, key=lambda each: -each.num_bytes)[:8]
        ],
    }


def by_formula(row: dict[str, Any]) -> dict[str, float]:
    """GiB of a device by the formulas of `dsv4 plan`, as they are now."""
    parts = dataclasses.asdict(held(job_of(CASES[row["case"]], row["layers"])))
    return {name: size / 2**30 for name, size in parts.items() if size}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table of all cases, and what each moves and holds."""
    head = ("case", "slice", "mesh", "rows x tokens", "lower s", "compile s", "GiB a device, compiled")
    head += ("GiB, by formula", "it has")
    lines, parts = [], []
    for row in rows:
        shown = f"{row['batch']} x {row['tokens']:,}"
        begin = [row["case"], row["topology"], row["mesh"], shown, f"{row.get('lower_s', 0):.0f}"]
        has = f"{CHIPS[row['topology'].split(':')[0]].hbm_bytes / 2**30:.2f}"
        formula = ", ".join(f"{kind} {value:.2f}" for kind, value in by_formula(row).items())
        if "failed" in row:
            lines.append([*begin, row.get("ended", "does not compile"), "", formula, has])
            parts.append(f"## {row['case']}\n\n`{row['command']}`\n\n```\n{row['failed'][:1500]}\n```\n")
            continue
        gib = ", ".join(f"{kind} {value:.2f}" for kind, value in row["gib"].items())
        lines.append([*begin, f"{row['compile_s']:.0f}", gib, formula, has])
        whole = ", ".join(f"`{each['name']}` {each['bytes'] / 2**20:.0f} MiB" for each in row["whole"])
        sums = [(name, f"{of['mib']:,.1f}", of["runs"]) for name, of in row["moved"].items()]
        largest = [
            (f"{of['mib']:,.2f}", of["runs"], of["opcode"], of["axes"], f"`{of['shape'][:60]}`")
            for of in row["largest"]
        ]
        parts.append(
            f"## {row['case']}\n\n`{row['command']}`, {row['date']}\n\n"
            f"Held whole by every device, from {LARGE / 2**20:.0f} MiB: {whole or 'nothing'}. Results of "
            "collectives on one device, a step:\n\n"
            + study_record.table(("collective", "MiB", "runs"), sums)
            + "\nThe largest:\n\n"
            + study_record.table(("MiB", "runs", "collective", "axes", "result"), largest)
        )
    intro = "# Full-size steps, compiled and not run\n\nFigures of the compiler; serving with FP8 and FP4 "
    intro += (
        "weights and an fp8+mxfp4 cache, training with float32 masters and remat by unit. Formulas are those "
    )
    intro += "of `dsv4 plan`.\n\n"
    return intro + study_record.table(head, lines) + "\n" + "\n".join(parts)


def main(options: Options) -> None:
    """Compiles the cases, one after the other, and writes after each."""
    stamp = study_record.stamp("full_size_compiles")
    for name in options.cases:
        row = row_of(name, options) | stamp
        rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        rows = [old for old in rows if old["case"] != name] + [row]
        rows.sort(key=lambda each: list(CASES).index(each["case"]))
        study_record.write(options.out, {"rows": rows}, markdown(rows))
        print(json.dumps({k: v for k, v in row.items() if k not in ("largest", "moved")}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
