"""Memory of a checkpoint whose weights stay FP8 and FP4, against the bytes on disk. Measured by RSS.

    python -m experiments.weight_memory                 # makes a 1.2 GB checkpoint in a temporary folder
    python -m experiments.weight_memory --folder DIR    # of a checkpoint that is there

Each way of loading runs in a process of its own, which reads its RSS before and after, and its peak
(`/proc/self/status`, Linux). Pages of mapped files are counted, as the system counts them.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from dsv4_jax.checkpoint import storage
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.write import TensorPlan, write_sharded
from dsv4_jax.config import ModelConfig, tiny
from dsv4_jax.config.io import official_config_dict
from experiments import study_record

RESULTS = pathlib.Path(__file__).parent / "results" / "weight_memory.json"

CHILD = """
import json, sys
import jax, dsv4_jax
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
dsv4_jax.load(sys.argv[3])  # a tiny one: what libraries take once is not the weights'
before = kilobytes("VmRSS:")
model = dsv4_jax.load(sys.argv[1], weights=sys.argv[2])
arrays = sum(a.nbytes for a in jax.tree.leaves(model.parameters))
after, peak = kilobytes("VmRSS:"), kilobytes("VmHWM:")
print(json.dumps({"before": before, "after": after, "peak": peak, "arrays": arrays}))
"""


def large_config() -> ModelConfig:
    """Four layers, one of each kind, 64 experts: 1.2 GB in FP8 and FP4."""
    return tiny(
        4,
        vocab_size=32768,
        hidden_size=2048,
        q_lora_rank=512,
        o_lora_rank=512,
        n_routed_experts=64,
        moe_intermediate_size=1024,
        num_nextn_predict_layers=0,
    )


def write_random(
    folder: pathlib.Path, config: ModelConfig, release: storage.Release = storage.PREVIEW
) -> None:
    """A checkpoint of random numbers in the formats of a release, by default the instruct ones."""
    rng = np.random.default_rng(0)

    def draw(tensor: storage.ReleasedTensor) -> np.ndarray:
        dtype = DTYPES[tensor.dtype]
        if tensor.dtype == "I64":
            order = rng.random((tensor.shape[0], config.n_routed_experts)).argsort(axis=1)
            return order[:, : tensor.shape[1]].astype(dtype)
        if tensor.dtype == "F8_E4M3":  # below the NaN code
            return rng.integers(0, 0x7E, tensor.shape, np.uint8).view(dtype)
        if tensor.dtype == "F8_E8M0":
            return rng.integers(115, 120, tensor.shape, np.uint8).view(dtype)
        if tensor.dtype == "I8":
            return rng.integers(-128, 128, tensor.shape, np.int8)
        return (0.02 * rng.standard_normal(tensor.shape, np.float32)).astype(dtype)

    tensors = storage.released_tensors(config, release)
    fields = official_config_dict(config)
    if release.linears == "fp8":
        fields |= {"quantization_config": storage.QUANTIZATION_CONFIG, "expert_dtype": release.experts}
    write_sharded(
        folder,
        [(t.name, TensorPlan(t.dtype, t.shape), lambda t=t: draw(t)) for t in tensors],
        extra_files={"config.json": json.dumps(fields).encode()},
    )


def measure(folder: pathlib.Path, weights: str, warm_up: pathlib.Path) -> dict[str, int]:
    """Bytes: RSS before and after loading, peak, and of the arrays themselves."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), weights, str(warm_up)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: value * (1 if key == "arrays" else 1024) for key, value in found.items()}


def study(folder: pathlib.Path) -> dict[str, object]:
    """All ways of loading one checkpoint."""
    disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as temporary:
        warm_up = pathlib.Path(temporary) / "tiny"
        write_random(warm_up, tiny(4))
        ways = {weights: measure(folder, weights, warm_up) for weights in ("native", "dequantized")}
    return {"disk": disk, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, help="a checkpoint; default: a random one of 1.2 GB")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary) / "checkpoint"
        if options.folder is None:
            write_random(folder, large_config())
        found = study(folder)
    rows = []
    for weights, m in found["ways"].items():
        grown, peak = m["after"] - m["before"], m["peak"] - m["before"]
        rows.append([weights, f"{m['arrays']:,}", f"{grown:,}", f"{grown / found['disk']:.3f}",
                     f"{peak:,}", f"{peak / found['disk']:.3f}"])  # fmt: skip
    head = ["weights", "bytes of arrays", "RSS growth", "of disk", "peak RSS growth", "of disk"]
    stamp = study_record.stamp("weight_memory")
    text = (
        "# Memory of quantised weights\n\n" + f"{stamp['date']}, {stamp['machine']}, `{stamp['command']}`. "
    )
    text += f"{found['disk']:,} bytes on disk.\n\n" + study_record.table(head, rows)
    print(text)
    study_record.write(options.out, stamp | found, text)


if __name__ == "__main__":
    main()
