"""Checkpoints of other tools, named by what they are: by the folder's file names, by keys of config.json, by
endings of tensor names.

Each is refused before anything else is said, since every other complaint would be about the wrong thing.
"""

import re
from collections.abc import Collection, Iterable, Mapping

OFFICIAL_HOME = "the official checkpoints are under https://huggingface.co/deepseek-ai"

# Looked at only where model.safetensors and its index are both missing: (file name, what the folder is).
_FOREIGN_FILES: tuple[tuple[str, str], ...] = (
    (r".*\.gguf", "the weights are quantised by GGUF (llama.cpp), which is not supported"),
    (
        r"adapter_config\.json|adapter_model\..*",
        "this is a LoRA adapter (PEFT), not a model; merge it into its base model and save that",
    ),
    (r"model_index\.json", "this is a pipeline of diffusers, not a language model"),
    (r".*\.onnx", "this is an ONNX export, which holds no weights that can be loaded here"),
    (r"rank\d+\.(engine|safetensors)", "this is a TensorRT-LLM checkpoint, which is not supported"),
    (
        r"_CHECKPOINT_METADATA|_METADATA|_sharding|manifest\.ocdbt|ocdbt\.process_\d+",
        "this is an Orbax checkpoint (JAX training state), not a folder of safetensors",
    ),
    (r".*\.distcp", "this is a torch.distributed checkpoint, not a folder of safetensors"),
    (r"flax_model.*\.msgpack", "these are msgpack weights of transformers' Flax models, not safetensors"),
    (r".*\.(h5|keras)|tf_model.*", "these are Keras or TensorFlow weights, not safetensors"),
    (
        r".*\.(bin|pt|pth|ckpt|pkl)",
        "the weights are Python pickles (PyTorch), which are never opened; convert them to safetensors",
    ),
)

_MLX = "MLX"
# Name endings that only a third-party quantiser writes; the first match names the method.
_FOREIGN_ENDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("GPTQ", (".g_idx",)),
    ("AWQ or GPTQ", (".qweight", ".qzeros")),
    (_MLX, (".scales", ".biases")),
    ("ExLlamaV2 (EXL2)", (".q_weight", ".q_invperm", ".q_scale")),
    ("ExLlamaV3 (EXL3)", (".trellis", ".suh", ".svh")),
    ("HQQ", (".W_q",)),
    ("AQLM", (".codebooks",)),
    ("NVFP4", (".weight_scale_2", ".input_scale", ".weight_global_scale", ".input_global_scale")),
    ("compressed-tensors", (".weight_packed", ".weight_zero_point", ".weight_shape")),
    ("bitsandbytes", (".SCB", ".absmax", ".quant_map", ".nested_absmax")),
    ("quanto", ("._data", "._scale")),
    ("int8 per-channel", (".weight_scale",)),
)


def foreign_folder(file_names: Collection[str]) -> str | None:
    """What a folder without `model.safetensors` and index is, if another tool's files are in it."""
    if any(name in file_names for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    for pattern, what in _FOREIGN_FILES:
        found = sorted(name for name in file_names if re.fullmatch(pattern, name))
        if found:
            return f"{what} (found {ascii(found[0])}); {OFFICIAL_HOME}"
    return None


def foreign_config(raw: Mapping[str, object]) -> str | None:
    """The refusal of a config that a third-party quantiser without a `quant_method` wrote, or None."""
    for key in ("quantization", "quantization_config"):
        block = raw.get(key)
        if (
            isinstance(block, Mapping)
            and "quant_method" not in block
            and {"group_size", "bits"} <= block.keys()
        ):
            return refused_method(_MLX)
    return None


def foreign_quantization(names: Iterable[str]) -> str | None:
    """The third-party method whose extra tensors are among `names`, or None."""
    endings = {"." + name.rpartition(".")[2] for name in names}
    for method, marks in _FOREIGN_ENDINGS:
        if endings.intersection(marks):
            return method
    return None


def refused_method(method: str) -> str:
    """The sentence that refuses a third-party quantisation."""
    if method == _MLX:
        return f"this is an MLX quantisation, which is not supported; {OFFICIAL_HOME}"
    return f"the weights are quantised by {method}, which is not supported; {OFFICIAL_HOME}"
