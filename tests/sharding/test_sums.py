"""Sums over devices: float32 in the order of devices, their gradients, and what a TPU makes of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.mesh import mesh_of
from sharding.sums import scattered, whole
from tests.kernels.ahead_of_time import compile_on, devices

AXES = ("expert", "tensor")


def over(mesh, function, result):
    """`function` of [n, rows, D], of which each device has one part."""
    return jax.shard_map(
        lambda parts: function(parts[0], AXES), mesh=mesh, in_specs=P(AXES), out_specs=result, check_vma=False
    )


CASES = {"scattered": (scattered, P(AXES)), "whole": (whole, P())}


@pytest.mark.parametrize("rows", [16, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype, rows):
    if name == "scattered" and rows == 3:
        rows = 8
    function, result = CASES[name]
    rng = np.random.default_rng(0)
    parts = jnp.asarray(rng.standard_normal((8, rows, 4)), dtype)
    dy = jnp.asarray(rng.standard_normal((rows, 4)), dtype)
    split = over(mesh_of("expert=4,tensor=2"), function, result)

    @jax.jit
    def run(parts, dy):
        loss = lambda parts: (split(parts).astype(jnp.float32) * dy).sum()  # noqa: E731
        return split(parts), jax.grad(loss)(parts)

    y, gradient = run(parts, dy)
    want = np.asarray(parts, np.float64).sum(axis=0)
    # One rounding of the sum, where it is rounded at all; never one of each addition.
    limit = 4e-3 if y.dtype == jnp.bfloat16 else 1e-6
    assert (np.abs(np.asarray(y, np.float64) - want) <= limit * np.abs(want) + 1e-6).all()
    np.testing.assert_array_equal(gradient, jnp.broadcast_to(dy, parts.shape))


def program(function, dtype, rows, result):
    mesh = mesh_of("expert=8,tensor=2", devices("v6e 4x4"))
    shape = jax.ShapeDtypeStruct((16, rows, 1024), dtype)
    split = over(mesh, function, result)
    text = compile_on(lambda x: split(2 * x), [shape], [NamedSharding(mesh, P(AXES))]).as_text()
    found = re.findall(r"= (\S+) (all-reduce|reduce-scatter|all-to-all|all-gather)(?:-start)?\(", text)
    return [(what, shape.split("[")[0]) for shape, what in found]


def test_what_a_tpu_moves():
    """The bytes of a reduce-scatter in the dtype of the parts, where `psum_scatter` is an all-reduce;
    once that is different, this test says so."""
    assert program(scattered, jnp.bfloat16, 64, P(AXES)) == [("all-to-all", "bf16")]
    assert program(whole, jnp.bfloat16, 64, P()) == [("all-to-all", "bf16"), ("all-gather", "bf16")]
    plain = functools.partial(jax.lax.psum_scatter, scatter_dimension=0, tiled=True)
    assert [what for what, _ in program(plain, jnp.float32, 1024, P(AXES))] == ["all-reduce"]
