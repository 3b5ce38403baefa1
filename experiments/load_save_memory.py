"""Host memory of loading and saving a checkpoint, beside the model itself. Measured by RSS.

    python -m experiments.load_save_memory        # makes checkpoints of 4.3 and 4.8 GB in a temporary folder

A checkpoint here has few and large parameters: the routed experts of a layer are one array of many tensors.
The rule: at its peak the process holds the loaded model and at most twice the largest tensor on disk.

Each way of loading runs in a process of its own, which first loads and saves a tiny model, so that what
libraries take once is not counted. It reads its RSS, resets the system's record of the peak
(`/proc/self/clear_refs`, Linux), loads, and reads the peak; then the same for saving. Pages of mapped files
are counted, as the system counts them. The model counts with the bytes of its arrays' buffers, each buffer
once, however many devices share it.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from dsv4_jax.checkpoint import storage
from dsv4_jax.config import ModelConfig, tiny
from experiments import study_record
from experiments.weight_memory import write_random

RESULTS = pathlib.Path(__file__).parent / "results" / "load_save_memory.json"
ALLOWED = 2
"""Largest tensors on disk that may be in memory beside the model."""

EXPERTS = 16
RELEASES = {"plain": storage.PLAIN, "native": storage.PREVIEW}
WIDTHS = {"plain": 2560, "native": 10240}
"""Hidden widths of an expert, by what makes the checkpoint 4 GB or more."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How one process loads and saves."""

    weights: str  # 'plain': a BF16 checkpoint; 'native': FP8 and FP4 on disk and in memory
    dtype: str
    devices: int  # host devices, over which the experts are split


WAYS = [
    Way(weights, dtype, devices)
    for weights in RELEASES
    for dtype in ("bfloat16", "float32")
    for devices in (1, 8)
]

CHILD = """
import json, pathlib, sys
import jax, dsv4_jax

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def peak_of(function):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS:")
    result = function()
    return result, {"before": 1024 * before, "peak": 1024 * kilobytes("VmHWM:")}

source, target, warm_up, dtype = sys.argv[1:]
where = {}
if jax.device_count() > 1:
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=auto)
    where = {"mesh": mesh, "rules": {"E": "expert"}}
dsv4_jax.load(warm_up, dtype, **where).save(pathlib.Path(target) / "tiny")
model, load = peak_of(lambda: dsv4_jax.load(source, dtype, **where))
shards = [shard.data for array in jax.tree.leaves(model.parameters) for shard in array.addressable_shards]
arrays = sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())
_, save = peak_of(lambda: model.save(pathlib.Path(target) / "saved"))
print(json.dumps({"arrays": arrays, "load": load, "save": save}))
"""


def large_config(weights: str) -> ModelConfig:
    """Four layers, one of each kind: 4.3 GB in BF16, or 4.8 GB in FP8 and FP4."""
    return tiny(
        4,
        vocab_size=1024,
        hidden_size=4096,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=WIDTHS[weights],
        num_nextn_predict_layers=0,
    )


def largest_tensor(config: ModelConfig, release: storage.Release) -> int:
    """Bytes on disk."""
    return max(tensor.num_bytes for tensor in storage.released_tensors(config, release))


def measure(folder: pathlib.Path, warm_up: pathlib.Path, way: Way) -> dict[str, Any]:
    """Bytes: of the arrays, and RSS before and at the peak of loading and of saving."""
    flags = f"--xla_force_host_platform_device_count={way.devices}"
    with tempfile.TemporaryDirectory(dir=folder.parent) as target:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), target, str(warm_up), way.dtype],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(way: Way, found: dict[str, Any], disk: int, largest: int) -> dict[str, Any]:
    """What was measured, and what each step held beside the model, in largest tensors on disk."""
    loading = found["load"]["peak"] - found["load"]["before"] - found["arrays"]
    saving = found["save"]["peak"] - found["save"]["before"]
    beside = {"load_tensors": loading / largest, "save_tensors": saving / largest}
    kept = max(beside.values()) <= ALLOWED
    return dataclasses.asdict(way) | found | {"disk": disk, "largest": largest} | beside | {"kept": kept}


def as_table(rows: list[dict[str, Any]]) -> str:
    """One line a way of loading."""
    return study_record.table(
        ["weights", "dtype", "devices", "on disk, MB", "largest tensor, MB", "model, MB",
         "load beside it, largest tensors", "save beside it, largest tensors", f"at most {ALLOWED}"],
        [
            [row["weights"], row["dtype"], row["devices"],
             *(f"{row[key] / 1e6:,.1f}" for key in ("disk", "largest", "arrays")),
             f"{row['load_tensors']:.2f}", f"{row['save_tensors']:.2f}", "yes" if row["kept"] else "NO"]
            for row in rows
        ],
    )  # fmt: skip


def study(root: pathlib.Path, configs: dict[str, ModelConfig], ways: list[Way]) -> list[dict[str, Any]]:
    """Makes the checkpoints in a folder, one at a time, and measures; prints every row."""
    rows = []
    for weights, config in configs.items():
        release = RELEASES[weights]
        folder, warm_up = root / weights, root / f"{weights} tiny"
        write_random(folder, config, release)
        small = tiny(4, n_routed_experts=config.n_routed_experts, num_nextn_predict_layers=0)
        write_random(warm_up, small, release)
        disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for way in ways:
            if way.weights == weights:
                found = measure(folder, warm_up, way)
                rows.append(row_of(way, found, disk, largest_tensor(config, release)))
                print(as_table(rows[-1:]).splitlines()[-1], flush=True)
        for path in folder.iterdir():  # room for the next
            path.unlink()
    return rows


def main() -> int:
    """Runs the study; exit code 1 when the rule is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", choices=RELEASES, nargs="+", default=list(RELEASES))
    parser.add_argument("--folder", type=pathlib.Path, help="for the checkpoints; default: the system's")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    stamp = study_record.stamp("load_save_memory")
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        rows = study(pathlib.Path(root), {w: large_config(w) for w in options.weights}, WAYS)
    text = (
        f"# Host memory of loading and saving, beside the model\n\n{stamp['date']}, {stamp['machine']}, "
        f"`{stamp['command']}`. Experts split over the devices.\n\n{as_table(rows)}"
    )
    study_record.write(options.out, stamp | {"rows": rows}, text)
    return int(not all(row["kept"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
