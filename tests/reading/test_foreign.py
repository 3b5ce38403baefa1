"""Folders and tensors of other tools are named by what they are."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.config.io import read_config
from dsv4_jax.errors import ConfigError
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model-Q4_K_M.gguf", "GGUF"),
        ("adapter_config.json", "LoRA adapter"),
        ("model_index.json", "diffusers"),
        ("model.onnx", "ONNX"),
        ("rank0.safetensors", "TensorRT-LLM"),
        ("rank0.engine", "TensorRT-LLM"),
        ("_CHECKPOINT_METADATA", "Orbax"),
        ("__0_0.distcp", "torch.distributed"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "Keras or TensorFlow"),
        ("pytorch_model-00001-of-00002.bin", "Python pickles"),
        ("consolidated.00.pth", "Python pickles"),
    ],
)
def test_a_folder_without_our_files_is_named(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_bytes(b"")
    (problem,) = verify_checkpoint(tmp_path).problems
    assert said in problem and file in problem
    with pytest.raises(ConfigError, match=said):
        read_config(tmp_path)


def test_files_of_other_tools_beside_a_checkpoint_do_no_harm(tmp_path: Path) -> None:
    synthetic.write_checkpoint(tmp_path, synthetic.smallest_config())
    for name in ("model-Q4_K_M.gguf", "optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(b"")
    assert load_checkpoint(tmp_path, Policy.of()).warnings == ()


@pytest.mark.parametrize(
    ("endings", "said"),
    [
        (("scales", "biases"), "this is an MLX quantisation"),
        (("scales",), "this is an MLX quantisation"),
        (("qweight", "qzeros", "scales"), "AWQ or GPTQ"),
        (("qweight", "qzeros", "scales", "g_idx"), "GPTQ"),
        (("q_weight", "q_invperm"), "EXL2"),
        (("trellis", "suh", "svh"), "EXL3"),
        (("W_q", "meta"), "HQQ"),
    ],
)
def test_tensors_of_other_quantisers_are_named(tmp_path: Path, endings, said: str) -> None:
    made = synthetic.smallest_config()
    tensors = synthetic.make_tensors(made)
    tensors |= {f"layers.1.attn.wq_a.{ending}": np.ones((2, 2), np.int32) for ending in endings}
    synthetic.write_directory(tmp_path, synthetic.config_dict(made), tensors)
    (problem,) = verify_checkpoint(tmp_path).problems
    assert said in problem


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_config_of_mlx_is_named(tmp_path: Path, key: str) -> None:
    fields = synthetic.config_dict(synthetic.smallest_config()) | {key: {"group_size": 64, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="this is an MLX quantisation"):
        read_config(tmp_path)
