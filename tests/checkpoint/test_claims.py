"""What a config claims is compared with what the files hold before anything is built from the claim."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax import config
from dsv4_jax.checkpoint import names, storage
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.config.io import read_config_file
from dsv4_jax.errors import CheckpointError, ConfigError
from dsv4_jax.inspection import costs
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic


def claim(directory: Path, **fields: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("make", [config.v4_flash, config.tiny, lambda: config.tiny(11)])
def test_tensors_are_counted_without_listing_the_experts(make, layout: names.Layout) -> None:
    made = make()
    assert names.num_tensors(made, layout) == len(names.layout_tensors(made, layout))
    for release in (storage.PLAIN, storage.PREVIEW, storage.FLASH_0731):
        listed = storage.total_bytes(storage.released_tensors(made, release))
        assert storage.stored_bytes(made, release) == listed


def test_three_million_experts_beside_three(tmp_path: Path) -> None:
    synthetic.write_checkpoint(tmp_path, synthetic.smallest_config())
    claim(tmp_path, n_routed_experts=3_000_000)
    start = time.perf_counter()
    (problem,) = verify_checkpoint(tmp_path).problems
    assert "n_routed_experts=3000000" in problem and "describes 45000" in problem
    with pytest.raises(CheckpointError, match="the files hold 1"):
        load_checkpoint(tmp_path, Policy.of())
    # Without files to compare with, the cost of the model is counted from shapes.
    found = costs.inspect_file(read_config_file(tmp_path))
    assert found.layer.expert * 3_000_000 * 4 < found.parameters.total
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("layers", [1001, 2**31 - 1])
def test_more_layers_than_can_be_listed(tmp_path: Path, layers: int) -> None:
    synthetic.write_checkpoint(tmp_path, synthetic.smallest_config())
    claim(tmp_path, num_hidden_layers=layers)
    assert "num_hidden_layers" in verify_checkpoint(tmp_path).problems[0]
    with pytest.raises(ConfigError, match=r"num_hidden_layers=\d+ must be in 1 .. 1000"):
        read_config_file(tmp_path)


def test_layers_without_a_pattern_are_split_in_time() -> None:
    kinds = np.random.default_rng(0).choice(["window", "csa", "hca"], 1000)
    made = config.tiny(1000, attention_kinds=tuple(map(str, kinds)), router_kinds=("learned",) * 1000)
    start = time.perf_counter()
    assert sum(len(stack.kinds) * stack.repeats for stack in config.layer_stacks(made)) == 1000
    assert time.perf_counter() - start < 10
