"""Small random checkpoints in the official layout, as the releases store them.

Written with its own few lines of safetensors, so that a test of the reader does not lean on the
writer.
"""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint import storage
from dsv4_jax.config import ModelConfig, tiny
from dsv4_jax.config.io import official_config_dict

NUMPY = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I8": np.int8,
    "U8": np.uint8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in NUMPY.items()}

Tensors = dict[str, np.ndarray]


def small_config(**overrides: object) -> ModelConfig:
    """Window, CSA and HCA layers, hash and learned routing, MTP; four experts."""
    fields = {
        "vocab_size": 96,
        "hc_sinkhorn_iters": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    return tiny(5, **(fields | overrides))


def smallest_config(**overrides: object) -> ModelConfig:
    """Every kind of layer once (window, window, CSA, HCA), three experts, MTP."""
    fields = {"vocab_size": 24, "n_routed_experts": 3, "num_experts_per_tok": 2}
    return tiny(4, **(fields | overrides))


def repeated_config(**overrides: object) -> ModelConfig:
    """As `small_config`, with four repeats of a scanned unit."""
    fields = {"vocab_size": 40, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return tiny(11, **(fields | overrides))


def make_tensors(config: ModelConfig, release: storage.Release = storage.PLAIN, seed: int = 0) -> Tensors:
    """Random tensors of every name, dtype and shape that such a release stores.

    FP8 codes are all codes but NaN, scale bytes 120 .. 126 (2^-7 .. 2^-1), FP4 all codes.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in storage.released_tensors(config, release):
        shape = tensor.shape
        if tensor.dtype == "I64":
            order = rng.random((shape[0], config.n_routed_experts)).argsort(axis=1)
            tensors[tensor.name] = order[:, : shape[1]].astype(np.int64)
        elif tensor.dtype == "F8_E4M3":
            codes = rng.integers(0, 0x7F, shape, dtype=np.uint8)
            signs = rng.integers(0, 2, shape, dtype=np.uint8) << 7
            tensors[tensor.name] = (codes | signs).view(ml_dtypes.float8_e4m3fn)
        elif tensor.dtype == "F8_E8M0":
            codes = rng.integers(120, 127, shape, dtype=np.uint8)
            tensors[tensor.name] = codes.view(ml_dtypes.float8_e8m0fnu)
        elif tensor.dtype == "I8":
            tensors[tensor.name] = rng.integers(-128, 128, shape, dtype=np.int8)
        else:
            values = rng.standard_normal(shape, dtype=np.float32) * 0.05
            if tensor.name.endswith("norm.weight"):
                values += 1
            tensors[tensor.name] = values.astype(NUMPY[tensor.dtype])
    return tensors


def config_dict(config: ModelConfig, release: storage.Release = storage.PLAIN) -> dict[str, object]:
    """The config.json of such a release."""
    dspark = release.draft == "dspark"
    fields = official_config_dict(storage.with_dspark(config, release) if dspark else config)
    if release.linears == "fp8":
        fields["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    if release.experts == "fp4":
        fields["expert_dtype"] = "fp4"
    return fields


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """One safetensors file."""
    header, chunks, begin = {}, [], 0
    for name, array in tensors.items():
        end = begin + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        chunks.append(np.ascontiguousarray(array).tobytes())
        begin = end
    text = json.dumps(header).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


def write_directory(
    directory: pathlib.Path,
    fields: Mapping[str, object],
    tensors: Mapping[str, np.ndarray],
    shards: int = 1,
) -> pathlib.Path:
    """Writes config.json and the tensors, dealt over `shards` files; several get an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(fields)))
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensors[name] for name in list(tensors)[shard::shards]}
        (directory / file).write_bytes(safetensors_bytes(held))
        weight_map |= dict.fromkeys(held, file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_checkpoint(
    directory: pathlib.Path,
    config: ModelConfig,
    release: storage.Release = storage.PLAIN,
    *,
    seed: int = 0,
    shards: int = 1,
) -> Tensors:
    """Writes a whole random checkpoint and gives its tensors."""
    tensors = make_tensors(config, release, seed)
    write_directory(directory, config_dict(config, release), tensors, shards)
    return tensors
