"""A derived model ships new tensors in a shard of their own, and the base's shards with the stale copies."""

import json

import numpy as np

from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic

OVERLAY = "overlay.safetensors"
INDEX = "model.safetensors.index.json"


def test_the_index_decides_and_one_warning_names_the_copies(tmp_path):
    made = synthetic.smallest_config()
    tensors = synthetic.write_checkpoint(tmp_path, made, shards=2)
    new = {name: tensors[name] * 2 for name in ("head.weight", "norm.weight")}
    (tmp_path / OVERLAY).write_bytes(synthetic.safetensors_bytes(new))
    index = json.loads((tmp_path / INDEX).read_text())
    stale = {name: index["weight_map"][name] for name in new}
    index["weight_map"] |= dict.fromkeys(new, OVERLAY)
    (tmp_path / INDEX).write_text(json.dumps(index))

    loaded = load_checkpoint(tmp_path, Policy.of("bfloat16"))
    np.testing.assert_array_equal(loaded.parameters["head"], new["head.weight"])
    np.testing.assert_array_equal(loaded.parameters["norm"], new["norm.weight"].astype(np.float32))
    (warning,) = loaded.warnings
    assert all(f"{name} in {shard}" in warning for name, shard in stale.items())
    found = verify_checkpoint(tmp_path)
    assert found.sound and found.warnings == (warning,)
