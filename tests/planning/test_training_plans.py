"""Training on a slice: what fsdp splits, what it brings together, and that V4-Flash fits a v6e slice."""

import dataclasses

import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.planning.demand import demand
from dsv4_jax.planning.held import held, moments, parts_of
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.plan import fits
from dsv4_jax.planning.slices import Slice

LARGE = 32 * 2**20


def job(mesh="fsdp=32,expert=8", name="v6e", sides=(16, 16), **more):
    return Job(v4_flash(), Slice(name, sides), "train", 256, 4096, mesh, **more)


@pytest.mark.parametrize("mesh", ["fsdp=32,expert=8", "fsdp=8,expert=32", "fsdp=16,expert=8,tensor=2"])
def test_no_large_matrix_is_whole_over_fsdp(mesh):
    split = [part for part in parts_of(job(mesh)) if "fsdp" in part.axes]
    whole = {part.parameter.row.path for part in parts_of(job(mesh)) if "fsdp" not in part.axes}
    # Mixing maps fold streams before D, of which only the first can be cut; routers are whole by rule.
    assert whole & {"attn/wq_b", "attn/wo_a", "attn/wo_b", "attn/indexer/wq_b", "head", "embed"} == set()
    assert all(
        part.num_bytes / part.parameter.shape[0] < LARGE
        for part in parts_of(job(mesh))
        if "fsdp" not in part.axes and "R" in part.parameter.dims
    )
    assert split


def test_flash_trains_on_the_largest_slice_of_v6e_and_on_none_with_everything_whole():
    assert fits(job())
    assert not fits(job("expert=256"))
    assert not fits(dataclasses.replace(job(), slice=Slice("v6e", (8, 16)), mesh="fsdp=16,expert=8"))


def test_moments_are_one_or_two_numbers_of_each_parameter():
    trained = sum(part.num_bytes for part in parts_of(job()) if part.parameter.role != "table")
    assert moments(job(optimizer="adamw")) == pytest.approx(2 * trained, rel=1e-3)
    assert trained < moments(job()) < 1.1 * trained  # Muon's one, and AdamW's two of what is no matrix


def test_more_ways_over_fsdp_bring_more_together():
    few, many = held(job("fsdp=8,expert=32")), held(job("fsdp=256"))
    assert many.weights < few.weights and many.temporaries > few.temporaries
    # float32 is read; twice as many numbers arrive, in half as many bytes each, and are written and read.
    alone = demand(job("expert=256")).hbm_bytes["experts"]
    assert demand(job("fsdp=2,expert=128")).hbm_bytes["experts"] == pytest.approx(3 * alone)
