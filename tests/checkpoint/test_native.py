"""Quantised weights in memory: the same numbers as dequantised, and the same bytes when saved."""

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.checkpoint import names, storage
from dsv4_jax.checkpoint.convert import convert_checkpoint
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.save import flattened, save_checkpoint
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.blocks import quantize_mxfp4
from pallas_kernels.formats.weights import QuantizedWeight, is_quantized, plain
from tests.checkpoint import synthetic
from tests.checkpoint.test_save import file_contents, stored_contents

POLICY = Policy.of("bfloat16")
CONFIGS = {
    "repeated": synthetic.repeated_config(),  # a scanned stack, MTP
    "smallest": synthetic.smallest_config(),
}
RELEASES = {"plain": storage.PLAIN, "fp8": storage.BASE, "fp8+fp4": storage.PREVIEW}


def load(directory, weights="native", policy=POLICY):
    return load_checkpoint(directory, policy, weights=weights)


def quantized(loaded):
    return {p: leaf for p, leaf in flattened(loaded.parameters).items() if is_quantized(leaf)}


@pytest.mark.parametrize(
    ("size", "release", "dtype"),
    [
        ("repeated", "fp8", "bfloat16"),
        ("repeated", "fp8+fp4", "bfloat16"),
        ("smallest", "fp8+fp4", "float32"),
    ],
)
def test_native_weights_are_the_dequantised_ones(tmp_path, size, release, dtype):
    synthetic.write_checkpoint(tmp_path, CONFIGS[size], RELEASES[release], shards=2)
    policy = Policy.of(dtype)
    native, full = (flattened(load(tmp_path, w, policy).parameters) for w in ("native", "dequantized"))
    assert native.keys() == full.keys()
    assert {path for path, leaf in native.items() if is_quantized(leaf)} == quantized_paths(CONFIGS[size])

    paths = list(full)

    @jax.jit
    def decoded(leaves):
        return {n: plain(leaf, full[paths[n]].dtype) for n, leaf in leaves.items()}

    found = decoded({number: native[path] for number, path in enumerate(paths)})
    for number, path in enumerate(paths):
        assert found[number].shape == full[path].shape
        assert np.asarray(found[number]).tobytes() == np.asarray(full[path]).tobytes(), path


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", CONFIGS)
def test_bytes_in_memory_are_those_of_the_shapes(tmp_path, size, release):
    synthetic.write_checkpoint(tmp_path, CONFIGS[size], RELEASES[release])
    held = sum(array.nbytes for array in jax.tree.leaves(load(tmp_path).parameters))
    assert held == storage.resident_bytes(CONFIGS[size], RELEASES[release])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", CONFIGS)
def test_load_and_save_is_byte_identical(tmp_path, size, release):
    config = CONFIGS[size]
    tensors = synthetic.write_checkpoint(tmp_path / "before", config, RELEASES[release], shards=3)
    loaded = load(tmp_path / "before")
    save_checkpoint(tmp_path / "after", config, loaded.parameters, stored=loaded.stored)
    assert file_contents(tmp_path / "after") == stored_contents(tensors)
    assert load(tmp_path / "after").warnings == ()  # its config.json says what the tensors are
    convert_checkpoint(tmp_path / "before", tmp_path / "converted")
    assert file_contents(tmp_path / "converted") == stored_contents(tensors)


def test_other_spellings_of_the_same_format_stay(tmp_path):
    """U8 instead of I8, float32 scales that are powers of two; -0 and the smallest scale among them."""
    config = CONFIGS["smallest"]
    tensors = synthetic.make_tensors(config, storage.PREVIEW)
    for name, array in tensors.items():
        if array.dtype == np.int8:
            tensors[name] = array.view(np.uint8)
            tensors[name][0, 0] = 0x88
        elif array.dtype == ml_dtypes.float8_e8m0fnu:
            array.view(np.uint8)[0, 0] = 0
            tensors[name] = np.ldexp(np.float32(1), array.view(np.uint8).astype(np.int32) - 127)
    fields = synthetic.config_dict(config, storage.PREVIEW)
    synthetic.write_directory(tmp_path / "before", fields, tensors)
    loaded = load(tmp_path / "before")
    assert quantized(loaded).keys() == quantized_paths(config)
    save_checkpoint(tmp_path / "after", config, loaded.parameters, stored=loaded.stored)
    assert file_contents(tmp_path / "after") == stored_contents(tensors)


def quantized_paths(config):
    return {spec.path for spec in names.official_tensors(config) if spec.scale_name is not None}


def change(tensors, ending, edit):
    """Edits the first tensor whose name ends so; gives its name."""
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = edit(tensors[name])
    return name


def mixed(tensors):
    name = "layers.0.ffn.experts.1.w2"
    del tensors[f"{name}.scale"]
    shape = tensors[f"{name}.weight"].shape
    tensors[f"{name}.weight"] = np.ones((shape[0], 2 * shape[1]), ml_dtypes.bfloat16)


def inexact(tensors):
    name = "layers.0.ffn.experts.1.w2.scale"
    tensors[name] = np.full(tensors[name].shape, 0.3, np.float32)


@pytest.mark.parametrize("spoil", [mixed, inexact])
def test_what_cannot_stay_is_dequantised_with_a_warning(tmp_path, spoil):
    config = CONFIGS["smallest"]
    tensors = synthetic.make_tensors(config, storage.PREVIEW)
    spoil(tensors)
    synthetic.write_directory(tmp_path, synthetic.config_dict(config, storage.PREVIEW), tensors)
    loaded = load(tmp_path)
    (left,) = quantized_paths(config) - quantized(loaded).keys()
    assert left[-2:] == ("experts", "down")
    assert any("ffn/experts/down" in warning and "dequantised" in warning for warning in loaded.warnings)
    full = flattened(load(tmp_path, "dequantized").parameters)
    assert np.array_equal(flattened(loaded.parameters)[left], full[left])


@pytest.mark.parametrize(
    ("ending", "edit", "said"),
    [
        (".w1.scale", lambda a: set_byte(a, 0xFF), "NaN (E8M0 byte 0xFF)"),
        (".wq_a.weight", lambda a: set_byte(a, 0x7F), "NaN (FP8 byte"),
        (".wq_a.scale", lambda a: set_byte(a, 254), "overflow"),
    ],
)
def test_bad_values_are_refused_as_when_dequantising(tmp_path, ending, edit, said):
    config = CONFIGS["smallest"]
    tensors = synthetic.make_tensors(config, storage.PREVIEW)
    name = change(tensors, ending, edit)
    synthetic.write_directory(tmp_path, synthetic.config_dict(config, storage.PREVIEW), tensors)
    problems = []
    for weights in ("native", "dequantized"):
        with pytest.raises(CheckpointError) as refused:
            load(tmp_path, weights)
        problems.append(refused.value.problems)
    assert problems[0] == problems[1]
    assert said in problems[0][0] and name.rsplit(".", 1)[0] in problems[0][0]


def set_byte(array, byte):
    array.view(np.uint8)[0, 0] = byte
    return array


@pytest.mark.parametrize("layout", ["transformers", "hybrid"])
def test_transformers_layouts_get_plain_weights(tmp_path, layout):
    config = synthetic.repeated_config(num_nextn_predict_layers=0)
    synthetic.write_checkpoint(tmp_path / "official", config, storage.PREVIEW)
    loaded, full = load(tmp_path / "official"), load(tmp_path / "official", "dequantized")
    warnings = save_checkpoint(tmp_path / "native", config, loaded.parameters, layout=layout)
    assert any("dequantised" in warning for warning in warnings)
    save_checkpoint(tmp_path / "full", config, full.parameters, layout=layout)
    assert file_contents(tmp_path / "native") == file_contents(tmp_path / "full")


@pytest.mark.parametrize("to", ["fp8", "fp8-fp4"])
def test_quantising_a_plain_checkpoint(tmp_path, to):
    config = CONFIGS["smallest"]
    synthetic.write_checkpoint(tmp_path / "plain", config)
    assert convert_checkpoint(tmp_path / "plain", tmp_path / "small", to=to) == []
    release = {"fp8": storage.BASE, "fp8-fp4": storage.PREVIEW}[to]
    found = {name: (dtype, shape) for name, (dtype, shape, _) in file_contents(tmp_path / "small").items()}
    assert found == {t.name: (t.dtype, t.shape) for t in storage.released_tensors(config, release)}
    before, after = (load(tmp_path / name, "dequantized") for name in ("plain", "small"))
    assert after.warnings == ()
    for path, leaf in flattened(before.parameters).items():
        old = np.asarray(leaf, np.float32)
        error = np.abs(np.asarray(flattened(after.parameters)[path], np.float32) - old)
        if path not in quantized_paths(config):
            assert error.max() == 0, path
            continue
        # Half a step: of E2M1 at most a quarter of a number below the block's power of two, of E4M3 1/16.
        four = to == "fp8-fp4" and "experts" in path
        assert 0 < error.max() <= (1 / 4 if four else 1 / 16) * np.abs(old).max(), path
    # Once on the grid, a second rounding changes nothing: every byte stays.
    convert_checkpoint(tmp_path / "small", tmp_path / "bf16", to="bfloat16")
    convert_checkpoint(tmp_path / "bf16", tmp_path / "again", to=to)
    again, small = load(tmp_path / "again", "dequantized"), after
    for path, leaf in flattened(small.parameters).items():
        assert np.array_equal(leaf, flattened(again.parameters)[path]), path


def test_fp4_becomes_fp8_exactly_or_not_at_all(tmp_path):
    config = CONFIGS["smallest"]
    tensors = synthetic.write_checkpoint(tmp_path / "fp4", config, storage.PREVIEW)
    convert_checkpoint(tmp_path / "fp4", tmp_path / "fp8", to="fp8")
    before, after = (flattened(load(tmp_path / n, "dequantized").parameters) for n in ("fp4", "fp8"))
    for path in before:
        assert np.array_equal(before[path], after[path]), path

    name = next(name for name in tensors if name.endswith(".experts.0.w1.scale"))
    tensors[name].view(np.uint8)[0] = 90  # 2^-37 beside scales of at least 2^-7 in the same block
    synthetic.write_directory(tmp_path / "wide", synthetic.config_dict(config, storage.PREVIEW), tensors)
    with pytest.raises(CheckpointError) as refused:
        convert_checkpoint(tmp_path / "wide", tmp_path / "out", to="fp8")
    assert name.removesuffix(".scale") in str(refused.value) and "too small" in str(refused.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_impossible_quantisations_are_refused_together(tmp_path):
    config = synthetic.small_config(moe_intermediate_size=48)
    synthetic.write_checkpoint(tmp_path / "plain", config)
    with pytest.raises(CheckpointError) as refused:
        convert_checkpoint(tmp_path / "plain", tmp_path / "out", layout="transformers", to="fp8-fp4")
    assert any("only 'official' can" in problem for problem in refused.value.problems)
    assert any("multiple of 32" in problem and ".w2." in problem for problem in refused.value.problems)
    assert not (tmp_path / "out").exists()


def test_a_quantised_weight_is_one_parameter():
    values = np.random.default_rng(0).normal(size=(2, 32, 64)).astype(np.float32)
    weight = QuantizedWeight(quantize_mxfp4(values), (4, 8, 64))
    assert (weight.shape, weight.size, weight.ndim) == ((2, 4, 8, 64), 2 * 4 * 8 * 64, 4)
    assert weight.reshape(2, 4, 512).shape == (2, 4, 512)
    assert weight.reshape(2, -1, 64).shape == (2, 32, 64)
    for shape in [(8, 8, 64), (2, 4, 8, 65)]:
        with pytest.raises(ValueError, match="cannot become"):
            weight.reshape(*shape)
    with pytest.raises(TypeError, match="dequantize"):
        weight[0]
    first = jax.tree.map(lambda a: a[0], weight)
    assert first.shape == (4, 8, 64)
    assert np.array_equal(first.dequantize(np.float32), weight.dequantize(np.float32)[0])
