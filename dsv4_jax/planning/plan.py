"""A plan: what a job holds, asks for and takes, joined, and the largest jobs like it that fit."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning.demand import Demand, demand
from dsv4_jax.planning.held import Held, held
from dsv4_jax.planning.job import Job, check
from dsv4_jax.planning.step_time import StepTime, step_time

BASIS = (
    "Computed from shapes, published rates and stated shares of them (dsv4_jax/planning/step_time.py); "
    "nothing was measured or compiled."
)

COMPILED_BASIS = (
    "Computed from shapes, published rates and stated shares of them (dsv4_jax/planning/step_time.py); "
    "beside it the TPU compiler's own figures of the step that it made for this slice. Nothing ran."
)

MOST_ROWS = 2**20
"""Of a batch that is looked for; nobody serves more."""

CONTEXT_STEP = 1024
"""Tokens that a largest context is a multiple of."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of a job on its slice, by formula.

    Attributes:
        job: what was planned.
        held: bytes on one device.
        demand: of one device in a step.
        time: of a step, in seconds.
    """

    job: Job
    held: Held
    demand: Demand
    time: StepTime

    @property
    def limit(self) -> int:
        """Bytes of HBM that a program may use on a device."""
        return self.job.slice.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        """Whether what is held is within the limit; temporaries are an estimate."""
        return self.held.total <= self.limit

    @property
    def fits_without_estimates(self) -> bool:
        """Whether what is known, all but temporaries and gradients, is within the limit."""
        return self.held.total - self.held.temporaries - self.held.gradients <= self.limit

    @property
    def tokens_a_second_a_chip(self) -> tuple[float, float]:
        """Useful tokens, at the longest and at the shortest step."""
        tokens = self.job.useful_tokens / self.job.slice.chips
        return tokens / self.time.longest, tokens / self.time.shortest

    @property
    def model_flops_share(self) -> tuple[float, float]:
        """Model FLOPs over the bf16 peak (MFU), at the longest and at the shortest step."""
        whole = self.demand.model_flops / self.job.slice.chip.bf16_flops
        return whole / self.time.longest, whole / self.time.shortest

    @property
    def hbm_share(self) -> tuple[float, float]:
        """Bytes of HBM over its rate, at the longest and at the shortest step."""
        floor = self.time.floors["hbm"]
        return floor / self.time.longest, floor / self.time.shortest

    @property
    def link_bytes_by_axes(self) -> dict[str, float]:
        """Bytes that come to a device in a step, by the axes of the mesh that they move along."""
        found: dict[str, float] = {}
        for each in self.demand.moved:
            found[each.axes] = found.get(each.axes, 0.0) + each.num_bytes
        return found

    @functools.cached_property
    def largest_batch(self) -> int:
        """At this context and mesh; 0 if not even one row fits."""
        return largest_batch(self.job)

    @functools.cached_property
    def largest_context(self) -> int:
        """At this batch and mesh; 0 if none fits."""
        return largest_context(self.job)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: bytes, FLOPs and seconds, of one device and one step."""
        job = self.job
        asked = {
            name: getattr(job, name) for name in ("work", "batch", "context", "mesh", "cache", "weights")
        }
        asked |= {"slice": str(job.slice), "chips": job.slice.chips, "devices": job.slice.devices}
        if job.work == "train":
            asked["optimizer"] = job.optimizer
        asked |= {"draft": job.draft, "tokens_a_pass": job.tokens_a_pass, "tokens_of_a_row": job.places}
        return {
            "basis": BASIS,
            "job": asked,
            "held_bytes": dataclasses.asdict(self.held) | {"total": self.held.total},
            "hbm_limit_bytes": self.limit,
            "fits": self.fits,
            "flops": self.demand.flops,
            "model_flops": self.demand.model_flops,
            "hbm_bytes": self.demand.hbm_bytes,
            "link_bytes": self.link_bytes_by_axes,
            "collectives": self.demand.collectives,
            "floors_seconds": self.time.floors,
            "bound": self.time.bound,
            "step_seconds": [self.time.shortest, self.time.longest],
            "tokens_a_second_a_chip": list(self.tokens_a_second_a_chip),
            "model_flops_share": list(self.model_flops_share),
            "hbm_share": list(self.hbm_share),
            "largest_batch": self.largest_batch,
            "largest_context": self.largest_context,
        }


def plan(job: Job) -> Plan:
    """The plan of a job, whether it fits or not.

    Raises:
        ProblemsError: for a job that cannot be planned, or where the model's sizes forbid the mesh.
    """
    check(job)
    asked = demand(job)
    return Plan(job, held(job), asked, step_time(job, asked))


def fits(job: Job) -> bool:
    """Whether a device holds the job."""
    return held(job).total <= job.slice.chip.hbm_bytes


def largest_batch(job: Job) -> int:
    """Most rows that fit at the job's context: a multiple of the ways that the mesh splits rows, for rows
    that cannot be split are copied; fewer rows where not even one for each way fits."""
    ways = math.prod(job.placement.mesh.shape.values())
    axes = job.placement.axes_for("B", ways)
    ways = math.prod(job.placement.mesh.shape[axis] for axis in axes)
    found = ways * _last(lambda n: fits(dataclasses.replace(job, batch=n * ways)), MOST_ROWS // ways)
    if found:
        return found
    fewer = (n for n in range(ways - 1, 0, -1) if ways % n == 0)
    return next((n for n in fewer if fits(dataclasses.replace(job, batch=n))), 0)


def largest_context(job: Job) -> int:
    """Most tokens of a row that fit at the job's batch: a multiple of 1024, or all that the model has
    positions for."""
    most = job.config.max_position_embeddings
    step = min(CONTEXT_STEP, most)
    if fits(dataclasses.replace(job, context=most)):
        return most
    return step * _last(lambda n: fits(dataclasses.replace(job, context=n * step)), most // step)


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The last n of 1 .. most for which it holds, by bisection; 0 if it holds for none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def refusal(made: Plan, smaller: Plan | None) -> ProblemsError:
    """Why a job does not fit, and what would.

    Args:
        made: the plan that does not fit.
        smaller: the same work on the smallest slice of the same kind of chip that holds it, if any does.
    """
    gib = {name: size / 2**30 for name, size in dataclasses.asdict(made.held).items() if size}
    parts = ", ".join(f"{name} {size:.2f}" for name, size in gib.items())
    job = made.job
    problems = [f"a device would hold {made.held.total / 2**30:.2f} GiB of {made.limit / 2**30:.2f}: {parts}"]
    if smaller is None:
        problems.append(f"no slice of {job.slice.kind} that is rented holds it, on any mesh that was tried")
    else:
        there = f"{smaller.job.slice} --mesh {smaller.job.mesh}"
        problems.append(f"smallest slice that holds it: {there} (batch there up to {smaller.largest_batch})")
    if most := made.largest_batch:
        problems.append(f"largest batch on this slice and mesh at context {job.context}: {most}")
    else:
        problems.append(f"on this slice and mesh not even one row fits at context {job.context}")
    return ProblemsError(f"does not fit on {job.slice} with --mesh {job.mesh}", problems)
