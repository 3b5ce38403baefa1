"""The analytic model of a plan: sums against counts made elsewhere, arithmetic by hand, and properties."""

import dataclasses

import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inspection.context_cost import token_flops
from dsv4_jax.inspection.spread import spread
from dsv4_jax.planning.demand import demand, mean_of_least
from dsv4_jax.planning.held import held
from dsv4_jax.planning.job import Job, check
from dsv4_jax.planning.slices import parse_slice
from dsv4_jax.planning.step_time import step_time


def job(name="v6e:4x8", mesh="expert=16,tensor=2", batch=64, context=65536, work="decode", **more):
    return Job(v4_flash(), parse_slice(name)[0], work, batch, context, mesh, **more)


def test_weights_and_caches_are_those_of_inspect():
    bare = dataclasses.replace(v4_flash(), num_nextn_predict_layers=0)
    found, same = held(job()), spread(bare, "expert=16,tensor=2", batch=64, context=65536)
    assert found.weights == sum(row.bytes_a_device for row in same.parameters)
    shown = sum(row.bytes_a_device for row in same.cache)
    assert found.cache + found.state == pytest.approx(shown, rel=0.01)  # kernels keep other paddings


def test_products_of_one_device_are_those_of_the_model():
    asked = demand(job("v6e:1x1", "data=1", batch=1))
    linear = sum(asked.flops[name] for name in ("dense products", "expert products", "head"))
    assert linear == pytest.approx(token_flops(v4_flash(), 65536).linear, rel=1e-3)
    assert asked.flops["indexer"] == 2 * 64 * 128 * 21 * 65536 / 4
    assert asked.moved == ()


def test_means_over_contexts_by_hand():
    assert mean_of_least(2, 1, 1, 4) == (1 + 2 + 2 + 2) / 4
    assert mean_of_least(2, 1, 4, 4) == 2
    assert mean_of_least(10, 4, 8, 8) == 2


@pytest.mark.parametrize("work", ["decode", "prefill", "train"])
def test_more_chips_never_hold_more(work):
    rest = "fsdp" if work == "train" else "tensor"
    sizes = [held(job(name, mesh, work=work, context=4096)).total for name, mesh in (
        ("v6e:4x4", "expert=16"), ("v6e:4x8", f"expert=16,{rest}=2"), ("v6e:8x8", f"expert=16,{rest}=4"),
    )]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True)


def test_a_range_contains_no_time_below_a_floor():
    for work in ("decode", "prefill", "train"):
        one = job(work=work, context=4096)
        time = step_time(one, demand(one))
        assert max(time.floors.values()) < time.shortest < time.middle < time.longest


def test_refusals_come_together():
    with pytest.raises(ProblemsError, match="4 problems") as refused:
        check(job(mesh="expert=16", batch=0, context=2**21, draft="dspark"))
    assert "takes 16 devices, and v6e:4x8 has 32 devices" in str(refused.value)
    assert parse_slice("v7:2x2")[0] is None and "3 sides, not 2" in parse_slice("v5p:2x2")[1][0]
