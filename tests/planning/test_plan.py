"""Plans: the largest jobs that fit are the largest, searches agree with sweeps, money with arithmetic."""

import dataclasses
import itertools
import json

import pytest

from dsv4_jax.config import v4_flash, v4_pro
from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning.demand import demand
from dsv4_jax.planning.held import held, parts_of, row_bytes
from dsv4_jax.planning.job import Job, check
from dsv4_jax.planning.money import money
from dsv4_jax.planning.plan import fits, largest_batch, largest_context, plan
from dsv4_jax.planning.search import best, default_mesh, front, merits, pareto, smallest
from dsv4_jax.planning.slices import parse_slice
from dsv4_jax.planning.step_time import step_time
from tests.models import all_kinds

CACHES = ("plain", "fp8+fp8", "fp8+mxfp4")


def job(name="v6e:4x8", mesh="expert=32", batch=64, context=65536, work="decode", config=None, **more):
    return Job(config or v4_flash(), parse_slice(name)[0], work, batch, context, mesh, **more)


@pytest.mark.parametrize("mesh", ["expert=32", "expert=16,tensor=2", "data=2,expert=16"])
def test_no_row_more_than_the_largest_batch_fits(mesh):
    one = job(mesh=mesh)
    most = largest_batch(one)
    ways = most // dataclasses.replace(one, batch=most).rows_a_device
    assert fits(dataclasses.replace(one, batch=most))
    assert not fits(dataclasses.replace(one, batch=most + ways))


def test_no_context_more_than_the_largest_fits():
    one = job(batch=4096)
    most = largest_context(one)
    assert 0 < most < one.config.max_position_embeddings and most % 1024 == 0
    assert fits(dataclasses.replace(one, context=most))
    assert not fits(dataclasses.replace(one, context=most + 1024))
    assert largest_context(job(batch=1)) == one.config.max_position_embeddings
    assert largest_context(job("v6e:1x1", "data=1")) == largest_batch(job("v6e:1x1", "data=1")) == 0


def test_json_of_a_plan_adds_up():
    made = plan(job(mesh="expert=16,tensor=2"))
    plain = json.loads(json.dumps(made.to_json()))
    parts = plain["held_bytes"]
    assert sum(size for name, size in parts.items() if name != "total") == parts["total"]
    assert parts["total"] < plain["hbm_limit_bytes"] and plain["fits"]
    assert sum(plain["link_bytes"].values()) == pytest.approx(made.demand.link_bytes)
    slow, fast = plain["tokens_a_second_a_chip"]
    assert (
        fast * plain["step_seconds"][0] == pytest.approx(64 / 32) == pytest.approx(slow * made.time.longest)
    )
    assert "nothing was measured or compiled" in plain["basis"]


def swept(one, caches):
    """(seconds, bytes) of every split of the devices over three axes, by loops of its own."""
    found, n = [], one.slice.devices
    rest = "fsdp" if one.work == "train" else "data"
    for a, e, t in itertools.product(range(1, n + 1), range(1, n + 1), (1, 2, 4, 8)):
        if a * e * t != n:
            continue
        for cache in caches:
            tried = dataclasses.replace(one, mesh=f"{rest}={a},expert={e},tensor={t}", cache=cache)
            try:
                check(tried)
                size = held(tried).total
            except ProblemsError:
                continue
            if size <= tried.slice.chip.hbm_bytes:
                time = step_time(tried, demand(tried))
                found.append(((time.shortest * time.longest) ** 0.5, size))
    return min(found)


@pytest.mark.parametrize(
    ("name", "work", "batch", "context"),
    [("v6e:4x4", "decode", 64, 65536), ("tpu7x:2x2x1", "prefill", 8, 8192), ("v5p:4x4x4", "train", 64, 4096)],
)
def test_the_best_is_the_best_of_a_sweep(name, work, batch, context):
    one = job(name, "data=1", batch, context, work)
    caches = CACHES if work == "decode" else ("fp8+mxfp4",)
    found = best(one, caches)
    assert found is not None
    assert (found.time.middle, found.held.total) == pytest.approx(swept(one, caches))


def test_the_smallest_slice_holds_it_and_no_smaller_one_does():
    found = smallest(job("v6e:2x2", "expert=4"), ("fp8+mxfp4",))
    assert found.fits and str(found.job.slice) == "v6e:2x4"
    assert best(job("v6e:2x2", "expert=4"), ("fp8+mxfp4",)) is None


def test_a_front_holds_nothing_that_is_beaten():
    slices = [parse_slice(f"v6e:{sides}")[0] for sides in ("2x4", "4x4", "4x8")]
    found = front(job(), ("fp8+mxfp4",), slices)
    assert found and pareto(found) == found
    for one, other in itertools.permutations(found, 2):
        assert any(a < b for a, b in zip(merits(one), merits(other), strict=True))
    slow = dataclasses.replace(found[0], time=dataclasses.replace(found[0].time, longest=1e3))
    assert slow not in pareto([slow, *found])


def test_the_default_mesh_is_the_most_expert_parallelism_that_fits():
    assert default_mesh(job(mesh="data=1")) == "expert=32"
    assert default_mesh(job("v6e:1x1")) == "data=1"  # which does not fit, but there is no other
    large = job("v5e:16x16", batch=256, config=v4_pro())
    assert default_mesh(large) == "expert=64,tensor=4"
    more = ("data=2,expert=128", "expert=128,tensor=2", "data=4,expert=64", "data=2,expert=64,tensor=2")
    assert not any(plan(dataclasses.replace(large, mesh=mesh)).fits for mesh in more)


def test_money_by_hand():
    made = plan(job())
    made = dataclasses.replace(made, time=dataclasses.replace(made.time, shortest=0.01, longest=0.04))
    cost = money(made, 2.7, 0.5, "flash")
    # 64 rows of 32 chips: 2 tokens a chip in 10 ms are 200 a second, 0.36 million an hour at half load.
    assert cost.least == pytest.approx(2.7 / 0.36)
    assert cost.most == pytest.approx(4 * 2.7 / 0.36)
    assert cost.published == 0.28 and cost.break_even == pytest.approx((0.28 * 0.09, 0.28 * 0.36))
    assert money(made, 2.7, 0.5, "config.json").published is None
    with pytest.raises(ProblemsError, match="2 problems"):
        money(made, 0.0, 1.5)


def test_a_tiny_model_by_hand():
    tiny = all_kinds(
        num_attention_heads=2, head_dim=16, index_n_heads=2, index_head_dim=8, num_experts_per_tok=2
    )
    one = job("v6e:1x1", "data=1", 1, 64, config=tiny, weights="bfloat16", cache="plain")
    flops, parts = demand(one).flops, parts_of(one)
    # 64 tokens: three windows of 8, 4 chosen of 16 entries of CSA, 4 entries of HCA.
    assert flops["attention"] == (3 * 8 + 4 + 4) * 4 * 2 * 16
    assert flops["indexer"] == 16 * 2 * 2 * 8
    # Three matrices of D x F an expert, two bytes a number; a token meets two experts of each layer.
    matrices = 3 * 3 * tiny.hidden_size * tiny.moe_intermediate_size
    assert flops["expert products"] == pytest.approx(2 * 2 * matrices)
    experts = sum(part.num_bytes for part in parts if part.parameter.role == "expert")
    assert experts == 2 * matrices * tiny.n_routed_experts
    assert flops["head"] == 2 * 61 * tiny.hidden_size
    # A token is a quarter of an entry and key of CSA and a sixteenth of an entry of HCA, in bfloat16.
    longer = dataclasses.replace(one, context=tiny.max_position_embeddings)
    per_token = row_bytes(longer).entries / tiny.max_position_embeddings
    assert per_token == pytest.approx(2 * ((16 + 8) / 4 + 16 / 16), rel=0.01)
