"""What transports cost, by hand, and what is chosen by it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_matmul import expert_ffn
from sharding.dispatch_cost import LINKS, cheapest, choose_waves, chunk_rows, dispatch_costs, link_of
from sharding.expert_parallel import over_mesh
from sharding.mesh import AXES
from tests.sharding.test_expert_parallel import KE, WEIGHTS, mesh_of, operands


def test_costs():
    """The formula, by hand: 4 devices, 10 tokens each of 8 numbers of 2 bytes, 2 experts a token."""
    link = dataclasses.replace(
        LINKS["gpu"], bytes_per_second=1.0, memory_bytes_per_second=2.0, latency_seconds=3.0
    )
    shape = dict(tokens=10, hidden=8, top_k=2, number_bytes=2, devices=4, link=link)
    gather, dense, ragged = dispatch_costs(rows=5, shared=True, **shape)
    assert gather.sent_bytes == 3 * 10 * (8 * (2 + 4) + 8 * 2)
    assert gather.moved_bytes == (2 + 2 * 2) * 4 * 10 * 8 * 6 and gather.rows == 40
    assert gather.seconds == gather.sent_bytes + gather.moved_bytes / 2 + 3 * 3
    assert dense.sent_bytes == 3 * 5 * (8 * 6 + 8 * 2)
    assert dense.moved_bytes == (4 + 2 * 2) * 4 * 5 * 8 * 6 and dense.rows == 20 and dense.collectives == 4
    assert ragged.sent_bytes == pytest.approx(3 * ((1 - 0.75**2) * 10 * 8 * 6 + 5 * 16))
    _, dense, ragged = dispatch_costs(rows=5, shared=False, **shape)
    assert dense.sent_bytes == 3 * 5 * (8 * 6 + 8) and dense.moved_bytes == (4 + 2) * 4 * 5 * 8 * 6
    assert ragged.sent_bytes == 3 * (10 * 2 / 4 * 8 * 6 + 5 * 8)
    assert ragged.moved_bytes == (6 + 2) * 4 * 5 * 8 * 6
    narrow = dispatch_costs(rows=5, shared=False, sum_bytes=2, **shape)
    assert narrow[0] == gather and narrow[1].sent_bytes == 3 * 5 * (8 * 4 + 8)
    assert narrow[1].moved_bytes == 4 * 5 * 8 * (4 * 4 + 2 * 6)
    _, waves, _ = dispatch_costs(rows=5, shared=False, waves=3, **shape)
    assert waves.sent_bytes == 3 * dense.sent_bytes and waves.collectives == 8
    on_cpu = dispatch_costs(**shape | {"link": dataclasses.replace(link, places=False)}, rows=5, shared=True)
    assert [cost.moved_bytes for cost in on_cpu] == [2 * 4 * 10 * 48, 4 * 4 * 5 * 48, 6 * 4 * 5 * 48]
    torus = dataclasses.replace(link, torus=2)
    assert torus.links_crossed(4) == 1 and torus.links_crossed(64) == 4


def test_auto_takes_the_cheapest():
    flash = dict(hidden=4096, top_k=6, number_bytes=2)
    few = dispatch_costs(tokens=4, devices=16, link=LINKS["v6e"], **flash)
    many = dispatch_costs(tokens=4096, devices=64, link=LINKS["gpu"], **flash)
    cpu = dispatch_costs(tokens=4096, devices=64, link=LINKS["cpu"], **flash)
    transports = [cheapest(costs).transport for costs in (few, many, cpu)]
    assert transports == ["gather", "ragged", "all_to_all"]
    # Half as many again as 4096 * 6 / 64 and as 4096 * (1 - (1 - 1 / 64)^6), in whole tiles.
    assert chunk_rows(4096, 64, 6, shared=False) == 576 and chunk_rows(4096, 64, 6, shared=True) == 560
    assert chunk_rows(100, 2, 6, shared=True) == 100 and chunk_rows(1, 64, 6, shared=False) == 6
    kinds = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p", "TPU7x": "tpu7x"}
    assert {kind: link_of("tpu", kind) for kind in kinds} == kinds
    assert link_of("cpu", "cpu") == "cpu" and link_of("cuda", "H200") == "gpu"


def test_number_of_waves():
    """As many as pay for their collectives; one where nothing overlaps, and where nothing is exchanged."""
    link = dataclasses.replace(LINKS["v6e"], latency_seconds=0.0)
    shape = dict(tokens=4096, hidden=4096, top_k=6, number_bytes=2, devices=16)
    choose = functools.partial(choose_waves, own=12, width=2048, weight_bytes=0, **shape)
    assert choose("ragged", link=link) == 4  # the most that divides 12 and is not above 4
    assert choose("ragged", link=dataclasses.replace(link, latency_seconds=1.0)) == 1
    assert choose("gather", link=link) == choose("all_to_all", link=LINKS["cpu"]) == 1
    split = over_mesh(expert_ffn, mesh_of(), transport="all_to_all", waves=3, weight_axes=WEIGHTS)
    split = dataclasses.replace(split, mesh=jax.sharding.AbstractMesh((1, 1, 2, 1, 1), AXES))
    x, gate_up, down, *_ = operands()
    with pytest.raises(ValueError, match="waves=3 must divide the 4 experts of a device"):
        split.travel(gate_up, down, x, KE)
    many = jax.ShapeDtypeStruct((2**30, 8), jnp.float32)
    with pytest.raises(ValueError, match="536870912 x 3 pairs .* 2 x 2 lists need sort keys up to 8"):
        dataclasses.replace(split, waves=2).travel(gate_up, down, many, KE)
    assert dataclasses.replace(split, waves=2).travel(gate_up, down, x, KE).plan.waves == 2
