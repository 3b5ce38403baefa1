"""The layouts that transformers writes and reads, with transformers itself.

The oracle copies weights from the torch model into our tree by its own hand-written code, so these
tests check the rename table against transformers' and not against itself.
"""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import DeepseekV4ForCausalLM

from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.save import flattened, save_checkpoint
from dsv4_jax.config import tiny
from dsv4_jax.config.io import official_config_dict
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic
from tests.parity.oracle import Oracle

# Irregular sizes: no two dims that could be swapped are equal. Layer 3.. is a scanned unit.
SIZES = {
    "vocab_size": 41,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "head_dim": 20,
    "o_groups": 3,
    "o_lora_rank": 10,
    "q_lora_rank": 28,
    "index_n_heads": 5,
    "n_routed_experts": 7,
    "moe_intermediate_size": 24,
    "num_nextn_predict_layers": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 2**20,
}
CONFIGS = {
    "flash": tiny(11, like="flash", **SIZES),
    "pro": tiny(5, like="pro", **SIZES),
}
FLOAT32 = Policy.of("float32")


def official_name(hybrid: str) -> str:
    """Hybrid to official, written out here once more."""
    special = {
        "model.embed_tokens.weight": "embed.weight",
        "model.norm.weight": "norm.weight",
        "model.hc_head.hc_fn": "hc_head_fn",
        "model.hc_head.hc_base": "hc_head_base",
        "model.hc_head.hc_scale": "hc_head_scale",
    }
    name = special.get(hybrid, hybrid)
    return re.sub(r"^model\.layers\.(\d+)\.attn\.norm\.", r"layers.\1.attn.kv_norm.", name).replace(
        "model.layers.", "layers."
    )


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def write_official(directory, hybrid, config):
    tensors = safetensors.torch.load_file(hybrid / "model.safetensors")
    renamed = {official_name(name): numpy_of(tensor) for name, tensor in tensors.items()}
    synthetic.write_directory(directory, official_config_dict(config), renamed)


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """(oracle, {layout: directory}) of one float32 model saved by transformers."""
    config = CONFIGS[request.param]
    oracle = Oracle(config, seed=3)
    # The oracle's factor gives the right width only after truncation; a real config states it exactly.
    written = oracle.model.config
    written.partial_rotary_factor = config.qk_rope_head_dim / config.head_dim
    for rope in written.rope_parameters.values():
        rope["partial_rotary_factor"] = written.partial_rotary_factor
    root = tmp_path_factory.mktemp(request.param)
    oracle.model.save_pretrained(root / "hybrid")
    oracle.model.save_pretrained(root / "transformers", save_original_format=False)
    write_official(root / "official", root / "hybrid", config)
    return oracle, {layout: root / layout for layout in ("official", "transformers", "hybrid")}


@pytest.mark.parametrize("layout", ["official", "transformers", "hybrid"])
def test_every_layout_loads_to_the_same_parameters(saved, layout):
    oracle, directories = saved
    loaded = load_checkpoint(directories[layout], FLOAT32)
    assert (loaded.layout, loaded.config, loaded.warnings) == (layout, oracle.config, ())
    expected, found = flattened(oracle.params()), flattened(loaded.parameters)
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), value, err_msg=str(path))


def from_pretrained(directory, **options):
    model, info = DeepseekV4ForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("layout", ["official", "transformers", "hybrid"])
def test_transformers_loads_what_we_save(saved, layout, tmp_path):
    oracle, directories = saved
    loaded = load_checkpoint(directories["transformers"], FLOAT32)
    save_checkpoint(tmp_path, loaded.config, loaded.parameters, layout=layout, max_shard_bytes=200_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = from_pretrained(tmp_path, dtype=torch.float32, **eager)
    expected, found = oracle.model.state_dict(), model.state_dict()
    assert set(found) == set(expected)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []
    ids = torch.arange(19).reshape(1, 19)
    with torch.no_grad():
        difference = (oracle.model(ids).logits - model.eval()(ids).logits).abs().max()
    assert difference < 1e-4  # the config arrived too: RoPE, ratios, limits


def test_transformers_ignores_our_mtp_block(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.write_checkpoint(tmp_path / "given", config)
    loaded = load_checkpoint(tmp_path / "given", FLOAT32)
    save_checkpoint(tmp_path / "saved", config, loaded.parameters, stored=loaded.stored)
    found = from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    w1 = tensors["layers.3.ffn.experts.1.w1.weight"].astype(np.float32)
    w3 = tensors["layers.3.ffn.experts.1.w3.weight"].astype(np.float32)
    stacked = found["model.layers.3.mlp.experts.gate_up_proj"][1].numpy()
    np.testing.assert_array_equal(stacked, np.concatenate([w1, w3]))


@pytest.mark.parametrize("layout", ["transformers", "hybrid"])
def test_no_op_on_a_bfloat16_model_of_transformers(saved, layout, tmp_path):
    """transformers stores even the mHC parameters in bfloat16; so do we, having read them so."""
    oracle, _ = saved
    narrow = type(oracle.model)(oracle.model.config).to(torch.bfloat16)
    narrow.load_state_dict(oracle.model.state_dict())
    native = {"save_original_format": False} if layout == "transformers" else {}
    narrow.save_pretrained(tmp_path / "before", **native)
    loaded = load_checkpoint(tmp_path / "before", Policy.of("bfloat16"))
    assert loaded.parameters["hc_head"]["fn"].dtype == np.float32
    assert set(loaded.stored.values()) == {"BF16", "I64"}
    save_checkpoint(tmp_path / "after", loaded.config, loaded.parameters, layout=layout, stored=loaded.stored)
    before, after = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert numpy_of(after[name]).tobytes() == numpy_of(tensor).tobytes(), name
    expected = flattened(jax.tree.map(lambda a: a, oracle.params()))
    for path, leaf in flattened(loaded.parameters).items():
        rounded = expected[path].astype(ml_dtypes.bfloat16) if leaf.dtype != np.int32 else None
        if rounded is not None:
            np.testing.assert_array_equal(np.asarray(leaf).astype(ml_dtypes.bfloat16), rounded)
