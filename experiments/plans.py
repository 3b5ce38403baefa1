"""Plans of V4-Flash and V4-Pro on TPU slices, and predicted beside published decode steps. By formula only.

    python -m experiments.plans                         # about a minute, no device

Nothing here is measured by this project. For each model, work and kind of chip the table has the two smallest
rented slices that hold the job, each with its best mesh by the middle of the range of the step.
"""

from pathlib import Path
from typing import Any

import tyro

from dsv4_jax.config import v4_flash
from dsv4_jax.inspection.costs import PRESETS
from dsv4_jax.planning.job import Job, Work
from dsv4_jax.planning.plan import BASIS, Plan, plan
from dsv4_jax.planning.search import best
from dsv4_jax.planning.slices import RENTED, parse_slice, rented_slices
from experiments.study_record import stamp, table, write

JOBS: dict[Work, tuple[int, int]] = {"decode": (64, 65536), "prefill": (64, 65536), "train": (256, 4096)}
"""Rows over the slice, and tokens of a row."""

MOST_CHIPS = 512
SLICES = 2
"""Of each kind of chip that hold a job, from the smallest."""

PUBLISHED = (
    ("v6e:4x4", 1, 27.7),
    ("v6e:4x4", 64, 28.8),
    ("v6e:4x4", 512, 50.2),
    ("tpu7x:2x2x1", 1, 7.61),
    ("tpu7x:2x2x1", 64, 34.3),
)
"""Slice, streams, and milliseconds of a decode step of V4-Flash, published of another engine."""

ASSUMED_CONTEXT = 4096
"""Tokens of a stream of the published steps, an assumption."""

CAVEAT = (
    "The published steps are of another engine, with its own mesh, kernels and number formats; contexts of "
    f"{ASSUMED_CONTEXT} tokens, and the mesh, are assumed here. They calibrate nothing: no share was fitted."
)


def fitting(model: str, work: Work, kind: str) -> list[Plan]:
    """Best plans on the smallest slices of a kind of chip that hold the job of a kind of work."""
    found: list[Plan] = []
    batch, context = JOBS[work]
    for place in rented_slices(kind, MOST_CHIPS):
        job = Job(PRESETS[model](), place, work, batch, context, "data=1")
        if made := best(job, (job.cache,)):
            found.append(made)
        if len(found) == SLICES:
            break
    return found


def calibration() -> list[dict[str, Any]]:
    """Published steps beside plans of them: with whole experts, and with the best mesh."""
    rows = []
    for name, streams, published in PUBLISHED:
        place = parse_slice(name)[0]
        assert place is not None
        job = Job(v4_flash(), place, "decode", streams, ASSUMED_CONTEXT, f"expert={place.devices}")
        made, other = plan(job), best(job, (job.cache,))
        assert other is not None
        row: dict[str, Any] = {
            "slice": name,
            "chips": place.chips,
            "streams": streams,
            "published_ms": published,
        }
        for label, each in (("whole experts", made), ("best mesh", other)):
            low, high = 1e3 * each.time.shortest, 1e3 * each.time.longest
            row[label] = {
                "mesh": each.job.mesh, "step_ms": [low, high], "within": low <= published <= high
            }  # fmt: skip
        rows.append(row)
    return rows


def main(out: Path = Path("experiments/results/plans.json")) -> None:
    """Plans, and writes what was found.

    Args:
        out: where to write the record; the table lies beside it.
    """
    record: dict[str, Any] = stamp("plans") | {"basis": BASIS, "caveat": CAVEAT, "plans": [], "none": []}
    lines = []
    for model in PRESETS:
        for work in JOBS:
            for kind in RENTED:
                found = fitting(model, work, kind)
                if not found:
                    record["none"].append({"model": model, "work": work, "kind": kind})
                    lines.append((model, work, f"none of {kind} to {MOST_CHIPS} chips", *[""] * 7))
                for each in found:
                    record["plans"].append({"model": model} | each.to_json())
                    lines.append((model, work, *_cells(each)))
    record["calibration"] = calibration()
    write(out, record, _markdown(record, lines))


def _cells(each: Plan) -> tuple[str, ...]:
    low, high = 1e3 * each.time.shortest, 1e3 * each.time.longest
    slow, fast = each.tokens_a_second_a_chip
    mfu = [100 * share for share in each.model_flops_share]
    return (
        str(each.job.slice), each.job.mesh,
        f"{each.held.total / 2**30:.1f} of {each.limit / 2**30:.1f}",
        f"{low:.1f} to {high:.1f}", f"{slow:.0f} to {fast:.0f}", f"{mfu[0]:.1f} to {mfu[1]:.1f}",
        each.time.bound, str(each.largest_batch),
    )  # fmt: skip


def _markdown(record: dict[str, Any], lines: list[tuple[str, ...]]) -> str:
    header = ("model", "work", "slice", "mesh", "GiB a device", "step, ms", "tokens/s a chip", "MFU, %")
    header += ("highest floor", "largest batch")
    jobs = "; ".join(f"{work} {rows} rows of {tokens} tokens" for work, (rows, tokens) in JOBS.items())
    compared = []
    for row in record["calibration"]:
        cells = [row["slice"], row["streams"], row["published_ms"]]
        for label in ("whole experts", "best mesh"):
            low, high = row[label]["step_ms"]
            inside = "inside" if row[label]["within"] else "outside"
            cells.append(f"{low:.1f} to {high:.1f} ({row[label]['mesh']}): {inside}")
        compared.append(cells)
    columns = ("slice", "streams", "published, ms", "planned, whole experts", "planned, best mesh")
    return (
        f"# Plans of TPU slices\n\n`{record['command']}`, {record['date']}\n\n{BASIS}\n\n"
        f"Jobs: {jobs}; prefill appends 2048 tokens a row and step; caches fp8+mxfp4, "
        "weights as released.\n\n"
        f"{table(header, lines)}\n## Published decode steps of V4-Flash\n\n{CAVEAT}\n\n"
        f"{table(columns, compared)}"
    )


if __name__ == "__main__":
    tyro.cli(main)
