"""What a decode step of V4-Flash with 64 streams should take on v6e, part by part, beside each part's floor.

    python -m experiments.decode_prediction             # seconds; reads the records named below

A prediction and no measurement: static cycles of kernels (`results/tpu_cycles.json`, one device, scaled to a
device's share of rows or weights), XLA's own operations and the collectives of a compiled step
(`results/decode_step.json`, v6e 4x4), and weights, caches and links at published rates (`dsv4 plan`). All of
it one after the other: nothing is assumed to overlap. A part's floor is the time of its bytes at the
published rate.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from dsv4_jax.config import v4_flash
from dsv4_jax.planning.demand import hit_share
from dsv4_jax.planning.held import parts_of
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.slices import parse_slice
from experiments.study_record import stamp, table, write
from sharding.dispatch_cost import LINKS

STREAMS, CONTEXT, TARGET_MS = 64, 65536, 9.0
PLACES = (("v6e:4x4", "expert=8,tensor=2"), ("v6e:4x8", "expert=8,tensor=4"))
RESULTS = Path("experiments/results")
ATTENTION = {
    "window": "decode_attention window decode 64 at 64K, FP8",
    "hca": "decode_attention HCA decode 64 at 64K, FP8",
    "csa": "decode_attention CSA decode 64 at 64K, FP8",
}
STREAMS_OF_A_LAYER = ("hyper_connection pre 64", "hyper_connection post_pre 64", "hyper_connection post 64")
COLLECTIVE_SECONDS = (1e-6, 1e-5)
"""Of one collective beside its bytes, at best and at worst: assumptions, as in `planning/step_time.py`."""


class Part(NamedTuple):
    """Of a step, in milliseconds: expected, its floor, and how it was found."""

    name: str
    expected: float
    floor: float
    how: str


def job_on(name: str, mesh: str) -> Job:
    """Decode of 64 streams at 64K on a slice."""
    place, problems = parse_slice(name)
    if place is None:
        raise SystemExit(problems[0])
    return Job(v4_flash(), place, "decode", STREAMS, CONTEXT, mesh)


def kernels(job: Job, cycles: dict[str, dict[str, Any]]) -> list[Part]:
    """What Pallas kernels take: cases of one device, scaled to a device's rows or weights.

    Args:
        job: whose step.
        cycles: case -> its row for the job's chip in `tpu_cycles.json`.
    """
    kinds, devices = job.model.attention_kinds, job.slice.devices
    rows = job.rows_a_device / STREAMS

    def scaled(name: str, case: str, share: float) -> Part:
        one = cycles[case]
        return Part(
            name, share * one["bound_us"] / 1e3, share * one["hbm_us"] / 1e3, f"`{case}` x {share:.3g}"
        )

    experts = scaled("experts", "experts whole mxfp4 64", len(kinds) / devices)
    found = [experts]
    rate = job.slice.chip.hbm_bytes_per_second
    dense = [
        part for part in parts_of(job) if part.parameter.row.quantized and part.parameter.role != "expert"
    ]
    read = 1e3 * sum(part.num_bytes for part in dense) / rate
    found.append(
        Part("FP8 products", read, read, "bytes of the weights; the cases of 64 rows are at that bound")
    )
    for kind, case in ATTENTION.items():
        found.append(scaled(f"attention, {kind}", case, rows * kinds.count(kind)))
    found.append(scaled("indexer", "indexer select decode 64 at 64K", rows * kinds.count("csa")))
    found.append(scaled("compressors", "compressor CSA 64", rows * len(kinds)))
    each = [cycles[case] for case in STREAMS_OF_A_LAYER]
    times = [len(kinds) * sum(one[name] for one in each) / 1e3 for name in ("bound_us", "hbm_us")]
    found.append(Part("residual streams", times[0], times[1], "cases of 64 rows, not scaled: an upper bound"))
    return found


def links(job: Job, step: dict[str, Any]) -> list[Part]:
    """What collectives take, by kind: bytes of results over all links, and the latency of each."""
    rate, sums = LINKS[job.slice.kind].bytes_per_second, {}
    for each in step["collectives"]:
        num_bytes, runs = sums.get(each["opcode"].removesuffix("-start"), (0, 0))
        sums[each["opcode"].removesuffix("-start")] = (
            num_bytes + each["bytes"] * each["runs"],
            runs + each["runs"],
        )
    found = []
    for opcode, (num_bytes, runs) in sorted(sums.items(), key=lambda item: -item[1][0]):
        twice = 2 if opcode == "all-reduce" else 1
        floor = 1e3 * twice * num_bytes / rate
        least = floor + 1e3 * runs * COLLECTIVE_SECONDS[0]
        worst = floor + 1e3 * runs * COLLECTIVE_SECONDS[1]
        how = f"{num_bytes / 2**20:.1f} MiB in {runs} collectives, 1 us each (at 10 us: {worst:.2f} ms)"
        found.append(Part(f"{opcode}", least, floor, how))
    return found


def plain_floor(job: Job) -> float:
    """Milliseconds of reading what XLA's own products read: compressors, routers, mixing, head."""
    plain = [part for part in parts_of(job) if not part.parameter.row.quantized]
    read = sum(part.num_bytes for part in plain if part.parameter.role not in ("embedding", "table"))
    return 1e3 * read / job.slice.chip.hbm_bytes_per_second


def parts(job: Job, cycles: dict[str, dict[str, Any]], step: dict[str, Any]) -> list[Part]:
    """All parts of a step."""
    own = step["topology"] == str(job.slice)
    how = "the compiler's estimate" + ("" if own else f" for {step['topology']}, taken over: an assumption")
    xla = Part("XLA's own operations", step["xla_ms"], plain_floor(job), how)
    return [*kernels(job, cycles), xla, *links(job, step)]


def main(out: Path = RESULTS / "decode_prediction.json") -> None:
    """Predicts for each slice.

    Args:
        out: where to write the record; the table lies beside it.
    """
    step = json.loads((RESULTS / "decode_step.json").read_text())
    rows = json.loads((RESULTS / "tpu_cycles.json").read_text())["rows"]
    cycles = {row["case"]: row for row in rows if row["chip"] == "v6e"}
    record: dict[str, Any] = stamp("decode_prediction") | {"target_ms": TARGET_MS, "slices": []}
    text = f"# A decode step of V4-Flash, {STREAMS} streams at {CONTEXT:,} tokens, predicted\n\n"
    text += (
        "Nothing ran on a chip. Kernels by static cycles, XLA by its compiler's estimate, bytes at published "
    )
    text += f"rates, one after the other. Target: under {TARGET_MS:g} ms.\n\n"
    for name, mesh in PLACES:
        job = job_on(name, mesh)
        found = parts(job, cycles, step)
        expected, floor = (sum(getattr(part, of) for part in found) for of in ("expected", "floor"))
        above = sorted(found, key=lambda part: part.floor - part.expected)[:3]
        hit = next(hit_share(job, part) for part in parts_of(job) if part.parameter.role == "expert")
        record["slices"].append(
            {"slice": name, "mesh": mesh, "expected_ms": expected, "floor_ms": floor, "experts_hit": hit}
            | {"parts": [part._asdict() for part in found]}
        )
        lines = [(p.name, f"{p.expected:.2f}", f"{p.floor:.2f}", p.how) for p in found]
        lines.append(("**together**", f"**{expected:.2f}**", f"**{floor:.2f}**", f"target {TARGET_MS:g}"))
        most = "; ".join(f"{p.name} {p.expected - p.floor:.2f} ms" for p in above)
        text += f"## {name}, {mesh}\n\n{table(('part', 'expected, ms', 'floor, ms', 'from'), lines)}\n"
        text += f"Most above its floor: {most}.\n\n"
        print(f"{name} {mesh}: {expected:.2f} ms, floor {floor:.2f}; most above its floor: {most}")
    write(out, record, text)


if __name__ == "__main__":
    tyro.cli(main)
