"""The formula of weights against rows: what the collectives of compiled products really move."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import block_matmul
from sharding.activations import Placement
from sharding.linear import LinearOverMesh
from sharding.mesh import mesh_of
from sharding.rules import DECODE, TRAIN
from sharding.weight_traffic import Product, Traffic

PARTS, ROWS, INPUTS, OUTPUTS = 8, 16, 32, 48
ALL = jax.P(("expert", "tensor"))


def moved(function, placement, *operands):
    """float32 bytes that the collectives of a program bring to each device, by kind."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(placement.mesh, spec))
        for shape, spec in operands
    ]
    text = jax.jit(function).lower(*shapes).compile().as_text()
    found = {}
    for line in text.splitlines():
        kind = re.search(r" = (.*) (all-gather|all-to-all|reduce-scatter|all-reduce)\(", line)
        if not kind:
            continue
        results = re.findall(r"f32\[([\d,]*)\]", kind[1])
        size = sum(4 * math.prod(map(int, dims.split(","))) for dims in results)
        parts = PARTS if placement.mesh.shape["expert"] > 1 else placement.mesh.shape["tensor"]
        share = {"reduce-scatter": parts - 1, "all-reduce": 2 * (parts - 1) / parts}
        found[kind[2]] = found.get(kind[2], 0) + size * share.get(kind[2], (parts - 1) / parts)
    return found


def product(result, apart=True, inputs=INPUTS, parts=PARTS):
    weight_bytes = 4 * INPUTS * OUTPUTS
    return Product(parts, weight_bytes, inputs, OUTPUTS, result, apart)


def over(rules=DECODE, mesh="expert=4,tensor=2", grouped=False):
    placement = Placement(mesh_of(mesh), rules)
    how = block_matmul.grouped_linear if grouped else block_matmul.linear
    return LinearOverMesh(lambda x, w: how(x, w, impl="xla"), placement, grouped, by_device=False)


def test_rows_to_a_part_of_the_weight_and_back():
    split = over()
    weight = (PARTS, OUTPUTS // PARTS, INPUTS), ALL
    operands = ((ROWS, INPUTS), ALL), weight
    run = lambda x, w: split(x, w, out=(("G", 0),), by_rows=True)  # noqa: E731
    found = moved(run, split.placement, *operands)
    assert set(found) == {"all-gather", "all-to-all"}
    assert sum(found.values()) == product("back").of_rows(ROWS, 4)
    found = moved(lambda x, w: split(x, w, out=(("G", 0),)), split.placement, *operands)
    assert found == {"all-gather": product("stays").of_rows(ROWS, 4)}


def test_sums_over_parts():
    split = over()
    operands = ((ROWS, INPUTS), jax.P(None, ("expert", "tensor"))), (
        (OUTPUTS, INPUTS), jax.P(None, ("expert", "tensor")),
    )  # fmt: skip
    found = moved(lambda x, w: split(x, w, over=(("G", INPUTS),)), split.placement, *operands)
    assert sum(found.values()) == product("summed").of_rows(ROWS, 4)


@pytest.mark.parametrize("groups", [PARTS, PARTS // 2])
def test_groups_take_their_own_inputs(groups):
    """Of fewer groups than devices, whose outputs are then split: a device still gets one group's inputs."""
    split = over(grouped=True)
    weight = (groups, OUTPUTS, INPUTS), ALL if groups == PARTS else jax.P("expert", "tensor")
    operands = ((ROWS, groups, INPUTS), ALL), weight
    found = moved(lambda x, w: split(x, w, out=(("G", 0), ("O", 1))), split.placement, *operands)
    if groups == PARTS:
        assert sum(found.values()) == product("stays", inputs=INPUTS).of_rows(ROWS, 4)
    else:  # an exchange among 4 devices of what 2 rows have, and a gather of two halves
        exchanged, gathered = 3 / 4 * 2 * groups * INPUTS * 4, 1 / 2 * ROWS * INPUTS * 4
        assert found == {
            "all-to-all": pytest.approx(exchanged * (7 / 8) / (3 / 4)),
            "all-gather": pytest.approx(gathered * (7 / 8) / (1 / 2)),
        }
        assert exchanged + gathered == product("stays", inputs=INPUTS).of_rows(ROWS, 4)


def test_rows_that_are_whole_where_the_weight_is_cut():
    """As in training: nothing is brought together, and sums are added on every device."""
    split = over(TRAIN, "tensor=4")
    parts = {"apart": False, "parts": 4}
    found = moved(
        lambda x, w: split(x, w, out=(("G", 0),)), split.placement,
        ((ROWS, INPUTS), jax.P()), ((4, OUTPUTS // 4, INPUTS), jax.P("tensor")),
    )  # fmt: skip
    assert found == {} and product("stays", **parts).of_rows(ROWS, 4) == 0
    found = moved(
        lambda x, w: split.placement.pinned(split(x, w, over=(("G", INPUTS),)), "B"), split.placement,
        ((ROWS, INPUTS), jax.P(None, "tensor")), ((OUTPUTS, INPUTS), jax.P(None, "tensor")),
    )  # fmt: skip
    assert sum(found.values()) == product("summed", **parts).of_rows(ROWS, 4)


def test_a_remark_where_the_other_way_is_cheaper():
    assert product("back").of_weight() == 7 / 8 * 4 * INPUTS * OUTPUTS
    few = Traffic("w", 1, 8, ("expert",), weight_bytes=2**20, rows_bytes=2**19, chosen="rows")
    assert few.cheaper == "rows" and few.remark(4) is None
    many = Traffic("w", 1, 8, ("expert",), weight_bytes=2**20, rows_bytes=2**21, chosen="rows")
    assert "w is kept, which moves 2.000 MiB" in many.remark(4)
    assert "with 4 tokens gathering it would move 1.000" in many.remark(4)
    gathered = Traffic("w", 1, 8, ("fsdp",), weight_bytes=2**20, rows_bytes=0.0, chosen="weights")
    assert "w is gathered, which moves 1.000 MiB" in gathered.remark(4)
