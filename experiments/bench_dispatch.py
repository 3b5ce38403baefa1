"""Transports of tokens to their experts: bytes by formula, and paired times on eight forced CPU devices.

    python -m experiments.bench_dispatch                     # about ten minutes on two cores
    python -m experiments.bench_dispatch --tokens 64 512 --runs 3

Eight devices of one machine share its cores and its memory, so the times say what the exchanges themselves
cost (sorting, copies, padding), and nothing of links. Sides of one row run in turn; a time is a median, and
so is a ratio, of pairs of neighbouring runs. `ragged` does not run on CPUs: its bytes are in the record.
"""

import dataclasses
import functools
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from experiments.study_record import stamp, table, write
from pallas_kernels.grouped_matmul import expert_ffn
from sharding.expert_parallel import TOKEN_AXES, ExpertParallel, Travel, over_mesh
from sharding.mesh import mesh_of

SIDES: dict[str, dict[str, Any]] = {
    "gather": {"transport": "gather"},
    "all_to_all": {"transport": "all_to_all", "shared": False},
    "all_to_all, shared rows": {"transport": "all_to_all", "shared": True},
}


@dataclasses.dataclass
class Options:
    """What to measure."""

    tokens: tuple[int, ...] = (8, 64, 512, 2048)
    """T over all devices."""
    mesh: str = "expert=8"
    experts: int = 32
    top_k: int = 6
    hidden: int = 512
    width: int = 256
    runs: int = 5
    backward: bool = True
    """Also with gradients of tokens, routing weights and experts."""
    out: Path = Path("experiments/results/bench_dispatch.json")


def routing(rng: np.random.Generator, kind: str, tokens: int, options: Options) -> jax.Array:
    """i32[T, Ke] distinct experts a token: `uniform`, or `skewed` (chosen in proportion to 1 / rank)."""
    odds = np.ones(options.experts) if kind == "uniform" else 1 / (1 + np.arange(options.experts))
    # The largest of log odds + Gumbel noise: draws without replacement.
    keys = np.log(odds) + rng.gumbel(size=(tokens, options.experts))
    return jnp.asarray(np.argsort(-keys, axis=1)[:, : options.top_k], jnp.int32)


def program(split: ExpertParallel, backward: bool, arguments: tuple[jax.Array, ...]) -> Any:
    """The compiled layer, or layer and gradients, of these arguments."""
    layer = functools.partial(split, swiglu_limit=10.0)

    def loss(x, gate_up, down, ids, weights):
        return (layer(x, gate_up, down, ids, weights) * x).sum()

    run = jax.grad(loss, (0, 1, 2, 4)) if backward else layer
    return jax.jit(run).lower(*arguments).compile()


def in_turn(runs: int, programs: dict[str, Any], arguments: tuple[jax.Array, ...]) -> dict[str, list[float]]:
    """Seconds of every run of every side: one to warm up, then A B C A B C ..."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(runs + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if number:
                taken[name].append(time.perf_counter() - start)
    return taken


def costs_of(
    split: ExpertParallel, x: jax.Array, gate_up: jax.Array, down: jax.Array, top_k: int
) -> dict[str, dict[str, Any]]:
    """The formula's table for a call, by transport; JSON has no infinity."""
    costs = [dataclasses.asdict(cost) for cost in split.costs(split.cut(gate_up, down), x, top_k)]
    return {
        cost["transport"]: cost | {"seconds": cost["seconds"] if math.isfinite(cost["seconds"]) else None}
        for cost in costs
    }


def fullest(ids: np.ndarray, num_experts: int, travel: Travel) -> float:
    """Pairs of the device with the most of them over the mean; 1 where every device has all experts."""
    devices = travel.plan.group.size if travel.plan else 1
    return float(np.bincount(ids.ravel() // (num_experts // devices)).max() / ids.size * devices)


def measure(options: Options, tokens: int, kind: str, backward: bool) -> dict[str, Any]:
    """One row: all sides on the same arguments."""
    rng = np.random.default_rng(tokens)
    mesh = mesh_of(options.mesh)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    e, d, f = options.experts, options.hidden, options.width
    x, gate_up, down = draw(tokens, d), draw(e, 2, f, d) / d**0.5, draw(e, d, f) / f**0.5
    ids, weights = routing(rng, kind, tokens, options), jnp.ones((tokens, options.top_k), jnp.float32)
    axes = {"E": "expert", "F": "tensor", "D": "fsdp"}
    splits = {name: over_mesh(expert_ffn, mesh, weight_axes=axes, **how) for name, how in SIDES.items()}
    any_split = splits["gather"]
    own = PartitionSpec(TOKEN_AXES) if tokens % mesh.size == 0 else PartitionSpec()
    specs = (own, *any_split.cut(gate_up, down).specs(layers=False), own, own)
    arguments = tuple(
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip((x, gate_up, down, ids, weights), specs, strict=True)
    )
    programs = {name: program(split, backward, arguments) for name, split in splits.items()}
    taken = in_turn(options.runs, programs, arguments)
    costs = {
        name: costs_of(split, x, gate_up, down, options.top_k)[split.transport]
        for name, split in splits.items()
    }
    return {
        "tokens": tokens,
        "routing": kind,
        "backward": backward,
        "fullest_device": fullest(np.asarray(ids), e, any_split.travel(gate_up, down, x, options.top_k)),
        "milliseconds": {name: statistics.median(times) * 1e3 for name, times in taken.items()},
        "over_gather": {
            name: statistics.median(a / b for a, b in zip(times, taken["gather"], strict=True))
            for name, times in taken.items()
        },
        "costs": costs,
        "all_costs": costs_of(any_split, x, gate_up, down, options.top_k),
        "auto": over_mesh(expert_ffn, mesh, weight_axes=axes)
        .travel(gate_up, down, x, options.top_k)
        .transport,
    }


def main(options: Options) -> None:
    """Measures every row and keeps the record up to date."""
    # Read when JAX makes its first device.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    record = stamp("bench_dispatch") | {
        "options": dataclasses.asdict(options) | {"out": str(options.out)},
        "rows": [],
    }
    shown: list[tuple[object, ...]] = []
    for tokens in options.tokens:
        for kind in ("uniform", "skewed"):
            for backward in (False, True)[: 1 + options.backward]:
                row = measure(options, tokens, kind, backward)
                record["rows"].append(row)
                ran = [f"{row['milliseconds'][name]:.2f} ({row['over_gather'][name]:.2f}x)" for name in SIDES]
                sent = [f"{row['costs'][name]['sent_bytes'] / 2**10:.0f}" for name in SIDES]
                work = "gradients" if backward else "forward"
                shown.append((tokens, kind, f"{row['fullest_device']:.2f}", work, *ran, *sent, row["auto"]))
                header = ("tokens", "routing", "fullest", "work", *(f"{n}, ms" for n in SIDES))
                header += tuple(f"{name}, KiB sent" for name in SIDES) + ("auto",)
                text = table(header, shown)
                write(options.out, record, f"# Transports of tokens, {options.mesh}\n\n{text}")
                print(text.splitlines()[-1], flush=True)
    print(table(header, shown))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
