"""What XLA adds to the kernels in one decode step of V4-Flash on sixteen TPU chips. Compiled, never run.

    python -m experiments.decode_step                   # all 43 layers; about 20 minutes on two cores
    python -m experiments.decode_step --layers 11       # a stack of four repeats

One `shard_map` over one axis: batch rows with their caches, experts and the head's vocabulary are split,
everything else is whole on each chip. Tokens are gathered for the experts and the sums scattered back. The
table sums the compiler's own estimates of XLA's operations; kernels, collectives and asynchronous copies have
none. Needs libtpu (extra `test` or `tpu`).
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.config import ModelConfig, v4_flash
from dsv4_jax.inspection.native_shapes import native_shapes
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.model.linear import project_float32
from dsv4_jax.model.operations import Operation, operations
from dsv4_jax.numerics.policy import Policy
from experiments.step_operations import Cost, costs
from experiments.study_record import stamp, table, write

AXIS = "chips"
CLOCK_HZ = {"v6e": 1.75e9, "tpu7x": 2.2e9, "v5e": 1.5e9, "v5p": 1.75e9}
"""Inferred from published peak rates: no vendor publishes them."""


def spread(experts: Operation, own: int) -> Operation:
    """The experts' operation where tokens and experts are split over the axis, `own` experts a chip."""

    def function(x, gate_up, down, ids, weights, *, valid, **more):
        x, ids, weights, valid = (
            jax.lax.all_gather(a, AXIS, axis=0, tiled=True) for a in (x, ids, weights, valid)
        )
        # Foreign experts fall out of range, below or above: their pairs contribute nothing and take no rows.
        mine = ids - jax.lax.axis_index(AXIS).astype(jnp.int32) * own
        y = experts(x, gate_up, down, mine, weights, valid=valid, **more)
        return jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)

    return dataclasses.replace(experts, function=function, settings=())


def program(config: ModelConfig, topology: str, batch: int, context: int) -> Any:
    """The compiled decode step."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), (AXIS,))
    policy = Policy.of("bfloat16", kernels="pallas", cache="fp8+mxfp4")
    chosen = operations(policy)
    chosen = dataclasses.replace(
        chosen, experts=spread(chosen.experts, config.n_routed_experts // len(devices))
    )
    network = Network(config, policy, chosen)
    stored = (jnp.bfloat16, 8, policy.row_dtype, policy.cache_format, False)
    cache = jax.eval_shape(lambda: new_cache(config, batch, context, *stored))
    weights = native_shapes(config)

    def weight_spec(path, leaf):
        names = [key.key for key in path if hasattr(key, "key")]
        if "experts" in names:
            return PartitionSpec(None, AXIS)
        return PartitionSpec(AXIS) if names[0] == "head" else PartitionSpec()

    def cache_spec(leaf):
        return (
            (PartitionSpec(), PartitionSpec(AXIS))[leaf.ndim] if leaf.ndim < 2 else PartitionSpec(None, AXIS)
        )

    specs = (
        jax.tree_util.tree_map_with_path(weight_spec, weights),
        jax.tree.map(cache_spec, cache),
        PartitionSpec(AXIS),
    )

    def step(weights, cache, tokens):
        ones = jnp.ones((tokens.shape[0],), jnp.int32)
        model = network.holding(weights)
        after = model(spans.appended(tokens, cache.length, ones), cache)
        hidden = jax.lax.all_gather(model.hidden(after.streams), AXIS, axis=0, tiled=True)
        return project_float32(hidden, weights["head"]), after.cache

    out = (PartitionSpec(None, None, AXIS), specs[1])
    split = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    arguments = (weights, cache, jax.ShapeDtypeStruct((batch, 1), jnp.int32))
    placed = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        arguments,
        specs,
    )
    started = time.monotonic()
    lowered = jax.jit(split, donate_argnums=1).lower(*placed)
    lowering, started = time.monotonic() - started, time.monotonic()
    compiled = lowered.compile()
    return compiled, {"lower_s": lowering, "compile_s": time.monotonic() - started}


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
        layers: of V4-Flash, the first so many (its last layer is left out with fewer than 43).
        batch: sequences over the whole slice.
        context: capacity of the caches in tokens.
        top: operations in the table.
        out: JSON; a table goes beside it as Markdown.
        text: where to keep the compiled program.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    config = v4_flash()
    config = dataclasses.replace(
        config,
        attention_kinds=config.attention_kinds[:layers],
        router_kinds=config.router_kinds[:layers],
        num_nextn_predict_layers=0,
    )
    compiled, seconds = program(config, topology, batch, context)
    written = compiled.as_text()
    if text:
        text.write_text(written)
    clock = CLOCK_HZ[topology.split(":")[0]]
    found = costs(written)
    memory = compiled.memory_analysis()
    gib = {
        name: getattr(memory, f"{name}_size_in_bytes") / 2**30
        for name in ("argument", "output", "alias", "temp")
        if hasattr(memory, f"{name}_size_in_bytes")
    }
    total, summed = sum(cost.cycles for cost in found), by_operation(found)
    record = stamp("decode_step") | {
        "topology": topology,
        "layers": layers,
        "batch": batch,
        "context": context,
        "seconds": seconds,
        "gib_a_chip": gib,
        "xla_ms": total / clock * 1e3,
        "kernel_calls": written.count('custom_call_target="tpu_custom_call"'),
        "ms_by_operation": {name: cycles / clock * 1e3 for name, (cycles, _) in summed.items()},
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
    shown += f"({topology}, {layers} layers, {batch} sequences, {context} tokens of capacity)\n\n"
    parts = [(f"{cycles / clock * 1e3:.2f}", runs, name) for name, (cycles, runs) in summed.items()]
    shown += table(("ms a step", "runs", "operation"), parts) + "\nThe dearest of them:\n\n"
    shown += table(("ms a step", "runs", "opcode", "result", "where"), rows)
    write(out, record, f"# The decode step\n\n{shown}")
    print(shown)
    print(json.dumps({"seconds": seconds, "GiB a chip": gib}))


if __name__ == "__main__":
    tyro.cli(main)
