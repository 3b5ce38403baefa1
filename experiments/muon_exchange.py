"""What Muon's exchange costs a device at full size, as the compiler plans it. Nothing is run or allocated.

    python -m experiments.muon_exchange                  # V4-Flash on 256 described TPU v5p: minutes
    python -m experiments.muon_exchange --layers 4 --slice v5e:2x2 --mesh fsdp=4

The program is the update alone: clip-free Muon with bfloat16 iterations, float32 masters, momentum and
gradients, split as the training rules say. Listed are the memory of one device and every collective of the
compiled program with what a device sends. Needs libtpu (extra `test` or `tpu`).
"""

import dataclasses
import math
import os
import re
import time
from pathlib import Path
from typing import Any

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.config import ModelConfig, tiny, v4_flash
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import apply_updates, split_trainable
from experiments import study_record
from sharding.activations import Placement
from sharding.mesh import AXES, parse
from sharding.rules import TRAIN

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
MEMORY = {
    "masters, momentum, gradients": "argument_size_in_bytes",
    "temporaries": "temp_size_in_bytes",
    "peak": "peak_memory_in_bytes",
}


@dataclasses.dataclass
class Options:
    """What to compile."""

    mesh: str = "fsdp=32,expert=8"
    slice: str = "v5p:8x8x4"
    """A topology that libtpu knows, with as many devices as the mesh."""
    layers: int | None = None
    """None: V4-Flash. A number: a tiny model of so many layers, to try the program out."""
    out: Path = Path("experiments/results/muon_exchange.json")
    """Also names the table (`.md`)."""


def compiled_update(config: ModelConfig, mesh: Mesh) -> Any:
    """The compiled program (masters, state, gradients, rate) -> (masters, state) on these devices."""
    placed = parameter_shardings(config, mesh, TRAIN.parameters, "a study")
    trained, _ = split_trainable(Network(config, Policy.of("bfloat16")).shapes())
    transform = Muon(compute_dtype="bfloat16", max_grad_norm=None).transform(Placement(mesh, TRAIN))

    def array(path: tuple, leaf: jax.ShapeDtypeStruct, dtype: np.dtype) -> jax.ShapeDtypeStruct:
        keys = tuple(key.key for key in path if hasattr(key, "key"))
        # The optimizer's state has the paths of the parameters behind the name of their group.
        own = next((keys[start:] for start in (0, 1) if keys[start:] in placed), None)
        sharding = NamedSharding(mesh, PartitionSpec()) if own is None else placed[own]
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    masters = jax.tree_util.tree_map_with_path(lambda path, leaf: array(path, leaf, jnp.float32), trained)
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: array(path, leaf, leaf.dtype), jax.eval_shape(transform.init, masters)
    )

    def update(masters, state, gradients, rate):
        updates, state = transform.update(gradients, state, masters)
        return apply_updates(masters, updates, rate), state

    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return jax.jit(update, donate_argnums=(0, 1, 2)).lower(masters, state, masters, rate).compile()


def collectives(text: str) -> list[dict[str, Any]]:
    """The collectives of a program's text, in order: name, dtype, shape of what a device sends, its MiB."""
    found = []
    for dtype, dims, name in re.findall(
        rf"= \(?(\w+)\[([\d,]*)\]\S* (?:.*\s)?({'|'.join(COLLECTIVES)})(?:-start)?\(", text
    ):
        shape = [int(size) for size in dims.split(",") if size]
        num_bytes = math.prod(shape) * jnp.dtype({"f32": "float32", "bf16": "bfloat16"}[dtype]).itemsize
        found.append({"name": name, "dtype": dtype, "shape": shape, "mib": round(num_bytes / 2**20, 3)})
    return found


def markdown(record: dict[str, Any]) -> str:
    """The tables of one program."""
    options, counts = record["options"], {name: 0 for name in COLLECTIVES}
    for each in record["collectives"]:
        counts[each["name"]] += 1
    rows = [
        [each["name"], each["dtype"], " x ".join(map(str, each["shape"])), f"{each['mib']:.1f}"]
        for each in record["collectives"]
    ]
    total = sum(each["mib"] for each in record["collectives"]) / 1024
    return (
        "# Muon's exchange\n\n"
        f"{record['date']}, jax {record['jax']}, `{record['command']}`: the update alone, {options['mesh']} "
        f"on {options['slice']}, compiled in {record['seconds']:.0f} s and not run.\n\n"
        + study_record.table(["a device", "GiB"], [[k, f"{v:.2f}"] for k, v in record["gib"].items()])
        + f"\n{', '.join(f'{count} {name}' for name, count in counts.items())}; {total:.2f} GiB in all.\n\n"
        + study_record.table(["collective", "dtype", "what a device sends", "MiB"], rows)
    )


def main(options: Options) -> None:
    """Compiles and writes."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.slice).devices
    sizes = parse(options.mesh)
    mesh = Mesh(np.array(devices).reshape([sizes.get(axis, 1) for axis in AXES]), AXES)
    config = v4_flash() if options.layers is None else tiny(options.layers)
    start = time.monotonic()
    compiled = compiled_update(config, mesh)
    analysis = compiled.memory_analysis()
    record = study_record.stamp("muon_exchange")
    record |= {
        "options": {key: value for key, value in dataclasses.asdict(options).items() if key != "out"},
        "seconds": time.monotonic() - start,
        "gib": {name: getattr(analysis, field) / 2**30 for name, field in MEMORY.items()},
        "collectives": collectives(compiled.as_text()),
    }
    study_record.write(options.out, record, markdown(record))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
