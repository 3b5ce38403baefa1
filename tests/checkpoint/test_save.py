"""Saving: what was read is written back byte for byte, in every layout."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.checkpoint import names, storage
from dsv4_jax.checkpoint.load import load_checkpoint, nested
from dsv4_jax.checkpoint.save import flattened, save_checkpoint
from dsv4_jax.config.io import read_config
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import WIDE_ROLES, parameters
from tests.checkpoint import synthetic

BF16 = ml_dtypes.bfloat16
WITHOUT_MTP = synthetic.repeated_config(num_nextn_predict_layers=0)
POLICIES = {dtype: Policy.of(dtype) for dtype in ("bfloat16", "float32")}


def file_contents(directory):
    """name -> (dtype, shape, bytes) of all tensors of a directory, read without our reader."""
    found = {}
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                assert name not in found
                found[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


def stored_contents(tensors):
    by_dtype = {np.dtype(dtype): name for name, dtype in synthetic.NUMPY.items()}
    return {n: (by_dtype[a.dtype], a.shape, a.tobytes()) for n, a in tensors.items()}


def in_layout(tensors, config, layout):
    """Official tensors under the names of another layout; experts stacked for 'transformers'."""
    official = {(s.path, s.index): tensors[s.name] for s in names.official_tensors(config)}
    result = {}
    for spec in names.layout_tensors(config, layout):
        if (spec.path, spec.index) in official:
            result[spec.name] = official[spec.path, spec.index]
        else:
            places = sorted(place for place in official if place[0] == spec.path)
            parts = [official[place] for place in places if place[1][:1] == spec.index]
            result[spec.name] = np.concatenate(parts).reshape(spec.shape)
    return result


def grow_in_memory(tensors, every_other):
    """Makes some matrices float32, with values that bfloat16 does not hold."""
    wide = {}
    for number, (name, array) in enumerate(tensors.items()):
        matrix = array.ndim == 2 and array.dtype == BF16
        if matrix and (number % 2 or not every_other) and "experts" not in name:
            array = array.astype(np.float32) * np.float32(1.001)
        wide[name] = array
    return wide


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("dtype", POLICIES)
def test_no_op_load_and_save_is_byte_identical(tmp_path, layout, dtype):
    tensors = synthetic.make_tensors(WITHOUT_MTP)
    tensors["layers.0.attn_norm.weight"][:2] = [-0.0, 2.0**-133]  # a sign and a subnormal
    tensors["embed.weight"][0, :2] = [-0.0, 2.0**-133]
    if dtype == "float32":
        tensors = grow_in_memory(tensors, every_other=True)
        assert {a.dtype for a in tensors.values()} >= {np.dtype(BF16), np.dtype(np.float32)}
    tensors = in_layout(tensors, WITHOUT_MTP, layout)
    fields = synthetic.config_dict(WITHOUT_MTP)
    synthetic.write_directory(tmp_path / "before", fields, tensors, shards=3)
    loaded = load_checkpoint(tmp_path / "before", POLICIES[dtype])
    assert loaded.layout == layout
    warnings = save_checkpoint(
        tmp_path / "after", loaded.config, loaded.parameters, layout=layout, stored=loaded.stored
    )
    assert warnings == []
    assert file_contents(tmp_path / "after") == stored_contents(tensors)
    assert read_config(tmp_path / "after") == WITHOUT_MTP


def test_no_op_with_mtp(tmp_path):
    config = synthetic.small_config()
    tensors = synthetic.write_checkpoint(tmp_path / "before", config)
    loaded = load_checkpoint(tmp_path / "before", POLICIES["bfloat16"])
    save_checkpoint(tmp_path / "after", config, loaded.parameters, stored=loaded.stored)
    assert file_contents(tmp_path / "after") == stored_contents(tensors)


def test_chain_of_layouts_is_byte_identical(tmp_path):
    tensors = synthetic.write_checkpoint(tmp_path / "start", WITHOUT_MTP)
    directory = tmp_path / "start"
    for layout in ("transformers", "hybrid", "official"):
        loaded = load_checkpoint(directory, POLICIES["bfloat16"])
        directory = tmp_path / layout
        save_checkpoint(directory, loaded.config, loaded.parameters, layout=layout, stored=loaded.stored)
        assert file_contents(directory) == stored_contents(in_layout(tensors, WITHOUT_MTP, layout))


@pytest.mark.parametrize("layout", ["transformers", "hybrid"])
def test_mtp_is_dropped_with_a_word(tmp_path, layout):
    config = synthetic.smallest_config()
    synthetic.write_checkpoint(tmp_path / "before", config)
    loaded = load_checkpoint(tmp_path / "before", POLICIES["bfloat16"])
    warnings = save_checkpoint(tmp_path / "after", config, loaded.parameters, layout=layout)
    assert warnings == [f"the MTP block is not saved: the {layout} layout has none"]
    after = load_checkpoint(tmp_path / "after", POLICIES["bfloat16"])
    assert after.config == dataclasses.replace(config, num_nextn_predict_layers=0)
    assert after.layout == layout and "mtp" not in after.parameters


@pytest.mark.parametrize("dtype", POLICIES)
def test_quantised_weights_are_saved_dequantised(tmp_path, dtype):
    config = synthetic.smallest_config()
    synthetic.write_checkpoint(tmp_path / "before", config, storage.PREVIEW)
    loaded = load_checkpoint(tmp_path / "before", POLICIES[dtype])
    save_checkpoint(tmp_path / "after", config, loaded.parameters, stored=loaded.stored)
    fields = json.loads((tmp_path / "after/config.json").read_text())
    assert "quantization_config" not in fields and "expert_dtype" not in fields
    assert fields["torch_dtype"] == dtype
    wide = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    found = {name: entry[0] for name, entry in file_contents(tmp_path / "after").items()}
    assert found["layers.1.attn.wq_a.weight"] == found["mtp.0.e_proj.weight"] == wide
    assert found["layers.1.ffn.experts.0.w1.weight"] == wide
    assert found["embed.weight"] == found["norm.weight"] == "BF16"  # as they were
    assert not any(name.endswith(".scale") for name in found)
    after = load_checkpoint(tmp_path / "after", POLICIES[dtype])
    assert after.warnings == ()
    jax.tree.map(np.testing.assert_array_equal, loaded.parameters, after.parameters)


def dtypes_on_disk(tmp_path, config, parameters, **options):
    save_checkpoint(tmp_path / "saved", config, parameters, **options)
    return {name: entry[0] for name, entry in file_contents(tmp_path / "saved").items()}


@pytest.fixture
def loaded(tmp_path):
    config = synthetic.smallest_config(num_nextn_predict_layers=0)
    synthetic.write_checkpoint(tmp_path / "given", config)
    return load_checkpoint(tmp_path / "given", POLICIES["float32"])


def test_without_a_record_the_dtype_is_that_in_memory(tmp_path, loaded):
    found = dtypes_on_disk(tmp_path, loaded.config, loaded.parameters)
    assert found.pop("layers.0.ffn.gate.tid2eid") == "I64"
    assert {d for name, d in found.items() if not name.endswith("tid2eid")} == {"F32"}


def test_a_narrower_record_is_kept_only_if_it_holds_every_value(tmp_path, loaded):
    parameters = jax.tree.map(np.array, loaded.parameters)
    parameters["embed"][3, 5] += np.float32(1e-7)  # trained a little
    parameters["norm"][0] = np.float32(1 + 2**-20)
    found = dtypes_on_disk(tmp_path, loaded.config, parameters, stored=loaded.stored)
    assert found["embed.weight"] == found["norm.weight"] == "F32"
    assert found["head.weight"] == found["layers.0.attn_norm.weight"] == "BF16"
    back = load_checkpoint(tmp_path / "saved", POLICIES["float32"]).parameters
    jax.tree.map(np.testing.assert_array_equal, back, parameters)


def test_a_wider_record_is_not_kept(tmp_path, loaded):
    flat = flattened(loaded.parameters)
    roles = {path: spec.role for path, spec in parameters(loaded.config).items()}
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    narrow = {p: a.astype(BF16) if roles[p] in WIDE_ROLES else a for p, a in flat.items()}
    stored = dict.fromkeys(loaded.stored, "F32")
    found = dtypes_on_disk(tmp_path, loaded.config, nested(narrow), stored=stored)
    assert found["embed.weight"] == "BF16" and found["norm.weight"] == "F32"


def test_a_stacked_tensor_keeps_a_dtype_that_all_its_parts_had(tmp_path, loaded):
    stored = dict(loaded.stored)
    stored["layers.1.ffn.experts.2.w1.weight"] = "F32"
    found = dtypes_on_disk(tmp_path, loaded.config, loaded.parameters, stored=stored, layout="transformers")
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == "BF16"
    assert found["model.layers.1.mlp.experts.gate_up_proj"] == "F32"
    assert found["model.layers.1.mlp.experts.down_proj"] == "BF16"


def test_small_files(tmp_path, loaded):
    given = {"tokenizer_config.json": b'{"a":\r\n1}', "tokenizer.json": b"{}"}
    save_checkpoint(tmp_path / "made", loaded.config, loaded.parameters, side_files=given)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "made/tokenizer_config.json").read_bytes() == b'{"a":\r\n1}'
    generation = json.loads((tmp_path / "made/generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}

    own = {"generation_config.json": b'{"temperature": 1.0}'}
    save_checkpoint(tmp_path / "own", loaded.config, loaded.parameters, side_files=own)
    assert (tmp_path / "own/generation_config.json").read_bytes() == b'{"temperature": 1.0}'


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_shards(tmp_path, loaded, layout):
    save_checkpoint(
        tmp_path / "saved",
        loaded.config,
        loaded.parameters,
        layout=layout,
        stored=loaded.stored,
        max_shard_bytes=30_000,
    )
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    contents = file_contents(tmp_path / "saved")
    assert set(index["weight_map"]) == set(contents)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in contents.values())
    assert len(set(index["weight_map"].values())) > 3
    back = load_checkpoint(tmp_path / "saved", POLICIES["float32"])
    jax.tree.map(np.testing.assert_array_equal, back.parameters, loaded.parameters)


def test_parameters_of_another_config_are_refused(tmp_path, loaded):
    flat = flattened(loaded.parameters)
    del flat["norm",]
    flat["extra", 0] = np.zeros(3, np.float32)
    flat["embed",] = np.zeros((5, 64), np.float32)
    flat["head",] = flat["head",].astype(np.float16)
    flat["hc_head", "base"] = flat["hc_head", "base"].astype(BF16)
    with pytest.raises(CheckpointError) as raised:
        save_checkpoint(tmp_path / "saved", loaded.config, nested(flat), layout="gguf")
    message = str(raised.value)
    for words in (
        "layout='gguf' must be one of",
        "norm is missing",
        "extra/0 is no parameter",
        "embed: shape (5, 64), expected (24, 64)",
        "head: dtype float16, expected bfloat16 or float32",
        "hc_head/base: dtype bfloat16, expected float32",
    ):
        assert words in message
    assert len(raised.value.problems) == 6
    assert not (tmp_path / "saved").exists()


def test_what_is_there_is_replaced_only_on_request(tmp_path, loaded):
    directory = tmp_path / "saved"
    save_checkpoint(directory, loaded.config, loaded.parameters)
    before = file_contents(directory)
    changed = jax.tree.map(lambda a: a, loaded.parameters) | {"norm": loaded.parameters["norm"] * 2}
    with pytest.raises(CheckpointError):
        save_checkpoint(directory, loaded.config, changed)
    assert file_contents(directory) == before
    save_checkpoint(directory, loaded.config, changed, overwrite=True)
    back = load_checkpoint(directory, POLICIES["float32"]).parameters
    np.testing.assert_array_equal(back["norm"], changed["norm"])


def test_a_file_that_is_no_side_file_is_an_error_before_writing(tmp_path, loaded):
    with pytest.raises(CheckpointError, match=r"side file 'modeling\.py' must be one of"):
        save_checkpoint(
            tmp_path / "saved", loaded.config, loaded.parameters, side_files={"modeling.py": b"pass"}
        )
    assert not (tmp_path / "saved").exists()
