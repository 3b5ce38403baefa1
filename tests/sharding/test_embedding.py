"""Looking up rows of a split table: the rows and gradients of one device, and a table that never moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.model import tables
from sharding.activations import Placement
from sharding.embedding import EmbeddingOverMesh, cheaper
from sharding.mesh import mesh_of
from sharding.rules import DECODE, TRAIN

WIDTH = 16


def operands(batch, length, vocab):
    rng = np.random.default_rng(batch)
    table = rng.standard_normal((vocab, WIDTH)).astype(np.float32)
    return table, rng.integers(-1, vocab + 1, (batch, length)).astype(np.int32)  # some are clipped


@functools.cache
def gradient(over):
    def run(table, ids, dy):
        call = over or tables.by_rows
        return call(table, ids), jax.grad(lambda table: (call(table, ids) * dy).sum())(table)

    return jax.jit(run)


@pytest.mark.parametrize(
    ("mesh", "table", "batch", "length"),
    [
        ("fsdp=2,expert=2,tensor=2", TRAIN, 8, 6),
        ("fsdp=4,tensor=2", TRAIN, 3, 4),  # rows that are whole over fsdp, and no multiple of tensor
        ("data=2,fsdp=2,context=2", TRAIN, 4, 6),
        ("fsdp=8", TRAIN, 8, 200),  # more tokens than rows of the table: its columns travel
        ("fsdp=2,expert=2,tensor=2", DECODE, 8, 1),
        ("fsdp=2,expert=2,tensor=2", DECODE, 3, 1),
    ],
)
def test_rows_and_gradients(mesh, table, batch, length):
    given = operands(batch, length, 96)
    dy = np.random.default_rng(0).standard_normal((batch, length, WIDTH)).astype(np.float32)
    over = EmbeddingOverMesh(tables.by_rows, Placement(mesh_of(mesh), table))
    (got, found), (want, pulled) = (gradient(each)(*given, dy) for each in (over, None))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(found, pulled, rtol=0, atol=1e-6 * np.abs(pulled).max())


def program(vocab, length):
    """The compiled look-up with its gradient over fsdp, of a table that lies as training has it."""
    placement = Placement(mesh_of("fsdp=8"), TRAIN)
    places = [jax.NamedSharding(placement.mesh, spec) for spec in (jax.P(None, "fsdp"), jax.P("fsdp"))]
    table, ids = (
        jax.device_put(x, place) for x, place in zip(operands(8, length, vocab), places, strict=True)
    )
    over = EmbeddingOverMesh(tables.by_rows, placement)
    run = jax.jit(lambda *a: gradient(over)(*a)[1], out_shardings=places[0])
    return run.lower(table, ids, jnp.ones((*ids.shape, WIDTH))).compile().as_text()


def test_rows_travel_and_the_table_stays():
    few, many = program(4000, 6), program(96, 200)
    assert "f32[4000,16]" not in few and "f32[96,16]" in many
    assert cheaper(4096, 129_280) == "rows" and cheaper(200_000, 129_280) == "table"
