"""Loading sound checkpoints: values, dtypes, the parameter tree, memory."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.checkpoint import names, storage
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.save import flattened, save_checkpoint
from dsv4_jax.config.io import DSPARK_NOTE, VISION_NOTE
from dsv4_jax.model.initial import initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import parameters
from tests.checkpoint import synthetic

POLICIES = [Policy.of("float32"), Policy.of("bfloat16")]
FP8 = storage.Release("fp8", "fp8", "mtp")


def expected_values(tensors: synthetic.Tensors, name: str) -> np.ndarray:
    """float64 values of an official tensor, dequantised by plain broadcasting."""
    stored, scale = tensors[name], tensors.get(name.removesuffix("weight") + "scale")
    if scale is None:
        return stored.astype(np.float64)
    if stored.dtype == np.int8:
        nibbles = np.stack([stored.view(np.uint8) & 15, stored.view(np.uint8) >> 4], -1)
        values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        values = values.reshape(stored.shape[0], -1)
        return values * np.repeat(scale.astype(np.float64), 32, axis=1)
    blocks = np.repeat(np.repeat(scale.astype(np.float64), 128, axis=0), 128, axis=1)
    return stored.astype(np.float64) * blocks[: stored.shape[0], : stored.shape[1]]


def part_of(flat, spec):
    return np.asarray(flat[spec.path])[spec.index].reshape(spec.shape)


@pytest.mark.parametrize("policy", POLICIES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("release", [storage.PLAIN, FP8, storage.PREVIEW], ids=["bf16", "fp8", "fp8+fp4"])
def test_every_value_of_every_tensor(tmp_path, release, policy):
    config = synthetic.repeated_config()
    tensors = synthetic.write_checkpoint(tmp_path, config, release, shards=3)
    loaded = load_checkpoint(tmp_path, policy)
    assert (loaded.config, loaded.layout, loaded.warnings) == (config, "official", ())
    flat = flattened(loaded.parameters)
    assert set(flat) == set(parameters(config))
    for spec in names.official_tensors(config):
        leaf = flat[spec.path]
        wanted = {"matrix": policy.param_dtype, "table": np.int32}.get(spec.kind, np.float32)
        assert isinstance(leaf, jax.Array) and leaf.dtype == wanted, spec.path
        values = expected_values(tensors, spec.name).astype(wanted)  # one rounding
        np.testing.assert_array_equal(part_of(flat, spec), values, err_msg=spec.name)


def test_tree_has_integer_list_positions(tmp_path):
    synthetic.write_checkpoint(tmp_path, synthetic.smallest_config())
    tree = load_checkpoint(tmp_path, POLICIES[1]).parameters
    assert set(tree) == {"embed", "head", "norm", "hc_head", "stacks", "mtp"}
    assert tree["stacks"][2]["blocks"][0]["attn"]["indexer"]["wq_b"].shape == (1, 16, 16, 32)
    assert tree["mtp"][0]["block"]["ffn"]["gate"]["bias"].shape == (1, 3)


def test_record_of_stored_dtypes(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.write_checkpoint(tmp_path, config, storage.PREVIEW)
    stored = load_checkpoint(tmp_path, POLICIES[1]).stored
    assert stored["embed.weight"] == stored["layers.1.attn_norm.weight"] == "BF16"
    assert stored["layers.1.attn.attn_sink"] == "F32"
    assert stored["layers.1.ffn.gate.tid2eid"] == "I64"
    plain = {n for n, a in tensors.items() if a.dtype in (ml_dtypes.bfloat16, np.float32, np.int64)}
    assert set(stored) == plain


def test_mapped_copied_and_sharded_files_give_the_same(tmp_path):
    config = synthetic.smallest_config()
    synthetic.write_checkpoint(tmp_path / "one", config, storage.PREVIEW)
    synthetic.write_checkpoint(tmp_path / "many", config, storage.PREVIEW, shards=7)
    trees = [
        load_checkpoint(tmp_path / "one", POLICIES[1]).parameters,
        load_checkpoint(tmp_path / "one", POLICIES[1], copy=True).parameters,
        load_checkpoint(tmp_path / "many", POLICIES[1]).parameters,
    ]
    for other in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, trees[0], other)


def random_fp8(rng, shape):
    codes = rng.integers(0, 0x7F, shape, dtype=np.uint8)
    return codes.view(ml_dtypes.float8_e4m3fn)


def random_scales(rng, shape):
    return rng.integers(120, 127, shape, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)


@pytest.mark.parametrize("layout", ["hybrid", "transformers"])
def test_fp8_in_the_layouts_of_transformers(tmp_path, layout):
    """Scales are called weight_scale_inv; stacked experts have one grid over gate and up rows."""
    config = synthetic.smallest_config(hidden_size=160, moe_intermediate_size=96, num_nextn_predict_layers=0)
    rng = np.random.default_rng(5)
    tensors, expected = {}, {}
    official = synthetic.make_tensors(config)
    by_place = {(s.path, s.index): official[s.name] for s in names.official_tensors(config)}
    for spec in names.layout_tensors(config, layout):
        if spec.scale_name is None:
            tensors[spec.name] = expected[spec.name] = by_place[spec.path, spec.index]
            continue
        grid = (*spec.shape[:-2], -(-spec.shape[-2] // 128), -(-spec.shape[-1] // 128))
        scale_name = spec.scale_name.replace(".scale", ".weight_scale_inv")
        tensors[spec.name] = random_fp8(rng, spec.shape)
        tensors[scale_name] = random_scales(rng, grid)
        blocks = np.repeat(np.repeat(tensors[scale_name].astype(np.float32), 128, -2), 128, -1)
        blocks = blocks[..., : spec.shape[-2], : spec.shape[-1]]
        expected[spec.name] = tensors[spec.name].astype(np.float32) * blocks
    fields = synthetic.config_dict(config, FP8)
    synthetic.write_directory(tmp_path, fields, tensors)
    if layout == "transformers":
        assert tensors["model.layers.1.mlp.experts.gate_up_proj_scale_inv"].shape == (3, 2, 2)
    loaded = load_checkpoint(tmp_path, POLICIES[0])
    assert (loaded.layout, loaded.warnings) == (layout, ())
    flat = flattened(loaded.parameters)
    for spec in names.layout_tensors(config, layout):
        np.testing.assert_array_equal(part_of(flat, spec), expected[spec.name], err_msg=spec.name)


def test_converter_aliases_and_window_norm(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.make_tensors(config, storage.PREVIEW)
    renamed = {}
    for name, array in tensors.items():
        name = "model." + name.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
        name = name.replace(".scale", ".weight_scale_inv")
        name = name.replace("gate.bias", "gate.e_score_correction_bias")
        renamed[name.replace("self_attn.kv_norm", "self_attn.norm")] = array
    fields = synthetic.config_dict(config, storage.PREVIEW)
    synthetic.write_directory(tmp_path / "official", fields, tensors)
    synthetic.write_directory(tmp_path / "aliased", fields, renamed)
    plain = load_checkpoint(tmp_path / "official", POLICIES[1])
    aliased = load_checkpoint(tmp_path / "aliased", POLICIES[1])
    jax.tree.map(np.testing.assert_array_equal, plain.parameters, aliased.parameters)
    assert aliased.stored == plain.stored


def test_copies_of_shared_tensors_inside_mtp_are_ignored(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.make_tensors(config)
    for name in ("mtp.0.emb.tok_emb.weight", "mtp.0.embed.weight", "mtp.0.head.weight"):
        tensors[name] = np.zeros((2, 3), ml_dtypes.bfloat16)
    synthetic.write_directory(tmp_path, synthetic.config_dict(config), tensors)
    assert load_checkpoint(tmp_path, POLICIES[1], require_mtp=True).warnings == ()


@pytest.mark.parametrize("told_by", ["config", "tensors"])
def test_dspark_backbone(tmp_path, told_by):
    config = synthetic.smallest_config()
    release = storage.Release("fp4", "fp8", "dspark", markov_rank=16)
    tensors = synthetic.make_tensors(config, release)
    fields = synthetic.config_dict(config, release)
    if told_by == "tensors":
        fields = {key: value for key, value in fields.items() if not key.startswith("dspark_")}
    synthetic.write_directory(tmp_path, fields, tensors)
    loaded = load_checkpoint(tmp_path, POLICIES[1], draft_head="ignore")
    assert loaded.warnings == (f"{DSPARK_NOTE}, which is left out",)
    assert loaded.config.num_nextn_predict_layers == 0 and loaded.config.dspark is None
    assert "mtp" not in loaded.parameters and not any("mtp" in name for name in loaded.stored)
    flat = flattened(loaded.parameters)
    for spec in names.official_tensors(loaded.config):
        np.testing.assert_array_equal(part_of(flat, spec), expected_values(tensors, spec.name))


def test_dspark_head(tmp_path):
    """Every tensor of such a release, in its place, and back on disk byte for byte."""
    config = synthetic.smallest_config()
    release = storage.Release("fp4", "fp8", "dspark", markov_rank=16)
    tensors = synthetic.make_tensors(config, release)
    synthetic.write_directory(tmp_path / "a", synthetic.config_dict(config, release), tensors, shards=3)
    loaded = load_checkpoint(tmp_path / "a", POLICIES[1], weights="native")
    assert loaded.warnings == () and loaded.config == storage.with_dspark(config, release)
    head = loaded.parameters["dspark"]
    assert head["stages"]["attn"]["wkv"].shape[0] == 3
    save_checkpoint(tmp_path / "b", loaded.config, loaded.parameters, stored=loaded.stored)
    with open_checkpoint(tmp_path / "b") as files:
        assert set(files.tensors) == set(tensors)
        for name, array in tensors.items():
            found = files.read(name)
            assert found.dtype == array.dtype and found.shape == array.shape, name
            assert found.tobytes() == array.tobytes(), name
    again = load_checkpoint(tmp_path / "b", POLICIES[1])
    assert again.config == loaded.config
    flat = flattened(again.parameters)
    for spec in names.official_tensors(again.config):
        np.testing.assert_array_equal(part_of(flat, spec), expected_values(tensors, spec.name))


def test_layouts_without_a_draft_head(tmp_path):
    config = synthetic.smallest_config()
    config = storage.with_dspark(config, storage.Release("plain", "plain", "dspark", markov_rank=4))
    drawn = initial_parameters(config, Policy.of("float32"), 0)
    (warning,) = save_checkpoint(tmp_path, config, drawn, layout="transformers")
    assert warning == "the DSpark draft head is not saved: the transformers layout has none"
    assert load_checkpoint(tmp_path, POLICIES[1]).config == dataclasses.replace(config, dspark=None)


def test_text_model_of_a_vision_variant(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.make_tensors(config)
    tensors["vision.patch_embed.weight"] = np.zeros((3, 5), np.float32)
    fields = synthetic.config_dict(config) | {"vision_config": {"depth": 2}}
    synthetic.write_directory(tmp_path, fields, tensors)
    loaded = load_checkpoint(tmp_path, POLICIES[1], text_only=True)
    assert loaded.config == config
    assert loaded.warnings == (VISION_NOTE,)


def test_unsigned_fp4_bytes(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.make_tensors(config, storage.PREVIEW)
    fields = synthetic.config_dict(config, storage.PREVIEW)
    synthetic.write_directory(tmp_path / "signed", fields, tensors)
    unsigned = {n: a.view(np.uint8) if a.dtype == np.int8 else a for n, a in tensors.items()}
    synthetic.write_directory(tmp_path / "unsigned", fields, unsigned)
    trees = [load_checkpoint(tmp_path / d, POLICIES[1]).parameters for d in ("signed", "unsigned")]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_float32_scales(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.make_tensors(config, FP8)
    fields = synthetic.config_dict(config, FP8)
    e8m0 = np.dtype(ml_dtypes.float8_e8m0fnu)
    tensors = {n: a.astype(np.float32) if a.dtype == e8m0 else a for n, a in tensors.items()}
    synthetic.write_directory(tmp_path / "exact", fields, tensors)
    assert load_checkpoint(tmp_path / "exact", POLICIES[1]).warnings == ()
    scale = "layers.1.attn.wo_a.scale"
    tensors[scale] = tensors[scale] * np.float32(1.25)
    synthetic.write_directory(tmp_path / "other", fields, tensors)
    loaded = load_checkpoint(tmp_path / "other", POLICIES[0])
    (warning,) = loaded.warnings
    assert scale in warning and "powers of two" in warning
    spec = next(s for s in names.official_tensors(config) if s.scale_name == scale)
    found = part_of(flattened(loaded.parameters), spec)
    np.testing.assert_array_equal(found, expected_values(tensors, spec.name).astype(np.float32))


def all_zero_bias(tensors, fields):
    tensors["layers.3.ffn.gate.bias"][:] = 0
    tensors["layers.1.hc_ffn_scale"][:] = 0


def mixed_experts(tensors, fields):
    name = "layers.2.ffn.experts.1.w2"
    tensors[f"{name}.weight"] = np.zeros((64, 32), ml_dtypes.bfloat16)
    del tensors[f"{name}.scale"]


def says_fp8_experts(tensors, fields):
    fields["expert_dtype"] = "fp8"


def says_nothing_of_quantization(tensors, fields):
    del fields["quantization_config"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (all_zero_bias, ["layers.3.ffn.gate.bias", "layers.1.hc_ffn_scale", "all zero"]),
        (mixed_experts, ["different dtypes", "I8", "BF16", "layers.2.ffn.experts.1.w2.weight"]),
        (says_fp8_experts, ["expert_dtype='fp8'", "fp4", "the tensors are believed"]),
        (says_nothing_of_quantization, ["no quantization_config", "the tensors are believed"]),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_warnings(tmp_path, change, said):
    config = synthetic.smallest_config()
    tensors = synthetic.make_tensors(config, storage.PREVIEW)
    fields = synthetic.config_dict(config, storage.PREVIEW)
    change(tensors, fields)
    synthetic.write_directory(tmp_path, fields, tensors)
    warnings = "\n".join(load_checkpoint(tmp_path, POLICIES[1]).warnings)
    assert all(word in warnings for word in said), warnings


def test_progress(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.write_checkpoint(tmp_path, config, storage.PREVIEW)
    steps = []
    load_checkpoint(tmp_path, POLICIES[1], progress=lambda *step: steps.append(step))
    total = sum(array.nbytes for array in tensors.values())
    assert steps[-1][1:] == (total, total)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


def test_code_in_the_directory_is_never_touched(tmp_path):
    config = synthetic.smallest_config()
    tensors = synthetic.make_tensors(config)
    fields = synthetic.config_dict(config) | {"auto_map": {"AutoModelForCausalLM": "modeling_canary.Canary"}}
    synthetic.write_directory(tmp_path, fields, tensors)
    for name in ("modeling_canary.py", "encoding/encoding_dsv4.py", "inference/model.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('executed')")
    seen, watching = [], True

    def hook(event, arguments):
        if watching and any(str(tmp_path) in str(a) and ".py" in str(a) for a in arguments):
            seen.append((event, arguments))

    sys.addaudithook(hook)  # cannot be removed: `watching` ends its work
    try:
        load_checkpoint(tmp_path, POLICIES[1])
    finally:
        watching = False
    assert seen == []


MEMORY = """
import json, pathlib, sys
import jax
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.numerics.policy import Policy

def status(field):
    line = next(x for x in open("/proc/self/status") if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024

small, large = sys.argv[1:]
load_checkpoint(small, Policy.of("bfloat16"))  # every code path, and the client, once
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
loaded = load_checkpoint(large, Policy.of("bfloat16"))
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.parameters))
print(json.dumps({"grown": status("VmHWM") - before, "weights": weights}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("release", [storage.PLAIN, storage.PREVIEW], ids=["bf16", "fp8+fp4"])
def test_peak_memory_is_the_weights_and_two_tensors(tmp_path, release):
    small = synthetic.smallest_config()
    large = synthetic.smallest_config(
        vocab_size=16384,
        hidden_size=1024,
        n_routed_experts=8,
        moe_intermediate_size=1024,
        num_nextn_predict_layers=0,
    )
    synthetic.write_checkpoint(tmp_path / "small", small, release)
    tensors = synthetic.write_checkpoint(tmp_path / "large", large, release, shards=4)
    largest = sorted(array.nbytes for array in tensors.values())[-2:]
    del tensors
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] > 250e6
    assert found["weights"] < found["grown"] + 20e6  # the measurement sees the weights
    assert found["grown"] < found["weights"] + sum(largest), found
