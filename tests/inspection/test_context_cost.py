"""The published comparison with V3.2, from the shapes of our cache and counts of our parameters."""

import jax
import pytest

from dsv4_jax.config import tiny, v4_flash, v4_pro
from dsv4_jax.inspection.context_cost import context_cost
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy

MILLION = 2**20


@pytest.mark.parametrize(
    ("config", "per_token", "times_smaller", "of_gqa"),
    [(v4_flash(), 3514.25, 13.68, 0.0200), (v4_pro(), 5031.4375, 9.55, 0.0201)],
    ids=["flash", "pro"],
)
def test_cache(config, per_token, times_smaller, of_gqa):
    rows = {row.name: row for row in context_cost(config, MILLION).caches}
    smallest = rows["this model, fp8+mxfp4"]
    assert float(smallest.per_token) == per_token
    assert smallest.v32_over_this == pytest.approx(times_smaller, abs=0.005)
    gqa = rows["GQA, 8 heads of 128, bf16"]
    assert float(smallest.per_token / gqa.per_token) == pytest.approx(of_gqa, abs=5e-5)
    assert smallest.at_context == int(per_token * MILLION)


@pytest.mark.parametrize(
    ("config", "linear", "plain", "attention", "indexer", "share"),
    [
        (v4_flash(), 26.54, 1.84, 23.61, 90.19, 0.101),
        (v4_pro(), 97.70, 3.95, 76.67, 128.85, 0.267),
    ],
    ids=["flash", "pro"],
)
def test_flops(config, linear, plain, attention, indexer, share):
    cost = context_cost(config, MILLION)
    found = [cost.flops.linear, cost.flops.attention, cost.flops.indexer]
    assert [round(value / 1e9, 2) for value in found] == [linear, attention, indexer]
    assert cost.flops.plain / 1e9 == pytest.approx(plain, abs=0.01)  # without the norms' few weights
    assert cost.v32_flops.total / 1e9 == pytest.approx(1157.7, abs=0.05)
    assert cost.fp8_equivalent_share == pytest.approx(share, abs=0.0006)


def test_a_short_context_is_not_charged_for_what_it_does_not_see():
    short = context_cost(v4_flash(), 3)
    assert short.flops.indexer == 0
    assert short.flops.attention == 4 * 64 * 512 * 43 * 3


@pytest.mark.parametrize(("context", "allocated"), [(3000, 4096), (4096, 4096), (65_000, 65_000)])
def test_what_is_allocated_is_what_a_cache_takes(context, allocated):
    """By its real arrays, for a context between two powers of two; the last one is all the model holds."""
    model = LanguageModel.random(tiny(4, max_position_embeddings=65_000), Policy.of("bfloat16"))
    cost = context_cost(model.config, context)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(model.new_cache(1, context)))
    assert cost.allocated_tokens == allocated
    rows = {row.name: row for row in cost.caches}
    assert rows["this model, bf16"].allocated == taken > rows["this model, bf16"].at_context
    assert rows["DeepSeek-V3.2, fp8"].allocated is None


def test_the_context_must_fit():
    with pytest.raises(ValueError, match="context=0 must be an integer in 1..65536"):
        context_cost(tiny(), 0)
