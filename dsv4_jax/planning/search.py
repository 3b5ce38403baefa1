"""Meshes, cache formats and slices, all tried: plans that fit, the best, and those that none beats."""

import dataclasses
from collections.abc import Iterable

from dsv4_jax.errors import ProblemsError
from dsv4_jax.numerics.cache_formats import CacheFormat
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.plan import Plan, plan
from dsv4_jax.planning.slices import Slice, meshes, rented_slices


def candidates(job: Job, caches: Iterable[CacheFormat]) -> list[Plan]:
    """Plans of the job on every candidate mesh of its slice that the model's sizes allow, fitting or not.

    Args:
        job: whose mesh and cache are replaced.
        caches: formats to try.
    """
    found = []
    for mesh in meshes(job.slice.devices, job.work):
        for cache in caches:
            try:
                found.append(plan(dataclasses.replace(job, mesh=mesh, cache=cache)))
            except ProblemsError:  # the model's sizes forbid this mesh, which is what was asked
                continue
    return found


def best(job: Job, caches: Iterable[CacheFormat]) -> Plan | None:
    """The plan with the shortest step, by the middle of its range, of those that fit; the one that holds
    least of equals. None if none fits."""
    fitting = [each for each in candidates(job, caches) if each.fits]
    return min(fitting, key=lambda each: (each.time.middle, each.held.total), default=None)


def smallest(job: Job, caches: Iterable[CacheFormat]) -> Plan | None:
    """The best plan on the smallest rented slice of the job's kind of chip that holds it, or None."""
    formats = tuple(caches)
    for place in rented_slices(job.slice.kind):
        if found := best(dataclasses.replace(job, slice=place), formats):
            return found
    return None


def default_mesh(job: Job) -> str:
    """The candidate with the most expert parallelism, then the least tensor parallelism, that fits: experts
    are most of the weights, and whole experts move nothing but tokens. Where none fits, the first that the
    model's sizes allow.

    Raises:
        ProblemsError: if none is allowed, with the reasons of the first.
    """
    refusals, allowed = [], []
    for mesh in meshes(job.slice.devices, job.work):
        try:
            made = plan(dataclasses.replace(job, mesh=mesh))
        except ProblemsError as refused:
            refusals.append(refused)
            continue
        if made.fits:
            return mesh
        allowed.append(mesh)
    if not allowed:
        raise refusals[0]
    return allowed[0]


BATCHES = (1 / 4, 1, 4)
"""Of the rows that were asked for, as many are tried too, where a step takes longer and gives more."""


def batches(job: Job) -> tuple[int, ...]:
    """Rows to try, from the fewest: training keeps its own, which decide what is learned."""
    if job.work == "train":
        return (job.batch,)
    return tuple(sorted({max(1, round(job.batch * times)) for times in BATCHES}))


def front(
    job: Job, caches: Iterable[CacheFormat], slices: Iterable[Slice], rows: Iterable[int] = ()
) -> list[Plan]:
    """Best plans on slices that no other beats in latency, tokens a second a chip, and chips, all three at
    the middle of their ranges; from the fewest chips, and there from the fewest rows.

    Args:
        job: whose slice, mesh, cache and rows are replaced.
        caches: formats to try.
        slices: to try.
        rows: batches to try; none: the job's own.
    """
    formats, sizes = tuple(caches), tuple(rows) or (job.batch,)
    found = [
        best(dataclasses.replace(job, slice=each, batch=size), formats) for each in slices for size in sizes
    ]
    return pareto([each for each in found if each is not None])


def merits(each: Plan) -> tuple[float, float, int]:
    """Less is better: seconds of a step, minus tokens a second a chip, chips."""
    middle = each.time.middle
    return middle, -each.job.useful_tokens / each.job.slice.chips / middle, each.job.slice.chips


def pareto(plans: list[Plan]) -> list[Plan]:
    """Those that no other equals or beats in everything and beats in something."""

    def beaten(one: Plan) -> bool:
        mine = merits(one)
        return any(
            merits(other) != mine and all(a <= b for a, b in zip(merits(other), mine, strict=True))
            for other in plans
        )

    kept = (each for each in plans if not beaten(each))
    return sorted(kept, key=lambda each: (each.job.slice.chips, each.job.batch))
