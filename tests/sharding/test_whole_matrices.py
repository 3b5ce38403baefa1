"""Functions of whole matrices on eight devices, where each has a part of every matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.mesh import mesh_of
from sharding.whole_matrices import on_whole_matrices


def per_device(function, mesh, spec):
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def telling(matrices):
    """A function that needs every element of a matrix, in its place, and no other matrix."""
    order = jnp.arange(matrices[0].size, dtype=jnp.float32).reshape(matrices.shape[1:])
    axes = tuple(range(1, matrices.ndim))
    return matrices * (1 + order) - (matrices * order).sum(axes, keepdims=True)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
@pytest.mark.parametrize(
    "mesh, spec",
    [
        ("fsdp=8", P(None, None, None, "fsdp")),
        ("fsdp=8", P(None, "fsdp")),
        ("fsdp=4,tensor=2", P(None, "tensor", None, "fsdp")),
        ("fsdp=4,tensor=2", P(None, "fsdp", "tensor")),
        ("fsdp=2,expert=2,tensor=2", P(None, ("tensor", "expert"), None, "fsdp")),
        ("data=8", P()),
    ],
)
def test_results_are_those_of_one_device(count, mesh, spec):
    mesh = mesh_of(mesh)
    x = jnp.asarray(np.random.default_rng(count).standard_normal((count, 8, 2, 16)), jnp.float32)
    axes = tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else entry
        for entry in (*spec, *[None] * (4 - len(spec)))[1:]
    )
    sizes = [[mesh.shape[axis] for axis in dim] for dim in axes]
    split = per_device(lambda part: on_whole_matrices(telling, part, axes, sizes), mesh, spec)
    np.testing.assert_allclose(jax.jit(split)(x), telling(x), rtol=1e-6, atol=1e-4)


def test_stacks_that_are_split_stay_so():
    mesh, spec = mesh_of("fsdp=4,expert=2"), P("expert", None, "fsdp")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3, 8)), jnp.float32)
    axes = ((), ("fsdp",))

    def own(part):
        assert part.shape == (3, 3, 2)
        return on_whole_matrices(telling, part, axes, [[], [4]])

    np.testing.assert_allclose(jax.jit(per_device(own, mesh, spec))(x), telling(x), rtol=1e-6, atol=1e-4)
