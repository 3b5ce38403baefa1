"""Values in and out where one process has all devices; `tests/test_several_processes.py` has two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding.agreement import collected, differences
from sharding.host_values import fetched, put
from sharding.mesh import mesh_of

SPLIT = NamedSharding(mesh_of("data=8"), PartitionSpec("data"))


@pytest.mark.parametrize("x", [np.arange(16).reshape(8, 2), jnp.arange(8.0), list(range(8))])
def test_what_is_put_is_fetched(x):
    there = put(np.asarray(x) if isinstance(x, list) else x, SPLIT)
    assert there.sharding == SPLIT
    back = fetched({"there": [there, 3, None], "host": np.ones(2)})
    np.testing.assert_array_equal(back["there"][0], x)
    assert isinstance(back["there"][0], np.ndarray) and back["there"][1:] == [3, None]
    np.testing.assert_array_equal(back["host"], np.ones(2))


def test_keys_are_put():
    keys = jax.random.split(jax.random.key(3), 8)
    there = put(keys, SPLIT)
    assert there.sharding == SPLIT and bool((there == keys).all())


def test_a_process_alone_agrees_with_itself():
    assert collected(["ä", "b"]) == [["ä", "b"]]
    assert differences({"seed": "1"}) == []
