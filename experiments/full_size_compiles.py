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

import collections
import dataclasses
import json
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu reads these when it is loaded; without them it looks for a cloud machine's metadata.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax.config import ModelConfig, v4_flash, v4_pro
from dsv4_jax.inference import steps
from dsv4_jax.model.initial import Network
from dsv4_jax.model.operations import operations
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.training.data import Batch
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from experiments import decode_step, study_record
from experiments.step_operations import axes_of, collectives, result_bytes
from sharding.activations import Placement
from sharding.mesh import mesh_of
from sharding.rules import DECODE, PREFILL, TRAIN, RuleTable

HBM_GIB = {"v6e": 32, "v5p": 95, "tpu7x": 96}
"""Of one JAX device; a chip of tpu7x has 192 and is two devices. The vendor's figures."""

LARGE = 32 * 2**20
"""Bytes from which an array that is whole on every device is named."""


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
    step: Literal["decode", "prefill", "train"]
    batch: int
    tokens: int
    model: Literal["flash", "pro"] = "flash"
    optimizer: Literal["adamw", "muon"] = "adamw"


CHUNK = 2048
"""Tokens of a row in a step of prefill."""

CASES = {
    "v6e-decode": Case("v6e:4x8", "expert=16,tensor=2", "decode", 64, 2**16),
    "v6e-decode-1M": Case("v6e:4x8", "expert=8,tensor=4", "decode", 8, 2**20),
    "tpu7x-decode": Case("tpu7x:2x2x2", "expert=8,tensor=2", "decode", 64, 2**16),
    "tpu7x-decode-1M": Case("tpu7x:2x2x2", "expert=8,tensor=2", "decode", 8, 2**20),
    "v6e-prefill": Case("v6e:4x8", "expert=16,tensor=2", "prefill", 16, 2**16),
    "tpu7x-pro-decode": Case("tpu7x:4x4x4", "expert=64,tensor=2", "decode", 128, 2**16, "pro"),
    "v5p-train-adamw": Case("v5p:8x8x4", "fsdp=32,expert=8", "train", 256, 4096),
    "v5p-train-muon": Case("v5p:8x8x4", "fsdp=32,expert=8", "train", 256, 4096, optimizer="muon"),
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


def config_of(case: Case, layers: int | None) -> ModelConfig:
    """The model's sizes; serving leaves the MTP block out."""
    config = v4_flash() if case.model == "flash" else v4_pro()
    if layers is not None:
        kinds = config.attention_kinds[:layers], config.router_kinds[:layers]
        config = dataclasses.replace(config, attention_kinds=kinds[0], router_kinds=kinds[1])
    return config if case.step == "train" else dataclasses.replace(config, num_nextn_predict_layers=0)


def serving(case: Case, config: ModelConfig, table: RuleTable) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """The step of serving, lowered, and its arguments by kind."""
    shapes = decode_step.shapes(config, case.topology, case.mesh, case.batch, case.tokens, table)
    network, weights, cache, tokens = shapes
    placement = network.placement

    def rows(shape: tuple[int, ...], dtype: Any, dims: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(placement.mesh, placement.spec(dims, shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    count, kinds = rows((case.batch,), jnp.int32, "B"), {"weights": weights, "cache": cache}
    if case.step == "decode":
        return steps.extend.lower(network, weights, cache, tokens, count), kinds
    chunk = rows((case.batch, CHUNK), jnp.int32, "B T")
    last = rows((case.batch, config.vocab_size), jnp.float32, "B V")
    return steps.prefill.lower(network, weights, cache, chunk, count, last), kinds


def training(case: Case, config: ModelConfig) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """The step of training with float32 masters and `remat="unit"`, lowered, and its arguments by kind."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    placement = Placement(mesh_of(case.mesh, devices), TRAIN)
    mesh = placement.mesh
    policy = Policy.of("bfloat16", remat="unit", kernels="pallas", master="float32")
    network = Network(config, policy, operations(policy, placement=placement))
    placed = parameter_shardings(config, mesh, TRAIN.parameters, "a study")
    optimizer = AdamW() if case.optimizer == "adamw" else Muon(compute_dtype="bfloat16")

    def held(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = tuple(key.key for key in path if hasattr(key, "key"))
        # Moments have the paths of their parameters, perhaps behind the name of a group.
        own = next((keys[start:] for start in (0, 1) if keys[start:] in placed), None)
        sharding = placed[own] if own is not None and leaf.ndim else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(lambda params: initial_state(params, optimizer), network.shapes())
    state = jax.tree_util.tree_map_with_path(held, state)
    row = (case.batch, case.tokens)
    rows = NamedSharding(mesh, placement.spec("B T", row))
    batch = Batch(*[jax.ShapeDtypeStruct(row, jnp.int32, sharding=rows)] * 2)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    lowered = train_step.lower(
        network, StepSettings(optimizer), state, batch, Rates(*[scalar] * len(Rates._fields))
    )
    return lowered, {"masters": (state.trained, state.fixed), "moments": state.moments}


def on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def whole_arrays(kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of LARGE bytes and more that every device holds whole, largest first."""
    found = [
        {"name": f"{kind}{jax.tree_util.keystr(path)}", "bytes": on_a_device(leaf)}
        for kind, tree in kinds.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.sharding.is_fully_replicated and on_a_device(leaf) >= LARGE
    ]
    return sorted(found, key=lambda each: -each["bytes"])


def compiled(name: str, options: Options) -> dict[str, Any]:
    """The row of one case; where something fails, with what was said."""
    case, started = CASES[name], time.monotonic()
    row: dict[str, Any] = {"case": name, **dataclasses.asdict(case), "layers": options.layers}
    config = config_of(case, options.layers)
    try:
        if case.step == "train":
            lowered, kinds = training(case, config)
        else:
            lowered, kinds = serving(case, config, DECODE if case.step == "decode" else PREFILL)
        row["lower_s"], started = time.monotonic() - started, time.monotonic()
        row["gib"] = {
            kind: sum(map(on_a_device, jax.tree.leaves(tree))) / 2**30 for kind, tree in kinds.items()
        }
        row["whole"] = whole_arrays(kinds)
        program = lowered.compile()
    except Exception as error:  # what a compiler may say has no type of its own
        return row | {"failed": f"{type(error).__name__}: {error}"[:3000], "s": time.monotonic() - started}
    row["compile_s"] = time.monotonic() - started
    row["peak_host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory, text = program.memory_analysis(), program.as_text()
    if options.text is not None:
        (options.text / f"{name}.txt").write_text(text)
    row["gib"] |= {
        "temporaries": memory.temp_size_in_bytes / 2**30,
        "peak": memory.peak_memory_in_bytes / 2**30,
    }
    return row | movement(text, case)


def movement(text: str, case: Case) -> dict[str, Any]:
    """Of a program's collectives: MiB of their results on a device by kind and axes, and the largest."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    sizes, moved = dict(mesh_of(case.mesh, devices).shape), collectives(text)
    sums: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"mib": 0.0, "runs": 0})
    for cost in moved:
        of = sums[f"{cost.instruction.opcode.removesuffix('-start')} over {axes_of(cost, sizes)}"]
        of["mib"] += cost.runs * result_bytes(cost.instruction.shape) / 2**20
        of["runs"] += cost.runs
    largest = sorted(moved, key=lambda cost: -result_bytes(cost.instruction.shape))[:8]
    return {
        "kernel_calls": text.count('custom_call_target="tpu_custom_call"'),
        "moved": dict(sorted(sums.items(), key=lambda item: -item[1]["mib"])),
        "largest": [
            {
                "mib": result_bytes(cost.instruction.shape) / 2**20,
                "runs": cost.runs,
                "opcode": cost.instruction.opcode,
                "axes": axes_of(cost, sizes),
                "shape": cost.instruction.shape[:120],
                "scope": cost.instruction.scope[-120:],
            }
            for cost in largest
        ],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table of all cases, and what each moves and holds."""
    head = ("case", "slice", "mesh", "rows x tokens", "lower s", "compile s", "GiB a device", "peak of")
    lines, parts = [], []
    for row in rows:
        shown = f"{row['batch']} x {row['tokens']:,}"
        begin = [row["case"], row["topology"], row["mesh"], shown, f"{row.get('lower_s', 0):.0f}"]
        if "failed" in row:
            lines.append([*begin, "does not compile", "", ""])
            parts.append(f"## {row['case']}\n\n`{row['command']}`\n\n```\n{row['failed'][:1500]}\n```\n")
            continue
        gib = ", ".join(f"{kind} {value:.2f}" for kind, value in row["gib"].items())
        has = HBM_GIB[row["topology"].split(":")[0]]
        lines.append([*begin, f"{row['compile_s']:.0f}", gib, f"{has}"])
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
    intro += "weights and an fp8+mxfp4 cache, training with float32 masters and remat by unit.\n\n"
    return intro + study_record.table(head, lines) + "\n" + "\n".join(parts)


def main(options: Options) -> None:
    """Compiles the cases, one after the other, and writes after each."""
    stamp = study_record.stamp("full_size_compiles")
    for name in options.cases:
        row = compiled(name, options) | stamp
        rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        rows = [old for old in rows if old["case"] != name] + [row]
        rows.sort(key=lambda each: list(CASES).index(each["case"]))
        study_record.write(options.out, {"rows": rows}, markdown(rows))
        print(json.dumps({k: v for k, v in row.items() if k not in ("largest", "moved")}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
