"""The rename table: complete, one to one, and the shapes of the released models."""

import dataclasses
import math
import re

import numpy as np
import pytest

from dsv4_jax.checkpoint import names, recognise
from dsv4_jax.config import v4_flash, v4_pro
from dsv4_jax.parameters import parameters
from tests.checkpoint.synthetic import repeated_config, small_config

# Shapes read in the headers of the released files, Flash and Pro.
FLASH_SHAPES = {
    "embed.weight": (129280, 4096),
    "head.weight": (129280, 4096),
    "norm.weight": (4096,),
    "hc_head_fn": (4, 16384),
    "hc_head_base": (4,),
    "hc_head_scale": (1,),
    "layers.0.attn_norm.weight": (4096,),
    "layers.0.ffn_norm.weight": (4096,),
    "layers.0.hc_attn_fn": (24, 16384),
    "layers.0.hc_ffn_fn": (24, 16384),
    "layers.0.hc_attn_base": (24,),
    "layers.0.hc_ffn_scale": (3,),
    "layers.0.attn.attn_sink": (64,),
    "layers.0.attn.wq_a.weight": (1024, 4096),
    "layers.0.attn.q_norm.weight": (1024,),
    "layers.0.attn.wq_b.weight": (32768, 1024),
    "layers.0.attn.wkv.weight": (512, 4096),
    "layers.0.attn.kv_norm.weight": (512,),
    "layers.0.attn.wo_a.weight": (8192, 4096),
    "layers.0.attn.wo_b.weight": (4096, 8192),
    "layers.0.ffn.gate.weight": (256, 4096),
    "layers.0.ffn.gate.tid2eid": (129280, 6),
    "layers.3.ffn.gate.bias": (256,),
    "layers.42.ffn.shared_experts.w1.weight": (2048, 4096),
    "layers.42.ffn.shared_experts.w2.weight": (4096, 2048),
    "layers.42.ffn.experts.255.w3.weight": (2048, 4096),
    "layers.42.ffn.experts.255.w2.weight": (4096, 2048),
    "layers.2.attn.compressor.ape": (4, 1024),
    "layers.2.attn.compressor.wkv.weight": (1024, 4096),
    "layers.2.attn.compressor.norm.weight": (512,),
    "layers.3.attn.compressor.ape": (128, 512),
    "layers.3.attn.compressor.wgate.weight": (512, 4096),
    "layers.2.attn.indexer.wq_b.weight": (8192, 1024),
    "layers.2.attn.indexer.weights_proj.weight": (64, 4096),
    "layers.2.attn.indexer.compressor.ape": (4, 256),
    "layers.2.attn.indexer.compressor.wkv.weight": (256, 4096),
    "layers.2.attn.indexer.compressor.norm.weight": (128,),
    "mtp.0.e_proj.weight": (4096, 4096),
    "mtp.0.hnorm.weight": (4096,),
    "mtp.0.norm.weight": (4096,),
    "mtp.0.hc_head_fn": (4, 16384),
    "mtp.0.attn.wq_b.weight": (32768, 1024),
    "mtp.0.ffn.gate.bias": (256,),
}
PRO_SHAPES = {
    "hc_head_fn": (4, 28672),
    "layers.0.attn.wq_a.weight": (1536, 7168),
    "layers.0.attn.wq_b.weight": (65536, 1536),
    "layers.0.attn.wo_a.weight": (16384, 4096),
    "layers.0.attn.wo_b.weight": (7168, 16384),
    "layers.0.attn.attn_sink": (128,),
    "layers.0.attn.compressor.ape": (128, 512),
    "layers.60.attn.indexer.wq_b.weight": (8192, 1536),
    "layers.60.ffn.experts.383.w2.weight": (7168, 3072),
    "mtp.0.ffn.gate.weight": (384, 7168),
}
ABSENT = [
    "layers.0.attn.compressor.ape",  # window layer
    "layers.0.ffn.gate.bias",  # hash-routed
    "layers.3.ffn.gate.tid2eid",  # learned
    "layers.3.attn.indexer.wq_b.weight",  # HCA
    "mtp.0.attn.compressor.ape",
    "mtp.0.ffn.gate.tid2eid",
    "mtp.1.e_proj.weight",
    "layers.43.attn_norm.weight",
]


def test_flash_and_pro_have_the_released_shapes():
    flash = {spec.name: spec.shape for spec in names.official_tensors(v4_flash())}
    pro = {spec.name: spec.shape for spec in names.official_tensors(v4_pro())}
    assert {name: flash[name] for name in FLASH_SHAPES} == FLASH_SHAPES
    assert {name: pro[name] for name in PRO_SHAPES} == PRO_SHAPES
    assert [name for name in ABSENT if name in flash] == []


@pytest.mark.parametrize(
    ("config", "with_mtp", "mtp", "experts"),
    [
        (v4_flash(), 290_942_289_362, 6_610_048_891, 25_165_824),
        (v4_pro(), 1_598_837_347_742, 25_840_145_979, 66_060_288),
    ],
    ids=["flash", "pro"],
)
def test_parameter_counts_of_the_released_models(config, with_mtp, mtp, experts):
    found = parameters(config)
    counted = {path: spec.size for path, spec in found.items() if spec.role != "table"}
    assert sum(counted.values()) == with_mtp
    # the published block count shares embedding and head
    assert sum(size for path, size in counted.items() if path[0] == "mtp") == mtp
    one = [spec for spec in names.official_tensors(config) if spec.name.startswith("layers.5.ffn.experts.7.")]
    assert sum(math.prod(spec.shape) for spec in one) == experts


# The tree as the model declares it, for config.tiny(5): N = 4, D = 64, M = 24.
SMALL_TREE = {
    ("embed",): (96, 64),
    ("norm",): (64,),
    ("hc_head", "fn"): (4, 4, 64),
    ("hc_head", "scale"): (1,),
    ("stacks", 0, "blocks", 0, "attn_norm"): (1, 64),
    ("stacks", 0, "blocks", 0, "hc_ffn", "fn"): (1, 24, 4, 64),
    ("stacks", 0, "blocks", 0, "attn", "wq_b"): (1, 2, 2, 32, 32),
    ("stacks", 0, "blocks", 0, "attn", "wo_a"): (1, 2, 16, 2, 32),
    ("stacks", 0, "blocks", 0, "attn", "wo_b"): (1, 64, 2, 16),
    ("stacks", 0, "blocks", 0, "attn", "attn_sink"): (1, 2, 2),
    ("stacks", 0, "blocks", 0, "ffn", "gate", "tid2eid"): (1, 96, 2),
    ("stacks", 2, "blocks", 0, "attn", "compressor", "ape"): (1, 4, 2, 32),
    ("stacks", 2, "blocks", 0, "attn", "compressor", "wkv"): (1, 2, 32, 64),
    ("stacks", 2, "blocks", 0, "attn", "indexer", "wq_b"): (1, 16, 16, 32),
    ("stacks", 2, "blocks", 0, "attn", "indexer", "compressor", "wgate"): (1, 2, 16, 64),
    ("stacks", 3, "blocks", 0, "attn", "compressor", "ape"): (1, 128, 1, 32),
    ("stacks", 3, "blocks", 0, "ffn", "gate", "bias"): (1, 4),
    ("stacks", 3, "blocks", 0, "ffn", "experts", "gate_up"): (1, 4, 2, 32, 64),
    ("stacks", 3, "blocks", 0, "ffn", "experts", "down"): (1, 4, 64, 32),
    ("stacks", 3, "blocks", 0, "ffn", "shared", "gate_up"): (1, 2, 32, 64),
    ("mtp", 0, "e_proj"): (64, 64),
    ("mtp", 0, "hc_head", "base"): (4,),
    ("mtp", 0, "block", "attn", "wkv"): (1, 32, 64),
    ("mtp", 0, "block", "ffn", "shared", "down"): (1, 64, 32),
}


def test_parameter_tree_of_a_small_model():
    found = parameters(small_config())
    assert {path: found[path].shape for path in SMALL_TREE} == SMALL_TREE


def test_scanned_layers_share_parameters():
    specs = {spec.name: spec for spec in names.official_tensors(repeated_config())}
    # three plain layers, then (HCA, CSA) four times: layer 3 + 2 * r is block 0 in repeat r
    for repeat in range(4):
        spec = specs[f"layers.{3 + 2 * repeat}.attn.wkv.weight"]
        assert spec.path == ("stacks", 3, "blocks", 0, "attn", "wkv")
        assert (spec.index, spec.leading) == ((repeat,), (4,))
        spec = specs[f"layers.{4 + 2 * repeat}.ffn.experts.3.w3.weight"]
        assert spec.path == ("stacks", 3, "blocks", 1, "ffn", "experts", "gate_up")
        assert (spec.index, spec.leading) == ((repeat, 3, 1), (4, 4, 2))


@pytest.mark.parametrize("config", [small_config(), repeated_config()], ids=["plain", "repeated"])
@pytest.mark.parametrize("naming", names.LAYOUTS)
def test_every_element_has_one_name(config, naming):
    """Each layout's tensors tile each parameter exactly: nothing is missing, nothing twice."""
    if naming != "official":
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    specs = names.layout_tensors(config, naming)
    assert len({spec.name for spec in specs}) == len(specs)
    counts = {p: np.zeros(spec.shape, np.int8) for p, spec in parameters(config).items()}
    for spec in specs:
        assert spec.leading + spec.dims == counts[spec.path].shape
        part = counts[spec.path][spec.index]
        assert part.shape == spec.dims and part.size == math.prod(spec.shape)
        part += 1
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("naming", names.LAYOUTS)
def test_scale_names(naming):
    specs = {s.name: s for s in names.layout_tensors(small_config(), naming)}
    prefix = names.LAYER_PREFIX[naming]
    if naming == "transformers":
        assert specs[f"{prefix}3.mlp.experts.gate_up_proj"].scale_name == (
            f"{prefix}3.mlp.experts.gate_up_proj_scale_inv"
        )
        assert specs[f"{prefix}3.self_attn.q_a_proj.weight"].scale_name == (
            f"{prefix}3.self_attn.q_a_proj.weight_scale_inv"
        )
        assert specs[f"{prefix}3.attn_hc.scale"].kind == "float32"  # a parameter, no scale
    else:
        assert specs[f"{prefix}3.attn.wq_a.weight"].scale_name == f"{prefix}3.attn.wq_a.scale"
    unquantized = {spec.name for spec in specs.values() if spec.scale_name is None}
    assert any(name.endswith("gate.weight") for name in unquantized)
    assert any("compressor" in name and name.endswith("weight") for name in unquantized)
    assert not any(re.search(r"experts.*(w\d|proj)", name) for name in unquantized)


@pytest.mark.parametrize("naming", names.LAYOUTS)
def test_layout_is_recognised(naming):
    own = [spec.name for spec in names.layout_tensors(small_config(), naming)]
    found = recognise.identify(own)
    assert found.layout == naming
    assert found.names == {name: name for name in own}
    assert not found.unknown and not found.problems


def test_converter_aliases_of_the_official_layout():
    for alias, official in {
        "model.embed.weight": "embed.weight",
        "model.layers.3.self_attn.wq_a.weight": "layers.3.attn.wq_a.weight",
        "model.layers.3.self_attn.wq_a.weight_scale_inv": "layers.3.attn.wq_a.scale",
        "layers.3.mlp.gate.e_score_correction_bias": "layers.3.ffn.gate.bias",
        "layers.3.mlp.experts.2.w1.weight_scale_inv": "layers.3.ffn.experts.2.w1.scale",
        "layers.3.attn.norm.weight": "layers.3.attn.kv_norm.weight",
        "layers.3.attn.compressor.norm.weight": "layers.3.attn.compressor.norm.weight",
        "layers.3.attn_norm.weight": "layers.3.attn_norm.weight",
    }.items():
        assert recognise.own_name(alias, "official") == official
        assert recognise.row_of(official, "official") is not None


def test_aliased_checkpoint_is_official():
    plain = [spec.name for spec in names.official_tensors(small_config())]
    aliased = ["model." + name.replace(".attn.", ".self_attn.") for name in plain]
    aliased = [name.replace("gate.bias", "gate.e_score_correction_bias") for name in aliased]
    found = recognise.identify(aliased)
    assert found.layout == "official" and not found.problems
    assert found.names == dict(zip(plain, aliased, strict=True))


def test_mixed_layouts_are_refused():
    own = [spec.name for spec in names.official_tensors(small_config())]
    own[own.index("head.weight")] = "lm_head.weight"
    found = recognise.identify(own)
    assert found.layout is None
    (problem,) = found.problems
    assert "mix naming layouts" in problem and "lm_head.weight" in problem


@pytest.mark.parametrize("naming", ["official", "hybrid"])
def test_both_names_of_the_window_norm_are_refused(naming):
    own = [spec.name for spec in names.layout_tensors(small_config(), naming)]
    prefix = names.LAYER_PREFIX[naming]
    other = "norm" if naming == "official" else "kv_norm"
    swapped = [re.sub(r"\.attn\.(kv_)?norm\.", f".attn.{other}.", name) for name in own]
    assert swapped != own and recognise.identify(swapped).layout == naming
    assert not recognise.identify(swapped).problems
    both = recognise.identify([*own, f"{prefix}1.attn.{other}.weight"])
    (problem,) = both.problems
    assert f"{prefix}1.attn.norm.weight" in problem and f"{prefix}1.attn.kv_norm.weight" in problem


def test_unknown_names_are_listed_and_do_not_hide_the_layout():
    own = [spec.name for spec in names.official_tensors(small_config())]
    strange = ["layers.00.attn_norm.weight", "layers.3.attn.wq_a.bias", "lm_head.scale", "x"]
    found = recognise.identify([*own, *strange])
    assert found.layout == "official" and found.unknown == strange
    assert recognise.identify(strange).layout is None


def test_native_mixing_scale_is_not_a_quantisation_scale():
    """A blanket rename of `.scale` would turn these into scales of a weight that does not exist."""
    for name in ("model.layers.0.attn_hc.scale", "model.hc_head.hc_scale"):
        row = recognise.row_of(name, "transformers")
        assert row is not None and row.parameter.role == "mixing_gate" and not row.parameter.quantized
        assert recognise.own_name(name, "transformers") == name
