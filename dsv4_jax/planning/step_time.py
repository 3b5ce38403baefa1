"""How long a step takes: a floor for each resource, and a range from stated efficiencies.

    floor     FLOPs / peak,  HBM bytes / HBM rate,  link bytes / link rate
    shortest  the longest of floor / best share, and the latency of every collective at its best
    longest   the sum of floor / worst share, the latency of every collective at its worst, and the operations
              that XLA makes beside the kernels

The shares are assumptions, each with its reason here; none was measured by this project.
"""

import dataclasses
import math

from dsv4_jax.planning.demand import Demand, hit_share
from dsv4_jax.planning.held import parts_of
from dsv4_jax.planning.job import Job
from sharding.dispatch_cost import LINKS


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of a resource's published rate that a whole step reaches.

    Attributes:
        compute: of the bf16 peak. Published training steps on TPUs, of mixtures of experts and dense models,
            are between 0.26 and 0.55; single matmul kernels are scheduled at up to 0.95 by the compiler.
        hbm: of the HBM rate. The compiler's own estimate of a plain copy is 0.81 of it; published decode
            steps of single large kernels are between 0.45 and 0.61.
        links: of the links' rate, which counts every direction in use at once.
        latency: seconds of one collective.
        operation: seconds of one operation of XLA's beside its kernels, of which there are many.
        even: whether experts get even shares of the tokens; else the busiest device decides.
    """

    compute: float
    hbm: float
    links: float
    latency: float
    operation: float
    even: bool


BEST = Shares(0.80, 0.81, 0.80, 1e-6, 0.0, even=True)
WORST = Shares(0.25, 0.40, 0.30, 1e-5, 1.16e-6, even=False)

OPERATIONS_A_LAYER = 267
"""Of XLA's own in one layer of a decode step, and 1.16 us each by the compiler: 11,496 operations of
13.3 ms in the 43 layers that `experiments/results/decode_step.json` holds."""

TIMES = {"decode": 1, "prefill": 1, "train": 4}
"""Passes over the layers: a training step goes forward, again, and backward, which is twice as much."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Of one step, in seconds.

    Attributes:
        floors: compute, hbm, links: at the published rates, each alone.
        shortest: with the best shares, and everything at the same time.
        longest: with the worst shares, one thing after the other.
    """

    floors: dict[str, float]
    shortest: float
    longest: float

    @property
    def bound(self) -> str:
        """The resource with the highest floor."""
        return max(self.floors, key=self.floors.__getitem__)

    @property
    def middle(self) -> float:
        """The geometric mean of the range, by which plans are ranked."""
        return math.sqrt(self.shortest * self.longest)


def step_time(job: Job, asked: Demand) -> StepTime:
    """Floors and range of a step."""
    chip, link = job.slice.chip, LINKS[job.slice.kind]
    floors = {
        "compute": sum(asked.flops.values()) / chip.bf16_flops,
        "hbm": sum(asked.hbm_bytes.values()) / chip.hbm_bytes_per_second,
        "links": asked.link_bytes / link.bytes_per_second,
    }
    best = {name: floors[name] / getattr(BEST, name) for name in floors}
    shortest = max(best.values()) + asked.collectives * BEST.latency
    busy = busiest(job, asked)
    chosen = asked.flops["expert products"] / chip.bf16_flops
    read = asked.hbm_bytes["experts"] / chip.hbm_bytes_per_second
    late = {
        "compute": floors["compute"] + (busy - 1) * chosen,
        "hbm": floors["hbm"] + (min(busy, _most_read(job, asked)) - 1) * read,
        "links": floors["links"],
    }
    operations = TIMES[job.work] * OPERATIONS_A_LAYER * job.model.num_hidden_layers
    longest = sum(late[name] / getattr(WORST, name) for name in late)
    longest += asked.collectives * WORST.latency + operations * WORST.operation
    return StepTime(floors, shortest, longest)


def busiest(job: Job, asked: Demand) -> float:
    """Tokens of the busiest device's experts over an even share, if routing is by chance: of n Poisson counts
    of mean m the largest is about m + sqrt(2 m ln n)."""
    sharing = job.placement.mesh.shape["expert"]
    if sharing == 1 or not asked.expert_tokens:
        return 1.0
    return 1 + math.sqrt(2 * math.log(sharing) / asked.expert_tokens)


def _most_read(job: Job, asked: Demand) -> float:
    """No device reads more than all of its experts."""
    expert = next((part for part in parts_of(job) if part.parameter.role == "expert"), None)
    return 1.0 if expert is None else 1 / max(hit_share(job, expert), 1e-9)
