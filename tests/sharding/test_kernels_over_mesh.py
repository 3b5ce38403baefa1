"""Kernels of decode, of the experts and of the loss in the interpreter: a mesh gives what one device gives.

Those of the other families are in `test_by_device.py` and `test_linear.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.model.entries import Entries
from dsv4_jax.model.operations import Queries, operations
from dsv4_jax.numerics import cache_storage
from dsv4_jax.numerics.cache_formats import store_entries, store_keys
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.blocks import quantize_mxfp4
from sharding.activations import Placement
from sharding.mesh import mesh_of
from sharding.rules import DECODE, TRAIN
from tests.kernels.checks import assert_close

RNG = np.random.default_rng(0)
BOUND = 1e-5
"""float32, relative to the largest: sums over devices are added in another order."""


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def both(policy, mesh, table):
    return operations(policy), operations(policy, placement=Placement(mesh_of(mesh), table))


def kernels_in(function, *operands):
    return str(jax.make_jaxpr(function)(*operands)).count("pallas_call")


@pytest.mark.parametrize(
    ("kind", "format"), [("window", "plain"), ("hca", "fp8+mxfp4"), ("csa", "fp8+mxfp4")]
)
def test_attention_to_a_cache(kind, format):
    """Rows over four devices: each reads its own rings, entries and index keys, and chooses its own."""
    batch, length, heads, width, num_rotary = 4, 2, 4, 512 if format != "plain" else 128, 64
    policy = Policy.of("float32", kernels="pallas-interpret", cache=format)
    one, spread = both(policy, "data=2,expert=2", DECODE)

    def stack(slots, width, store):
        rows = normal(2, batch, slots, width)
        empty = cache_storage.empty_stack((2, batch, slots, width), store, np.dtype("float32"), False)
        whole = jnp.zeros(batch, jnp.int32), jnp.full(batch, slots, jnp.int32)
        for repeat in range(2):
            empty = one.store(empty, jnp.int32(repeat), store(rows[repeat]), *whole)
        return cache_storage.in_rows(empty)

    as_entries = lambda x: store_entries(x, format, num_rotary)  # noqa: E731
    ring = cache_storage.empty((2, batch, 12, width), as_entries, np.dtype("float32"), False)
    start = jnp.asarray([0, 3, 20, 7], jnp.int32)
    ring = one.keep(ring, jnp.int32(1), as_entries(normal(batch, 8, width)), start, start * 0 + 8)
    position = start[:, None] + jnp.asarray([6, 7], jnp.int32)
    seen = jnp.asarray([[5, 6], [0, 1], [16, 16], [9, 9]], jnp.int32)
    index = (normal(batch, length, 4, 128), normal(batch, length, 4)) if kind == "csa" else (None, None)
    limits = (None, None) if kind == "window" else (0 * seen, seen)
    queries = Queries(normal(batch, length, heads, width), position, *limits, *index)
    entries = None if kind == "window" else Entries(stack(16, width, as_entries), jnp.int32(1))
    keys = Entries(stack(16, 128, lambda x: store_keys(x, format)), jnp.int32(1)) if kind == "csa" else None
    operands = queries, Entries(ring, jnp.int32(1)), entries, keys, normal(heads)
    sizes = {"window": 8, "top_k": 4, "rounded_scores": False}
    call, split = (functools.partial(each.attend_cached, **sizes) for each in (one, spread))
    assert kernels_in(split, *operands) == kernels_in(call, *operands) >= (2 if kind == "csa" else 1)
    got = jax.jit(split)(*operands)
    assert got.sharding.spec[0] == ("data", "expert")
    assert_close(got, jax.jit(call)(*operands), BOUND)


@pytest.mark.parametrize("format", ["plain", "mxfp4"])
def test_experts(format):
    """Experts over two devices, their width over two more; a token of every row is padding."""
    policy = Policy.of("float32", kernels="pallas-interpret")
    one, spread = both(policy, "expert=2,tensor=2,data=2", DECODE)
    gate_up, down = normal(4, 2, 256, 128) / 8, normal(4, 128, 256) / 8
    if format == "mxfp4":
        gate_up, down = quantize_mxfp4(gate_up), quantize_mxfp4(down)
    ids = jnp.asarray(np.argsort(RNG.random((8, 3, 4)), axis=-1)[..., :2], jnp.int32)
    x, weights, valid = normal(8, 3, 128), jnp.abs(normal(8, 3, 2)), jnp.arange(3) < jnp.full((8, 1), 2)

    def run(operation, rows):
        def loss(x, weights):
            given = [a if rows else a.reshape(-1, *a.shape[2:]) for a in (x, ids, weights, valid)]
            x, own_ids, weights, own_valid = given
            y = operation(x, gate_up, down, own_ids, weights, valid=own_valid, swiglu_limit=2.0)
            return (y * x).sum(), y.reshape(8, 3, -1)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    assert kernels_in(run(spread.experts, True), x, weights) >= 2
    got, want = jax.jit(run(spread.experts, True))(x, weights), jax.jit(run(one.experts, False))(x, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, BOUND)


def test_the_loss():
    """Twelve tokens over eight devices: four have padding alone."""
    policy = Policy.of("float32", kernels="pallas-interpret")
    one, spread = both(policy, "fsdp=2,expert=2,tensor=2", TRAIN)
    hidden, head = normal(12, 128), normal(256, 128)
    ids, weights = jnp.asarray(RNG.integers(0, 256, 12), jnp.int32), jnp.abs(normal(12)).at[3].set(0)

    def run(operation):
        loss = lambda hidden, head: operation(hidden, head, ids, weights)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))

    assert kernels_in(run(spread.cross_entropy), hidden, head) >= 2
    got = jax.jit(run(spread.cross_entropy))(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(one.cross_entropy)(hidden, head)), strict=True):
        assert_close(a, b, BOUND)
