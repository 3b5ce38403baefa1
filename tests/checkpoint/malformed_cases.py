"""What can be wrong with a checkpoint whose files are well formed, as changes of a sound one.

A change gets the tensors and the fields of config.json; its decorator says what the error must
contain, which release is changed, and how many problems are expected.
"""

import dataclasses
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint import storage
from dsv4_jax.config.io import V41_REFUSAL, VISION_REFUSAL
from tests.checkpoint import synthetic

CONFIG = synthetic.smallest_config()  # layers: window, window, CSA, HCA; 0..2 hash, 3 learned
PLAIN, PREVIEW = storage.PLAIN, storage.PREVIEW
FP8 = storage.Release("fp8", "fp8", "mtp")
BF16, F32 = ml_dtypes.bfloat16, np.float32
E8M0, E4M3 = ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn
FILE = "model.safetensors: "


@dataclasses.dataclass(frozen=True)
class Case:
    """One malformed checkpoint: a sound one of `release`, changed by `change(tensors, fields)`."""

    name: str
    change: Callable[[synthetic.Tensors, dict[str, object]], None]
    said: tuple[str, ...]  # in the message
    release: storage.Release = PLAIN
    problems: int | None = 1
    dtype: str = "bfloat16"


CASES: list[Case] = []


def case(*said, release=PLAIN, problems=1, dtype="bfloat16"):
    """Registers a change under its name."""

    def register(change):
        CASES.append(Case(change.__name__, change, said, release, problems, dtype))
        return change

    return register


def ones(shape, dtype=BF16):
    return np.ones(shape, dtype)


def drop(tensors, pattern):
    for name in [name for name in tensors if re.search(pattern, name)]:
        del tensors[name]


# ---- the set of tensors --------------------------------------------------------------------------


@case("norm.weight is missing")
def missing_tensor(tensors, fields):
    del tensors["norm.weight"]


@case("head.weight is missing (V4 ties no embeddings)")
def missing_head(tensors, fields):
    del tensors["head.weight"]


@case("tensors of layers.2.* are missing")
def missing_layer(tensors, fields):
    drop(tensors, r"^layers\.2\.")


@case("layers.3.ffn.experts.*: 3 tensors of experts 2 are missing")
def expert_hole(tensors, fields):
    drop(tensors, r"layers\.3\.ffn\.experts\.2\.")


@case("layers.0.ffn.experts.*: 2 tensors of experts 0, 2 are missing")
def two_expert_holes(tensors, fields):
    drop(tensors, r"layers\.0\.ffn\.experts\.[02]\.w3")


@case("tensors of mtp.0.* are missing", "num_nextn_predict_layers: 0")
def missing_mtp(tensors, fields):
    drop(tensors, r"^mtp\.")


@case("mtp.0.e_proj.weight is missing")
def missing_part_of_mtp(tensors, fields):
    del tensors["mtp.0.e_proj.weight"]


@case("unexpected mtp.0.e_proj.weight", "num_nextn_predict_layers is 0")
def mtp_the_config_denies(tensors, fields):
    fields["num_nextn_predict_layers"] = 0
    fields["compress_ratios"] = fields["compress_ratios"][:-1]


@case("unexpected layers.4.", "more of layers.4.", "num_hidden_layers is 4")
def layer_beyond_the_last(tensors, fields):
    for name in [name for name in tensors if name.startswith("layers.3.")]:
        tensors[name.replace("layers.3.", "layers.4.")] = tensors[name]


@case("unexpected layers.3.ffn.experts.3.w1.weight", "n_routed_experts is 3")
def expert_beyond_the_last(tensors, fields):
    tensors["layers.3.ffn.experts.3.w1.weight"] = ones((32, 64))


@case("unexpected layers.1.ffn.gate.bias", "hash-routed layer has no selection bias")
def bias_in_a_hash_layer(tensors, fields):
    tensors["layers.1.ffn.gate.bias"] = ones(3, F32)


@case("unexpected layers.3.ffn.gate.tid2eid", "only hash-routed layers", "hca and learned")
def table_in_a_learned_layer(tensors, fields):
    tensors["layers.3.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"]


@case("unexpected mtp.0.ffn.gate.tid2eid", "only hash-routed layers")
def table_in_the_mtp_block(tensors, fields):
    tensors["mtp.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"]


@case("unexpected layers.0.attn.compressor", "3 more of layers.0.", "only compressed layers")
def compressor_in_a_window_layer(tensors, fields):
    for name in [name for name in tensors if name.startswith("layers.3.attn.compressor.")]:
        tensors[name.replace("layers.3.", "layers.0.")] = tensors[name]


@case("unexpected layers.3.attn.indexer.wq_b.weight", "(CSA) have an indexer", "hca and learned")
def indexer_in_an_hca_layer(tensors, fields):
    tensors["layers.3.attn.indexer.wq_b.weight"] = tensors["layers.2.attn.indexer.wq_b.weight"]


@case("unexpected layers.1.attn.wq_a.bias", "no such tensor in DeepSeek-V4")
def unknown_tensor(tensors, fields):
    tensors["layers.1.attn.wq_a.bias"] = ones(32)


@case("unexpected rotary.inv_freq", "and 1 more of the model", "no such tensor in DeepSeek-V4")
def unknown_tensors_of_the_model(tensors, fields):
    tensors["rotary.inv_freq"] = tensors["model_stats"] = ones(32)


@case(FILE, "layers.1.attn.wq_a.scale: scales beside BF16 weights")
def scale_of_a_plain_weight(tensors, fields):
    tensors["layers.1.attn.wq_a.scale"] = ones((1, 1), E8M0)


@case("unexpected embed.scale", "no such tensor")
def scale_of_a_tensor_that_is_never_quantised(tensors, fields):
    tensors["embed.scale"] = ones((1, 1), E8M0)


@case("wq_a.weight: FP8 weights", "(layers.1.attn.wq_a.scale is missing)", release=FP8)
def fp8_without_scales(tensors, fields):
    del tensors["layers.1.attn.wq_a.scale"]


@case("FP4 weights", "(layers.1.ffn.experts.0.w2.scale is missing)", release=PREVIEW)
def fp4_without_scales(tensors, fields):
    del tensors["layers.1.ffn.experts.0.w2.scale"]


@case(
    "layers.1.attn.wkv.weight is missing",
    "layers.1.attn.wkv.scale: scales without their weights",
    release=FP8,
    problems=2,
)
def scales_without_weights(tensors, fields):
    del tensors["layers.1.attn.wkv.weight"]


@case("mix naming layouts", "lm_head.weight")
def mixed_layouts(tensors, fields):
    tensors["lm_head.weight"] = tensors.pop("head.weight")


@case("one tensor under two names", "layers.1.attn.norm.weight", "layers.1.attn.kv_norm.weight")
def both_window_norms(tensors, fields):
    tensors["layers.1.attn.norm.weight"] = tensors["layers.1.attn.kv_norm.weight"]


@case("one tensor under two names", "model.norm.weight")
def a_name_and_its_alias(tensors, fields):
    tensors["model.norm.weight"] = tensors["norm.weight"]


@case("no such tensor in DeepSeek-V4")
def no_name_is_known(tensors, fields):
    tensors.clear()
    tensors["transformer.wte.weight"] = ones((2, 3))


# ---- shapes and dtypes ---------------------------------------------------------------------------


@case(FILE, "embed.weight: shape [25, 64], expected [24, 64]")
def vocabulary_of_another_size(tensors, fields):
    tensors["embed.weight"] = ones((25, 64))


@case("layers.0.attn.wo_b.weight: shape [32, 64], expected [64, 32] (it looks transposed)")
def transposed_weight(tensors, fields):
    tensors["layers.0.attn.wo_b.weight"] = ones((32, 64))


@case("layers.3.attn.compressor.ape: shape [4, 64], expected [128, 32]")
def position_bias_of_the_other_kind(tensors, fields):
    tensors["layers.3.attn.compressor.ape"] = ones((4, 64), F32)


@case("hc_head_scale: shape [1, 1], expected [1]")
def wrong_rank(tensors, fields):
    tensors["hc_head_scale"] = ones((1, 1), F32)


@case("layers.1.ffn.gate.tid2eid: shape [24, 3], expected [24, 2]")
def table_of_another_width(tensors, fields):
    tensors["layers.1.ffn.gate.tid2eid"] = np.zeros((24, 3), np.int64)


@case("embed.weight: dtype F64, expected BF16, F16 or F32")
def float64(tensors, fields):
    tensors["embed.weight"] = ones((24, 64), np.float64)


@case("layers.1.attn.wq_a.weight: dtype F8_E5M2", release=FP8)
def fp8_of_the_other_kind(tensors, fields):
    tensors["layers.1.attn.wq_a.weight"] = ones((32, 64), ml_dtypes.float8_e5m2)


@case("embed.weight: dtype F8_E4M3, expected BF16, F16 or F32", release=FP8)
def quantised_embedding(tensors, fields):
    tensors["embed.weight"] = ones((24, 64), E4M3)


@case("layers.1.attn.attn_sink: dtype I64, expected BF16, F16 or F32")
def integers_for_a_sink(tensors, fields):
    tensors["layers.1.attn.attn_sink"] = ones(4, np.int64)


@case("layers.1.ffn.gate.tid2eid: dtype I16, expected I64 or I32")
def narrow_table(tensors, fields):
    tensors["layers.1.ffn.gate.tid2eid"] = tensors["layers.1.ffn.gate.tid2eid"].astype(np.int16)


@case("layers.1.attn.wo_a.scale: shape [1, 2], expected [1, 1]: it looks like 32 x 32", release=FP8)
def scales_of_32_by_32_blocks(tensors, fields):
    tensors["layers.1.attn.wo_a.scale"] = ones((1, 2), E8M0)


@case("layers.1.attn.wo_a.scale: shape [32, 1]", "one scale a row", release=FP8)
def scales_of_rows(tensors, fields):
    tensors["layers.1.attn.wo_a.scale"] = ones((32, 1), E8M0)


@case("w1.scale: shape [1, 1], expected [32, 2]: it looks like 128 x 128", release=PREVIEW)
def fp8_scales_of_fp4_weights(tensors, fields):
    tensors["layers.1.ffn.experts.0.w1.scale"] = ones((1, 1), E8M0)


@case("w1.scale: shape [32, 4], expected [32, 2]: it looks like 1 x 16", release=PREVIEW)
def fp4_groups_of_16(tensors, fields):
    tensors["layers.1.ffn.experts.0.w1.scale"] = ones((32, 4), E8M0)


@case("layers.1.attn.wo_a.scale: dtype BF16, expected F8_E8M0 or F32", release=FP8)
def scales_of_another_dtype(tensors, fields):
    tensors["layers.1.attn.wo_a.scale"] = ones((1, 1))


@case("w1.weight: shape [32, 31], expected [32, 32]", release=PREVIEW)
def fp4_rows_of_odd_width(tensors, fields):
    tensors["layers.1.ffn.experts.0.w1.weight"] = np.ones((32, 31), np.int8)


@case("I8 [32, 64] is int8, not packed FP4", "huggingface.co/deepseek-ai", release=PREVIEW)
def int8_weight(tensors, fields):
    tensors["layers.1.ffn.experts.0.w1.weight"] = np.ones((32, 64), np.int8)


# ---- values --------------------------------------------------------------------------------------


@case(FILE, "layers.2.attn.wkv.scale: 1 of 1 scales are NaN (E8M0 byte 0xFF)", release=FP8)
def scale_byte_ff(tensors, fields):
    tensors["layers.2.attn.wkv.scale"].view(np.uint8)[0, 0] = 0xFF


@case("w2.scale: 2 of 64 scales are NaN", release=PREVIEW)
def scale_byte_ff_of_fp4(tensors, fields):
    tensors["layers.2.ffn.experts.1.w2.scale"].view(np.uint8)[[3, 63], 0] = 0xFF


@case("layers.2.attn.wkv.weight: 2 of 2048 values are NaN (FP8 byte 0x7F or 0xFF)", release=FP8)
def fp8_nan(tensors, fields):
    tensors["layers.2.attn.wkv.weight"].view(np.uint8)[[0, 31], [5, 63]] = [0x7F, 0xFF]


@case("layers.2.attn.wkv.weight: values times scales overflow", release=FP8)
def fp8_overflow(tensors, fields):
    tensors["layers.2.attn.wkv.scale"].view(np.uint8)[:] = 0xFE


@case(FILE, "hc_head_fn: 1 of 1024 values are NaN or infinite")
def nan_in_float32(tensors, fields):
    tensors["hc_head_fn"][1, 2] = np.nan


@case("layers.3.ffn.gate.bias: 3 of 3 values are NaN or infinite")
def infinite_bias(tensors, fields):
    tensors["layers.3.ffn.gate.bias"][:] = -np.inf


@case("layers.3.attn_norm.weight: 1 of 64 values are NaN or infinite")
def nan_in_a_norm(tensors, fields):
    tensors["layers.3.attn_norm.weight"][7] = np.nan


@case("layers.0.attn.wkv.weight: 1 of 2048 values are NaN or infinite", dtype="float32")
def nan_in_a_float32_matrix(tensors, fields):
    tensors["layers.0.attn.wkv.weight"] = tensors["layers.0.attn.wkv.weight"].astype(F32)
    tensors["layers.0.attn.wkv.weight"][31, 63] = np.nan


@case("layers.1.ffn.gate.tid2eid: 2 of 48 expert numbers are outside 0 .. 2")
def experts_that_are_not(tensors, fields):
    tensors["layers.1.ffn.gate.tid2eid"][[0, 23], [0, 1]] = [3, -1]


@case("layers.1.ffn.gate.tid2eid: 1 of 48 expert numbers are outside 0 .. 2")
def expert_number_that_int32_would_wrap_to_one(tensors, fields):
    tensors["layers.1.ffn.gate.tid2eid"][0, 0] = 2**32 + 1


@case("layers.1.ffn.gate.tid2eid: 2 of 24 tokens name an expert twice")
def expert_named_twice(tensors, fields):
    tensors["layers.1.ffn.gate.tid2eid"][[3, 9]] = [[1, 1], [2, 2]]


# ---- which checkpoint it is ----------------------------------------------------------------------


def names_only(tensors, names):
    for name in names:
        tensors[name] = ones((2, 2))


@case("config.json: " + V41_REFUSAL)
def v41_model_type(tensors, fields):
    fields["model_type"] = "deepseek_v41"


@case("config.json: " + V41_REFUSAL)
def v41_architecture(tensors, fields):
    fields["architectures"] = ["DeepseekV41ForCausalLM"]


@case("config.json: ", "deepseek_v3")
def another_model(tensors, fields):
    fields["model_type"] = "deepseek_v3"
    fields["architectures"] = ["DeepseekV3ForCausalLM"]


@case("config.json: " + VISION_REFUSAL)
def vision_keys(tensors, fields):
    fields["vision_config"] = {"depth": 1}


@case(VISION_REFUSAL)
def vision_tensors(tensors, fields):
    names_only(tensors, ["vision.patch_embed.weight", "vision.blocks.0.attn.qkv.weight"])


@case("config.json: ", "gptq", "deepseek-ai")
def quantisation_method_in_the_config(tensors, fields):
    fields["quantization_config"] = {"quant_method": "gptq", "bits": 4}


# ---- the config ----------------------------------------------------------------------------------


@case("config.json: ", "compress_ratios")
def too_few_ratios(tensors, fields):
    fields["compress_ratios"] = [0, 0, 4]


@case("config.json: ", "hidden_size", "is missing")
def missing_key(tensors, fields):
    del fields["hidden_size"]


@case("config.json: ", "num_experts_per_tok=4 must not exceed n_routed_experts=3")
def more_active_experts_than_experts(tensors, fields):
    fields["num_experts_per_tok"] = 4


@case("expected [7, 64]", problems=None)
def config_of_another_vocabulary(tensors, fields):
    fields["vocab_size"] = 7
