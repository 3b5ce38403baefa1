"""The same numbers in another dtype are read where reading is exact, and said where it is not."""

import jax
import numpy as np
import pytest

from dsv4_jax.checkpoint.convert import convert_checkpoint
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic

CONFIG = synthetic.smallest_config()


@pytest.fixture
def halves(tmp_path):
    """A checkpoint whose floating tensors, norms and mHC included, are all F16; its tables are I32."""
    tensors = {
        name: array.astype(np.int32 if array.dtype == np.int64 else np.float16)
        for name, array in synthetic.make_tensors(CONFIG).items()
    }
    synthetic.write_directory(tmp_path / "halves", synthetic.config_dict(CONFIG), tensors)
    return tmp_path / "halves", tensors


def test_float16_is_widened_exactly_to_float32(tmp_path, halves):
    directory, tensors = halves
    loaded = load_checkpoint(directory, Policy.of("float32"))
    assert loaded.warnings == ()
    np.testing.assert_array_equal(loaded.parameters["head"], tensors["head.weight"].astype(np.float32))
    table = loaded.parameters["stacks"][0]["blocks"][0]["ffn"]["gate"]["tid2eid"]
    np.testing.assert_array_equal(table[0], tensors["layers.0.ffn.gate.tid2eid"])
    assert verify_checkpoint(directory).sound
    # Saved again, what F16 holds exactly stays F16; tables are always I64.
    save_checkpoint(tmp_path / "saved", CONFIG, loaded.parameters, stored=loaded.stored)
    with open_checkpoint(tmp_path / "saved") as files:
        dtypes = {tensor.dtype for tensor in files.tensors.values()}
        assert dtypes == {"F16", "I64"}
        np.testing.assert_array_equal(files.read("head.weight"), tensors["head.weight"])


def test_convert_keeps_float16_bit_for_bit(tmp_path, halves):
    directory, tensors = halves
    assert convert_checkpoint(directory, tmp_path / "kept") == []
    with open_checkpoint(tmp_path / "kept") as files:
        for name, array in tensors.items():
            if array.dtype == np.float16:
                assert files.read(name).tobytes() == array.tobytes(), name


def test_float16_rounded_to_bfloat16_is_one_warning(halves):
    directory, tensors = halves
    loaded = load_checkpoint(directory, Policy.of("bfloat16"))
    (warning,) = loaded.warnings
    assert "stored as F16, rounded to bfloat16" in warning
    expected = jax.numpy.asarray(tensors["head.weight"]).astype("bfloat16")
    np.testing.assert_array_equal(loaded.parameters["head"], expected)
    norm = loaded.parameters["norm"]
    np.testing.assert_array_equal(norm, tensors["norm.weight"].astype(np.float32))  # float32 parameters


def test_infinity_in_float16_is_found(tmp_path, halves):
    directory, tensors = halves
    tensors["head.weight"][3, 4] = np.inf
    synthetic.write_directory(directory, synthetic.config_dict(CONFIG), tensors)
    with pytest.raises(CheckpointError, match=r"head.weight: 1 of \d+ values are NaN or infinite"):
        load_checkpoint(directory, Policy.of("float32"))
