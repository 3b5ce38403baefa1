"""A save never puts what a load refuses in the place of a sound checkpoint; a conversion refuses early."""

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.checkpoint import convert, storage
from dsv4_jax.checkpoint.convert import convert_checkpoint
from dsv4_jax.errors import CheckpointError
from pallas_kernels.formats.weights import is_quantized
from tests.checkpoint import synthetic


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def sound(tmp_path):
    synthetic.write_checkpoint(tmp_path / "sound", synthetic.smallest_config(), storage.PREVIEW)
    return tmp_path / "sound"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["norm", "embed"])  # float32, and bfloat16 that load does not scan
def test_numbers_that_are_not_finite_replace_nothing(sound, name, value):
    model, before = dsv4_jax.load(sound), contents(sound)
    model.parameters[name] = model.parameters[name].at[..., 3].set(value)
    with pytest.raises(CheckpointError, match=rf"{name}: \d+ of \d+ values are NaN or infinite"):
        model.save(sound, overwrite=True)
    assert contents(sound) == before
    model.parameters[name] = jnp.nan_to_num(model.parameters[name], nan=0, posinf=0, neginf=0)
    model.save(sound, overwrite=True)
    dsv4_jax.load(sound)


def test_every_parameter_that_is_not_finite_is_named(sound, tmp_path):
    model = dsv4_jax.load(sound)
    for name in ("norm", "embed", "head"):
        model.parameters[name] = jnp.full_like(model.parameters[name], jnp.nan)
    with pytest.raises(CheckpointError, match="3 problems"):
        model.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_scales_of_quantised_weights_are_looked_at(sound, tmp_path):
    model = dsv4_jax.load(sound)
    attention = model.parameters["stacks"][0]["blocks"][0]["attn"]
    weight = attention["wq_a"]
    assert is_quantized(weight)
    bad = weight.blocks.scale.at[..., 0, 0].set(255)
    attention["wq_a"] = type(weight)(type(weight.blocks)(weight.blocks.elements, bad), weight.dims)
    with pytest.raises(CheckpointError, match="attn/wq_a: 1 of .* scales are NaN"):
        model.save(tmp_path / "new")


@pytest.mark.parametrize("where", ["itself", "inside", "around", "a_link", "not_empty", "below_a_file"])
def test_a_conversion_refuses_its_destination_before_it_reads(sound, tmp_path, monkeypatch, where):
    (tmp_path / "link").symlink_to(sound)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    destination = {
        "itself": sound,
        "inside": sound / "converted",
        "around": tmp_path,
        "a_link": tmp_path / "link",
        "not_empty": tmp_path / "taken",
        "below_a_file": tmp_path / "taken" / "file" / "converted",
    }[where]
    monkeypatch.setattr(convert, "open_manifest", lambda *_, **__: pytest.fail("the source was read"))
    with pytest.raises(CheckpointError, match="cannot convert to"):
        convert_checkpoint(sound, destination, overwrite=where != "not_empty")
