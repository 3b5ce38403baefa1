"""Saves small checkpoints of every dtype through the writer, and compares what is on disk."""

from pathlib import Path

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint import write
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.write import TensorPlan, write_sharded

INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def example(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "embed.weight": random.normal(size=(7, 5)).astype(ml_dtypes.bfloat16),
        "layers.0.w.weight": random.integers(0, 255, (3, 5), np.uint8).view(ml_dtypes.float8_e4m3fn),
        "layers.0.w.scale": random.integers(1, 254, (1, 1), np.uint8).view(ml_dtypes.float8_e8m0fnu),
        "layers.0.fn": random.normal(size=(24, 3)).astype(np.float32),
        "layers.0.tid2eid": random.integers(0, 9, (7, 2)),
        "layers.0.experts": random.integers(-128, 127, (3, 3), np.int8),
        "hc_scale": random.normal(size=1).astype(np.float32),
        "scalar": np.float32(seed + 0.5).reshape(()),
    }


def planned(arrays: dict[str, np.ndarray]) -> list[write.Planned]:
    return [
        (name, TensorPlan(NAMES[array.dtype], array.shape), lambda array=array: array)
        for name, array in arrays.items()
    ]


def save(directory: Path, seed: int = 0, **options: object) -> tuple[Path, ...]:
    options = {"max_shard_bytes": 200, "extra_files": {"config.json": f"{seed}".encode()}} | options
    return write_sharded(directory, planned(example(seed)), **options)


def assert_holds(directory: Path, seed: int) -> None:
    expected = example(seed)
    with open_checkpoint(directory) as files:
        assert set(files.tensors) == set(expected)
        assert files.warnings == []
        for name, array in expected.items():
            found = files.read(name)
            assert found.dtype == array.dtype and found.shape == array.shape
            assert found.tobytes() == array.tobytes(), name
    assert (directory / "config.json").read_bytes() == f"{seed}".encode()


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files below a directory, hidden ones too."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"<dir>"
        for path in sorted(directory.rglob("*"))
    }
