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
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding

from dsv4_jax.config import ModelConfig, v4_flash
from dsv4_jax.inspection.native_shapes import native_shapes
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.model.operations import operations
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from experiments.step_operations import Cost, collectives, costs, result_bytes
from experiments.study_record import stamp, table, write
from pallas_kernels.formats.weights import is_quantized
from sharding.activations import Placement
from sharding.mesh import mesh_of
from sharding.rules import DECODE, RuleTable

CLOCK_HZ = {"v6e": 1.75e9, "tpu7x": 2.2e9, "v5e": 1.5e9, "v5p": 1.75e9}
"""Inferred from published peak rates: no vendor publishes them."""


def shapes(
    config: ModelConfig, topology: str, spelling: str, batch: int, context: int, table: RuleTable = DECODE
) -> tuple[Any, ...]:
    """The network on a mesh of described chips, and shapes of its weights, cache and tokens, placed there."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    placement = Placement(mesh_of(spelling, devices), table)
    policy = Policy.of("bfloat16", kernels="pallas", cache="fp8+mxfp4")
    chosen = operations(policy, placement=placement)
    network = Network(config, policy, chosen)
    stored = (jnp.bfloat16, 8, policy.row_dtype, policy.cache_format, chosen.cache_of_bits)
    cache = jax.eval_shape(lambda: new_cache(config, batch, context, *stored))
    weights, rules = native_shapes(config), placement.table.parameters
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_quantized)
    blocks = {keys_of(path): leaf.blocks.block for path, leaf in leaves if is_quantized(leaf)}
    shardings = parameter_shardings(config, placement.mesh, rules, "the model", blocks)

    def held(leaf, sharding):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), leaf)

    def rows(leaf, dims):
        return held(leaf, NamedSharding(placement.mesh, placement.spec(dims, leaf.shape)))

    return (
        network,
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: held(leaf, shardings[keys_of(path)]), weights, is_leaf=is_quantized
        ),
        jax.tree.map(lambda leaf: rows(leaf, "B" if leaf.ndim == 1 else "R B"), cache),
        rows(jax.ShapeDtypeStruct((batch, 1), jnp.int32), "B"),
    )


def program(config: ModelConfig, topology: str, spelling: str, batch: int, context: int) -> Any:
    """The compiled decode step on a mesh of described chips, and its seconds."""
    network, *arguments = shapes(config, topology, spelling, batch, context)

    def step(weights, cache, tokens):
        ones = jnp.ones((tokens.shape[0],), jnp.int32)
        model = network.holding(weights)
        after = model(spans.appended(tokens, cache.length, ones), cache)
        return model.logits(model.hidden(after.streams)), after.cache

    started = time.monotonic()
    lowered = jax.jit(step, donate_argnums=1).lower(*arguments)
    lowering, started = time.monotonic() - started, time.monotonic()
    compiled = lowered.compile()
    return compiled, {"lower_s": lowering, "compile_s": time.monotonic() - started}


def keys_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path of `jax.tree_util` as one of the parameter table."""
    return tuple(key.key for key in path)


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
    compiled, seconds = program(config, topology, mesh, batch, context)
    written = compiled.as_text()
    if text:
        text.write_text(written)
    clock = CLOCK_HZ[topology.split(":")[0]]
    found, moved = costs(written), collectives(written)
    memory = compiled.memory_analysis()
    gib = {
        name: getattr(memory, f"{name}_size_in_bytes") / 2**30
        for name in ("argument", "output", "alias", "temp")
        if hasattr(memory, f"{name}_size_in_bytes")
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
        "kernel_calls": written.count('custom_call_target="tpu_custom_call"'),
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
