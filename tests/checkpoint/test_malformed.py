"""Checkpoints that must not load: one error with every problem, naming file and tensor.

Files whose bytes or index are damaged are in `test_safetensors.py` and `test_files.py`. Here the
files are well formed and what they hold is wrong. `verify_checkpoint` must find the same problems
without raising.
"""

import dataclasses
import json

import numpy as np
import pytest

from dsv4_jax.checkpoint import storage
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.config.io import DSPARK_NOTE, official_config_dict
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic
from tests.checkpoint.malformed_cases import (
    CASES,
    CONFIG,
    E8M0,
    F32,
    FP8,
    PREVIEW,
    drop,
    names_only,
    ones,
)

FOREIGN = {
    "GPTQ": ["layers.1.attn.wq_a.qweight", "layers.1.attn.wq_a.g_idx"],
    "AWQ or GPTQ": ["layers.1.attn.wq_a.qweight", "layers.1.attn.wq_a.qzeros"],
    "NVFP4": ["layers.1.attn.wq_a.weight_scale", "layers.1.attn.wq_a.weight_scale_2"],
    "compressed-tensors": ["layers.1.attn.wq_a.weight_packed", "layers.1.attn.wq_a.weight_scale"],
    "bitsandbytes": ["layers.1.attn.wq_a.SCB"],
    "int8 per-channel": ["layers.1.attn.wq_a.weight_scale"],
}


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf])
def test_float32_scale_that_is_no_scale(tmp_path, value):
    tensors = synthetic.make_tensors(CONFIG, FP8)
    tensors["layers.1.attn.wq_b.scale"] = np.array([[value]], F32)
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG, FP8), tensors)
    with pytest.raises(CheckpointError, match="1 of 1 scales are NaN, infinite, zero or negative"):
        load_checkpoint(tmp_path, Policy.of())


@pytest.mark.parametrize("method", FOREIGN)
def test_third_party_quantisation_is_named(tmp_path, method):
    tensors = synthetic.make_tensors(CONFIG)
    names_only(tensors, FOREIGN[method])
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG), tensors)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of())
    (problem,) = raised.value.problems
    assert problem.startswith(f"the weights are quantised by {method},")
    assert "huggingface.co/deepseek-ai" in problem


def test_gguf_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(synthetic.config_dict(CONFIG)))
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="quantised by GGUF"):
        load_checkpoint(tmp_path, Policy.of())


DSPARK_RELEASE = storage.Release("fp4", "fp8", "dspark", markov_rank=16)


@pytest.mark.parametrize(
    ("told_by", "require_mtp"),
    [
        ("config", True),
        ("main_proj", True),
        ("second stage", True),
        ("main_proj", False),
        ("second stage", False),
    ],
)
def test_dspark_is_not_taken_for_mtp_nor_loaded_without_its_keys(tmp_path, told_by, require_mtp):
    tensors = synthetic.make_tensors(CONFIG, DSPARK_RELEASE)
    fields = synthetic.config_dict(CONFIG, DSPARK_RELEASE)
    if told_by != "config":
        fields = {key: value for key, value in fields.items() if not key.startswith("dspark_")}
        drop(tensors, r"^mtp\.1\." if told_by == "main_proj" else r"main_proj")
    synthetic.write_directory(tmp_path, fields, tensors)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of(), require_mtp=require_mtp)
    (problem,) = raised.value.problems
    assert problem.startswith(DSPARK_NOTE)
    assert ("MTP block was asked for" if require_mtp else "draft_head='ignore'") in problem
    assert verify_checkpoint(tmp_path).sound is (told_by == "config")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"^mtp\.1\.", "tensors of mtp.1.* are missing; draft_head='ignore'"),
        (r"^mtp\.", "tensors of mtp.0.* are missing; draft_head='ignore'"),
        (r"main_proj.scale", "mtp.0.main_proj.weight: FP8 weights without their scales"),
        (r"markov_w2", "mtp.2.markov_head.markov_w2.weight is missing"),
    ],
)
def test_a_torn_dspark_head_is_refused(tmp_path, pattern, said):
    tensors = synthetic.make_tensors(CONFIG, DSPARK_RELEASE)
    drop(tensors, pattern)
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG, DSPARK_RELEASE), tensors)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of())
    assert any(said in problem for problem in raised.value.problems)
    assert load_checkpoint(tmp_path, Policy.of(), draft_head="ignore").config.dspark is None


def test_tensors_that_a_dspark_head_has_not(tmp_path):
    tensors = synthetic.make_tensors(CONFIG, DSPARK_RELEASE)
    tensors["mtp.0.e_proj.weight"] = tensors["mtp.1.norm.weight"] = np.zeros(3, np.float32)
    tensors["mtp.3.attn_norm.weight"] = np.zeros(3, np.float32)
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG, DSPARK_RELEASE), tensors)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of())
    text = "\n".join(raised.value.problems)
    assert len(raised.value.problems) == 3 and "a DSpark draft head has 3 stages" in text
    assert text.count("not of this block of the draft head") == 2


def test_mtp_that_is_asked_for_and_not_there(tmp_path):
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    synthetic.write_checkpoint(tmp_path, config)
    assert load_checkpoint(tmp_path, Policy.of()).config == config
    with pytest.raises(CheckpointError, match="an MTP block was asked for"):
        load_checkpoint(tmp_path, Policy.of(), require_mtp=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(tmp_path, case):
    tensors = synthetic.make_tensors(CONFIG, case.release)
    fields = synthetic.config_dict(CONFIG, case.release)
    case.change(tensors, fields)
    synthetic.write_directory(tmp_path, fields, tensors)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of(case.dtype))
    message = str(raised.value)
    assert str(tmp_path) in message
    for words in case.said:
        assert words in message
    if case.problems is not None:
        assert len(raised.value.problems) == case.problems, message
    assert sorted(verify_checkpoint(tmp_path).problems) == sorted(raised.value.problems)


def test_every_problem_is_reported_at_once(tmp_path):
    """First 20 and a count; problems of values come after those of headers are gone."""
    tensors = synthetic.make_tensors(CONFIG)
    for name in list(tensors):
        if "norm.weight" in name:
            tensors[name] = ones(5)
    tensors["hc_head_base"][0] = np.nan
    tensors["stray"] = ones(1)
    del tensors["embed.weight"]
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG), tensors)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of())
    problems = raised.value.problems
    num_norms = sum("norm.weight" in name for name in tensors)
    assert len(problems) == num_norms + 2 > 20
    assert str(raised.value).endswith(f"... and {len(problems) - 20} more")
    assert str(raised.value).count("\n  - ") == 20


def test_problems_of_values_are_reported_at_once(tmp_path):
    tensors = synthetic.make_tensors(CONFIG)
    tensors["hc_head_base"][0] = np.nan
    tensors["layers.2.attn.attn_sink"][0] = np.inf
    tensors["layers.0.ffn.gate.tid2eid"][0, 0] = 3
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG), tensors)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of())
    assert len(raised.value.problems) == 3


def test_config_and_files_are_reported_together(tmp_path):
    synthetic.write_checkpoint(tmp_path, CONFIG)
    fields = synthetic.config_dict(CONFIG)
    del fields["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of())
    config, data = raised.value.problems
    assert "hidden_size" in config and "is truncated" in data
    assert verify_checkpoint(tmp_path).problems == raised.value.problems


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"hc_eps": NaN}', "[]", "", "\xff"])
def test_config_that_is_no_config(tmp_path, text):
    synthetic.write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        load_checkpoint(tmp_path, Policy.of())


@pytest.mark.parametrize("kind", ["nothing", "file", "empty"])
def test_no_checkpoint_at_all(tmp_path, kind):
    path = tmp_path / "checkpoint"
    if kind == "file":
        path.write_text("{}")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(CheckpointError):
        load_checkpoint(path, Policy.of())
    assert not verify_checkpoint(path).sound


def test_weights_are_scanned_on_request(tmp_path):
    tensors = synthetic.make_tensors(CONFIG)
    tensors["layers.0.ffn.experts.2.w3.weight"][3, 4] = np.inf
    tensors["embed.weight"][0, 0] = np.nan
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG), tensors)
    loaded = load_checkpoint(tmp_path, Policy.of())
    assert np.isnan(np.asarray(loaded.parameters["embed"], np.float32)).sum() == 1
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path, Policy.of(), scan_weights=True)
    assert len(raised.value.problems) == 2
    assert verify_checkpoint(tmp_path).problems == raised.value.problems


def test_float32_that_overflows_bfloat16(tmp_path):
    tensors = synthetic.make_tensors(CONFIG)
    tensors["embed.weight"] = tensors["embed.weight"].astype(F32)
    tensors["embed.weight"][1, 1] = np.finfo(F32).max
    synthetic.write_directory(tmp_path, synthetic.config_dict(CONFIG), tensors)
    assert load_checkpoint(tmp_path, Policy.of("float32")).warnings == ()
    with pytest.raises(CheckpointError, match=r"embed\.weight: 1 of 1536 values"):
        load_checkpoint(tmp_path, Policy.of("bfloat16"))


def test_fp4_rows_that_are_no_whole_groups(tmp_path):
    config = dataclasses.replace(CONFIG, moe_intermediate_size=48)
    tensors = synthetic.make_tensors(config)
    name = "layers.0.ffn.experts.0.w2"
    tensors[f"{name}.weight"] = np.zeros((64, 24), np.int8)
    tensors[f"{name}.scale"] = ones((64, 2), E8M0)
    synthetic.write_directory(tmp_path, official_config_dict(config), tensors)
    with pytest.raises(CheckpointError, match="FP4 needs rows of a multiple of 32, not 48"):
        load_checkpoint(tmp_path, Policy.of())


def test_verification_of_a_sound_checkpoint(tmp_path):
    tensors = synthetic.write_checkpoint(tmp_path, CONFIG, PREVIEW, shards=2)
    found = verify_checkpoint(tmp_path)
    assert found.sound and found.warnings == ()
    assert (found.config, found.layout) == (CONFIG, "official")
    assert found.num_tensors == len(tensors)
    assert found.num_bytes == sum(array.nbytes for array in tensors.values())
    assert found.formats["fp4"] == 5 * 3 * 3  # layers and MTP, experts, w1 w2 w3
