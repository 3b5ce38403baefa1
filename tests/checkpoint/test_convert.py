"""Converting between layouts and dtypes keeps every value that the target dtype can hold."""

import os

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import config
from dsv4_jax.checkpoint import names, read, storage
from dsv4_jax.checkpoint.convert import convert_checkpoint
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.checkpoint.load import load_checkpoint, nested
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.config import io as config_io
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import WIDE_ROLES, parameters
from tests.checkpoint import synthetic

CONFIG = config.tiny(4, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """An official checkpoint: bfloat16 matrices and norms, the rest float32."""
    random = np.random.default_rng(0)
    flat = {}
    for path, spec in parameters(CONFIG).items():
        if spec.role == "table":
            rows = [random.permutation(CONFIG.n_routed_experts) for _ in range(spec.shape[-2])]
            table = np.stack(rows)[:, : spec.shape[-1]].astype(np.int32)
            flat[path] = np.broadcast_to(table, spec.shape)
            continue
        values = random.normal(size=spec.shape).astype(np.float32)
        if spec.role in WIDE_ROLES or spec.role == "norm":
            values = values.astype(ml_dtypes.bfloat16)
        flat[path] = values if spec.role in WIDE_ROLES else values.astype(np.float32)
    stored = {spec.name: "BF16" for spec in names.official_tensors(CONFIG) if spec.kind == "norm"}
    directory = tmp_path_factory.mktemp("official")
    save_checkpoint(directory, CONFIG, nested(flat), stored=stored)
    return directory


def contents(directory):
    with open_checkpoint(directory) as files:
        return {name: (info.dtype, np.array(files.read(name))) for name, info in files.tensors.items()}


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name][0] == second[name][0], name
        assert first[name][1].tobytes() == second[name][1].tobytes(), name


def test_there_and_back_is_byte_identical(official, tmp_path):
    # MTP has no place in the transformers layouts: leave it out first.
    for layout in ("transformers", "hybrid"):
        warnings = convert_checkpoint(official, tmp_path / layout, layout=layout)
        assert any("MTP" in warning for warning in warnings)
        convert_checkpoint(tmp_path / layout, tmp_path / f"{layout}_back")
        back = contents(tmp_path / f"{layout}_back")
        same(back, {n: v for n, v in contents(official).items() if not n.startswith("mtp.")})


def test_no_op(official, tmp_path):
    assert convert_checkpoint(official, tmp_path / "copy") == []
    same(contents(tmp_path / "copy"), contents(official))
    assert config_io.read_config(tmp_path / "copy") == CONFIG


def test_to_float32_and_back(official, tmp_path):
    convert_checkpoint(official, tmp_path / "wide", to="float32")
    wide = contents(tmp_path / "wide")
    assert {dtype for dtype, _ in wide.values()} == {"F32", "I64"}
    original = contents(official)
    for name, (_, values) in wide.items():
        assert np.array_equal(values, original[name][1].astype(values.dtype)), name
    convert_checkpoint(tmp_path / "wide", tmp_path / "kept")  # 'keep' must not round
    same(contents(tmp_path / "kept"), wide)
    convert_checkpoint(tmp_path / "wide", tmp_path / "narrow", to="bfloat16")
    same(contents(tmp_path / "narrow"), original)


def test_destination_is_protected(official, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError):
        convert_checkpoint(official, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("to", ["keep", "bfloat16", "fp8-fp4"])
@pytest.mark.parametrize("release", [storage.PLAIN, storage.PREVIEW], ids=["plain", "quantised"])
def test_a_conversion_is_a_load_and_a_save_but_reads_a_tensor_at_a_time(tmp_path, monkeypatch, release, to):
    synthetic.write_checkpoint(tmp_path / "source", synthetic.repeated_config(), release)
    policy = Policy.of(to) if to == "bfloat16" else None
    loaded = load_checkpoint(
        tmp_path / "source", policy, weights="native" if policy is None else "dequantized"
    )
    names_of = {spec.name: spec for spec in names.official_tensors(loaded.config)}
    save_checkpoint(
        tmp_path / "saved",
        loaded.config,
        loaded.parameters,
        stored=dict.fromkeys(names_of, "BF16") if to == "bfloat16" else loaded.stored,
        side_files=loaded.side_files,
        release=storage.PREVIEW if to == "fp8-fp4" else None,
    )
    sizes, aligned = [], read.aligned

    def counted(shape, dtype):
        sizes.append(int(np.prod(shape)))
        return aligned(shape, dtype)

    monkeypatch.setattr(read, "aligned", counted)
    convert_checkpoint(tmp_path / "source", tmp_path / "converted", to=to)
    saved, converted = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("saved", "converted")
    )
    assert converted == saved
    assert max(sizes) == max(int(np.prod(spec.shape)) for spec in names_of.values())
    assert max(sizes) < max(leaf.size for leaf in jax.tree.leaves(loaded.parameters))


def test_a_source_that_changes_meanwhile_gives_nothing(tmp_path):
    synthetic.write_checkpoint(tmp_path / "source", synthetic.smallest_config())

    def change(name, done, total):
        if done == total:
            path = tmp_path / "source" / "config.json"
            path.write_bytes(path.read_bytes() + b" ")
            (file,) = (tmp_path / "source").glob("*.safetensors")
            os.utime(file, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed|replaced|rewritten"):
        convert_checkpoint(tmp_path / "source", tmp_path / "converted", writing=change)
    assert not list(tmp_path.glob("converted/*.json"))


def test_progress_reaches_the_end(official, tmp_path):
    seen_reading, written = [], []
    convert_checkpoint(
        official,
        tmp_path / "copy",
        reading=lambda name, done, total: seen_reading.append((done, total)),
        writing=lambda name, done, total: written.append((done, total)),
    )
    for seen in (seen_reading, written):
        assert seen[-1][0] == seen[-1][1] > 0
        assert seen == sorted(seen)
