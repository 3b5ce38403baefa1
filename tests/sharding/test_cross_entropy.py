"""The loss over a mesh and its gradients are those of one device, whatever the number of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import weighted_cross_entropy
from sharding.activations import Placement
from sharding.cross_entropy import CrossEntropyOverMesh
from sharding.mesh import mesh_of
from sharding.rules import TRAIN


def one(hidden, head, ids, weights):
    return weighted_cross_entropy(hidden, head, ids, weights, impl="xla")


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "expert=4,context=2", "data=1"])
@pytest.mark.parametrize("tokens", [1, 13, 16])
def test_loss_and_gradients(mesh, tokens):
    rng = np.random.default_rng(tokens)
    hidden, head = (rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, 8), (11, 8)))
    ids = rng.integers(0, 11, tokens).astype(np.int32)
    weights = jnp.asarray(rng.random(tokens) * (np.arange(tokens) % 3 > 0), jnp.float32)
    over = CrossEntropyOverMesh(one, Placement(mesh_of(mesh), TRAIN))
    wanted, pulled = jax.value_and_grad(one, (0, 1))(hidden, head, ids, weights)
    got, found = jax.jit(jax.value_and_grad(over, (0, 1)))(hidden, head, ids, weights)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for a, b in zip(found, pulled, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.abs(b).max(), 1e-6))
