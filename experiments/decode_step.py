"""What XLA adds to the kernels in one decode step of V4-Flash on sixteen TPU chips. Compiled, never run.

    python -m experiments.decode_step                   # all 43 layers; about 20 minutes on two cores
    python -m experiments.decode_step --layers 11       # a stack of four repeats

The model is spread as `load(mesh=...)` spreads it, with the rules for decode. The table sums the compiler's
own estimates of XLA's operations; kernels, collectives and asynchronous copies have none, and collectives are
listed with the bytes of their results. Needs libtpu (extra `test` or `tpu`).
"""

import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tyro

from dsv4_jax.config import v4_flash
from dsv4_jax.model.operations import operations
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.planning.compiled import compiled
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.program_text import Cost, collectives, costs, result_bytes
from dsv4_jax.planning.slices import parse_slice
from experiments.study_record import stamp, table, write


def by_operation(found: list[Cost]) -> dict[str, tuple[int, int]]:
    """Operation of the model (`model/operations.py`) -> cycles and runs of what XLA makes for it.

    Copies that belong to none are the compiler's, for layouts; the rest is norms, rotations, residual streams
    and rounding.
    """
    named = {each.name for each in operations(Policy.of("bfloat16", kernels="pallas")).each()}
    sums: dict[str, tuple[int, int]] = {}
    for cost in found:
        rest = "copies" if cost.instruction.opcode == "copy" else "rest of the model"
        name = next((part for part in cost.instruction.scope.split("/") if part in named), rest)
        cycles, runs = sums.get(name, (0, 0))
        sums[name] = (cycles + cost.cycles, runs + cost.runs)
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def main(
    topology: str = "v6e:4x4",
    mesh: str = "expert=16",
    layers: int = 43,
    batch: int = 64,
    context: int = 2**16,
    top: int = 40,
    out: Path = Path("experiments/results/decode_step.json"),
    text: Path | None = None,
) -> None:
    """Compiles the step and prints its dearest operations of XLA.

    Args:
        topology: a slice the compiler knows, e.g. v6e:4x4.
        mesh: over its chips.
        layers: of V4-Flash, the first so many (its last layer is left out with fewer than 43).
        batch: sequences over the whole slice.
        context: capacity of the caches in tokens.
        top: operations in the table.
        out: JSON; a table goes beside it as Markdown.
        text: where to keep the compiled program.
    """
    config = v4_flash()
    config = dataclasses.replace(
        config,
        attention_kinds=config.attention_kinds[:layers],
        router_kinds=config.router_kinds[:layers],
        num_nextn_predict_layers=0,
    )
    place, problems = parse_slice(topology)
    if place is None:
        raise SystemExit(problems[0])
    texts: list[str] = []
    step = compiled(Job(config, place, "decode", batch, context, mesh), texts)
    seconds = {"lower_s": step.lower_seconds, "compile_s": step.compile_seconds}
    written, clock = texts[0], place.chip.clock_hz
    if text:
        text.write_text(written)
    found, moved = costs(written), collectives(written)
    gib = {
        name: getattr(step, f"{name}_bytes") / 2**30 for name in ("argument", "output", "alias", "temporary")
    }
    total, summed = sum(cost.cycles for cost in found), by_operation(found)
    record = stamp("decode_step") | {
        "topology": topology,
        "mesh": mesh,
        "layers": layers,
        "batch": batch,
        "context": context,
        "seconds": seconds,
        "gib_a_chip": gib,
        "xla_ms": total / clock * 1e3,
        "kernel_calls": step.kernel_calls,
        "ms_by_operation": {name: cycles / clock * 1e3 for name, (cycles, _) in summed.items()},
        "collectives": [
            {
                "bytes": result_bytes(cost.instruction.shape),
                "runs": cost.runs,
                "opcode": cost.instruction.opcode,
                "shape": cost.instruction.shape[:160],
                "scope": cost.instruction.scope,
            }
            for cost in moved
        ],
        "operations": [
            {
                "ms": cost.cycles / clock * 1e3,
                "runs": cost.runs,
                "opcode": cost.instruction.opcode,
                "shape": cost.instruction.shape[:160],
                "scope": cost.instruction.scope,
            }
            for cost in found[:400]
        ],
    }
    rows = [
        (
            f"{cost.cycles / clock * 1e3:.3f}",
            cost.runs,
            cost.instruction.opcode,
            f"`{cost.instruction.shape[:60]}`",
            f"`{cost.instruction.scope[-90:]}`",
        )
        for cost in found[:top]
    ]
    shown = f"XLA's own operations: {record['xla_ms']:.2f} ms a step by the compiler's estimate "
    shown += f"({topology}, {mesh}, {layers} layers, {batch} sequences, {context} tokens of capacity)\n\n"
    parts = [(f"{cycles / clock * 1e3:.2f}", runs, name) for name, (cycles, runs) in summed.items()]
    shown += table(("ms a step", "runs", "operation"), parts) + "\nThe dearest of them:\n\n"
    shown += table(("ms a step", "runs", "opcode", "result", "where"), rows)
    shown += "\nWhat is moved between chips, by the bytes of results on one chip:\n\n"
    shown += table(
        ("KiB a step", "runs", "opcode", "result", "where"),
        [
            (
                f"{cost.runs * result_bytes(cost.instruction.shape) / 1024:.0f}",
                cost.runs,
                cost.instruction.opcode,
                f"`{cost.instruction.shape[:60]}`",
                f"`{cost.instruction.scope[-90:]}`",
            )
            for cost in moved[:top]
        ],
    )
    write(out, record, f"# The decode step\n\n{shown}")
    print(shown)
    print(json.dumps({"seconds": seconds, "GiB a chip": gib}))


if __name__ == "__main__":
    tyro.cli(main)
