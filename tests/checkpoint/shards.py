"""A small checkpoint of three shards, written without the package under test."""

import json
from pathlib import Path

import numpy as np

INDEX = "model.safetensors.index.json"
SHARD = "model-0000{}-of-00003.safetensors"
FIRST, SECOND, THIRD = (SHARD.format(number) for number in (1, 2, 3))


def save_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(value: int) -> np.ndarray:
    return np.arange(value, value + 6, dtype=np.float32).reshape(2, 3)


SHARDS = {
    FIRST: {"a.w": tensor(0), "b.w": tensor(10)},
    SECOND: {"c.w": tensor(20)},
    THIRD: {"d.w": tensor(30), "e.w": tensor(40), "f.w": tensor(50)},
}
WEIGHT_MAP = {name: file for file, tensors in SHARDS.items() for name in tensors}
TOTAL = 6 * 24


def save_index(directory: Path, weight_map: object, total_size: object = TOTAL) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def save_sharded(directory: Path) -> Path:
    directory.mkdir()
    for file, tensors in SHARDS.items():
        save_shard(directory / file, tensors)
    save_index(directory, WEIGHT_MAP)
    return directory
