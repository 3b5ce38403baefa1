"""Do the formulas of `dsv4 plan` hold what the TPU compiler holds? Steps at full width, few layers, compiled.

    python -m experiments.plan_check                    # an hour on two shared cores
    python -m experiments.plan_check --cases train-adamw

A case is four units of V4-Flash, repeats of one (a CSA and an HCA layer), on a slice
that is not here; nothing runs. Arguments (weights, optimizer, cache and state: what formulas can know) must
be within 3 % of the compiler's, padding included. Temporaries stand beside their estimate; in training the
compiler counts gradients among them. Rows of full-size steps are taken from
`results/full_size_compiles.json`. Rows of other cases that are in the file already stay.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tyro

from dsv4_jax.config import ModelConfig, v4_flash
from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning.compiled import compiled
from dsv4_jax.planning.held import held
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.slices import parse_slice
from experiments import full_size_compiles, study_record

TOLERANCE = 0.03
UNITS = 4

CASES: dict[str, dict[str, Any]] = {
    "train-adamw": {"at": "v5p:4x4x4 fsdp=8,expert=8", "work": "train", "batch": 64, "context": 4096}
    | {"optimizer": "adamw"},
    "prefill": {"at": "v6e:4x4 expert=8,tensor=2", "work": "prefill", "batch": 8, "context": 65536},
    "train-muon": {"at": "v6e:4x4 fsdp=4,expert=4", "work": "train", "batch": 16, "context": 4096},
    "decode-bf16": {"at": "v6e:2x4 expert=8", "work": "decode", "batch": 16, "context": 65536}
    | {"cache": "plain", "weights": "bfloat16"},
    "decode-data": {"at": "v6e:2x4 data=2,expert=4", "work": "decode", "batch": 64, "context": 16384}
    | {"cache": "fp8+fp8"},
    "decode-tensor": {"at": "tpu7x:2x2x1 tensor=8", "work": "decode", "batch": 8, "context": 131072},
    "decode-v5e": {"at": "v5e:4x4 expert=8,tensor=2", "work": "decode", "batch": 64, "context": 65536},
    "decode-1M": {"at": "v5p:2x2x2 expert=8", "work": "decode", "batch": 8, "context": 2**20},
}


def config() -> ModelConfig:
    """Full width, few layers, no draft head."""
    kinds = ("csa", "hca") * UNITS
    few = {"attention_kinds": kinds, "router_kinds": ("learned",) * len(kinds)}
    return dataclasses.replace(v4_flash(), num_nextn_predict_layers=0, **few)


def job_of(name: str) -> Job:
    """The job of a case."""
    how = dict(CASES[name])
    slice_name, mesh = how.pop("at").split()
    place, problems = parse_slice(slice_name)
    if place is None:
        raise ProblemsError(f"no slice {slice_name}", problems)
    return Job(config(), place, mesh=mesh, **how)


def row_of(name: str, text: Path | None = None) -> dict[str, Any]:
    """One case: bytes by formula and by the compiler; where it refuses, what it said."""
    job, texts = job_of(name), []
    row: dict[str, Any] = {"case": name, "slice": str(job.slice), "mesh": job.mesh, "work": job.work}
    row["formula"] = by_formula(job)
    try:
        found = compiled(job, texts)
    except ProblemsError as refused:
        return row | {"failed": str(refused)[:2000]}
    if text is not None:
        (text / f"{name}.txt").write_text(texts[0])
    temporaries = found.temporary_bytes + found.output_bytes - found.alias_bytes
    row["compiler"] = {"arguments": found.argument_bytes, "temporaries": temporaries}
    return row | {"seconds": found.compile_seconds, "moved": found.moved_by_axes, "whole": found.whole}


def by_formula(job: Job) -> dict[str, int]:
    """Bytes: arguments, and temporaries with gradients."""
    parts = held(job)
    dropped = parts.temporaries + parts.gradients
    return {"arguments": parts.total - dropped, "temporaries": dropped}


def full_size(path: Path) -> list[dict[str, Any]]:
    """Rows of whole models that were compiled."""
    found = []
    for row in json.loads(path.read_text())["rows"]:
        if "failed" in row:
            continue
        gib = row["gib"]
        arguments = gib["arguments"] if "arguments" in gib else gib["peak"] - gib["temporaries"]
        job = full_size_compiles.job_of(full_size_compiles.CASES[row["case"]], row["layers"])
        sizes = {"arguments": round(arguments * 2**30), "temporaries": round(gib["temporaries"] * 2**30)}
        named = {"case": f"{row['case']}, whole model", "slice": row["topology"], "mesh": row["mesh"]}
        found.append(named | {"work": row["step"], "formula": by_formula(job), "compiler": sizes})
    return found


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """The table."""
    lines = []
    for row in rows:
        begin = [row["case"], row["slice"], row["mesh"], row["work"]]
        said = {name: f"{size / 2**30:.3f}" for name, size in row["formula"].items()}
        if "failed" in row:
            lines.append([*begin, said["arguments"], "refused", "", said["temporaries"], row["failed"][:200]])
            continue
        seen = {name: f"{size / 2**30:.3f}" for name, size in row["compiler"].items()}
        off = row["formula"]["arguments"] / row["compiler"]["arguments"] - 1
        within = f"{100 * off:+.2f} %" + ("" if abs(off) <= TOLERANCE else ": outside")
        arguments = [said["arguments"], seen["arguments"], within]
        lines.append([*begin, *arguments, said["temporaries"], seen["temporaries"]])
    head = ("case", "slice", "mesh", "work", "arguments, GiB, formula", "compiler", "formula is off by")
    head += ("temporaries, formula", "compiler")
    return (
        f"# Formulas against the compiler's memory\n\n`{command}`. Of one device. Arguments must agree "
        f"within {100 * TOLERANCE:g} %; gradients count as temporaries, which are an estimate.\n\n"
        f"{study_record.table(head, lines)}"
    )


def main(
    cases: tuple[str, ...] = tuple(CASES),
    out: Path = Path("experiments/results/plan_check.json"),
    whole: Path = Path("experiments/results/full_size_compiles.json"),
    text: Path | None = None,
) -> None:
    """Compiles the cases, one after the other, and writes after each.

    Args:
        cases: to compile; none: only write the table again, with the formulas as they are now.
        out: where to write the record; the table lies beside it.
        whole: record of full-size steps.
        text: a folder for the compiled programs' texts.
    """
    record = json.loads(out.read_text()) if out.exists() else study_record.stamp("plan_check") | {"rows": []}
    for name in cases or (None,):
        own = [row for row in record["rows"] if row["case"] in CASES and row["case"] != name]
        if name is not None:
            own.append(row_of(name, text))
        for row in own:
            row["formula"] = by_formula(job_of(row["case"]))
        own.sort(key=lambda row: list(CASES).index(row["case"]))
        record["rows"] = own + (full_size(whole) if whole.exists() else [])
        study_record.write(out, record, markdown(record["rows"], record["command"]))
        print(json.dumps(own[-1] if name is None else [r for r in own if r["case"] == name][0]), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
