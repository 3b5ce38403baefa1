"""Which mesh axes the dims of an activation get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.activations import Placement
from sharding.mesh import described, mesh_of
from sharding.rules import DECODE, TRAIN


@pytest.mark.parametrize(
    ("mesh", "table", "dims", "shape", "first", "spec"),
    [
        ("data=2,expert=4", DECODE, "B T D", (8, 3, 5), "", P(("data", "expert"), None, None)),
        # Rows that the devices of an axis do not divide are whole along it.
        ("data=2,expert=4", DECODE, "B T", (2, 3), "", P("data", None)),
        ("data=2,expert=4", DECODE, "B T", (4, 3), "", P("data", None)),
        ("data=2,expert=4", DECODE, "B T", (3, 3), "", P(None, None)),
        ("expert=4,tensor=2", DECODE, "B T G", (8, 1, 4), "", P(("expert", "tensor"), None, None)),
        ("expert=4,tensor=2", DECODE, "B T G", (8, 1, 4), "G", P("tensor", None, "expert")),
        ("data=2,context=2", TRAIN, "B T N D", (4, 6, 4, 8), "", P("data", "context", None, None)),
        ("data=2,context=4", TRAIN, "B T", (4, 6), "", P("data", None)),
        ("data=1", TRAIN, "B T", (4, 6), "", P(None, None)),
    ],
)
def test_a_dim_takes_the_axes_that_divide_it(mesh, table, dims, shape, first, spec):
    assert Placement(described(mesh), table).spec(dims, shape, first) == spec


def test_a_pinned_array_lies_as_its_spec_says():
    placement = Placement(mesh_of("data=2,expert=4"), DECODE)
    x = jax.jit(lambda x: placement.pinned(x + 1, "R B"))(jnp.zeros((3, 8, 2)))
    assert x.sharding.spec == P(None, ("data", "expert")) and len(x.sharding.device_set) == 8
    np.testing.assert_array_equal(x, 1)
