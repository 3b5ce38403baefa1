"""What a device of a plan holds: weights, optimizer, caches, state, and an estimate of temporaries."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from dsv4_jax.config import ModelConfig
from dsv4_jax.config.layer_stacks import layer_stacks
from dsv4_jax.inspection.spread import Weights, parameter_rows
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.gathering import GATHERED
from dsv4_jax.model.geometry import ROWS, allocated_length
from dsv4_jax.numerics.cache_formats import CacheFormat
from dsv4_jax.parameters import Parameter, parameters
from dsv4_jax.planning.job import Job
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.optimizer_groups import partition
from sharding.activations import Placement
from sharding.report import axes_of

MOMENTS = {"Muon": 1, "AdamW": 2, "SGD": 0, "rule": 0}
"""float32 numbers that the optimizer keeps for each number of a parameter."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter, and what one device has of it.

    Attributes:
        parameter: its line of the table.
        axes: of the mesh that split it.
        ways: parts that these make.
        num_bytes: that a device holds, scales included.
    """

    parameter: Parameter
    axes: tuple[str, ...]
    ways: int
    num_bytes: int

    @property
    def elements(self) -> float:
        """That a device holds."""
        return self.parameter.size / self.ways

    @property
    def is_draft(self) -> bool:
        """Whether it belongs to a draft head."""
        return self.parameter.path[0] in ("mtp", "dspark")


@functools.lru_cache(maxsize=512)
def parts(config: ModelConfig, placement: Placement, weights: Weights) -> tuple[Part, ...]:
    """Every parameter on one device.

    Raises:
        ProblemsError: where the model's sizes forbid the mesh.
    """
    table = {"/".join(map(str, path)): parameter for path, parameter in parameters(config).items()}
    held: dict[str, tuple[tuple[str, ...], int]] = {}
    for row in parameter_rows(config, placement, weights):
        name = row.path.split(".")[0]  # elements and scales of a quantised one are rows of their own
        axes = tuple(axis for entry in row.spec for axis in axes_of(entry))
        held[name] = (axes, held.get(name, ((), 0))[1] + row.bytes_a_device)
    sizes = placement.mesh.shape
    return tuple(
        Part(table[name], axes, math.prod(sizes[axis] for axis in axes), num_bytes)
        for name, (axes, num_bytes) in held.items()
    )


def parts_of(job: Job) -> tuple[Part, ...]:
    """Those of a job; training has float32 masters."""
    return parts(job.model, job.placement, "float32" if job.work == "train" else job.weights)


@dataclasses.dataclass(frozen=True)
class RowBytes:
    """Bytes of one row of a cache, from the shapes of its arrays."""

    entries: int  # compressed entries and indexer keys, which the context decides
    state: int  # rings of recent rows, counters and slots of draft heads, which it does not


@functools.lru_cache(maxsize=64)
def _cache_sizes(config: ModelConfig, form: CacheFormat, mtp: bool, dspark: bool) -> tuple[int, int, int]:
    """(bytes of entries at one page, tokens of that page, bytes of the rest) of one row."""
    page = math.lcm(config.csa_ratio, config.hca_ratio) * ROWS
    roomy = dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, 2 * page))
    more = {"stream_dtype": jnp.dtype("bfloat16") if mtp else None, "dspark": dspark, "as_bits": False}

    def leaves(capacity: int) -> list[int]:
        make = lambda: new_cache(  # noqa: E731
            roomy, 1, capacity, jnp.dtype("bfloat16"), row_dtype=jnp.dtype("bfloat16"), format=form, **more
        )
        return [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make))]

    pairs = list(zip(leaves(page), leaves(2 * page), strict=True))
    entries = sum(large - small for small, large in pairs)
    return entries, page, sum(2 * small - large for small, large in pairs)


def row_bytes(job: Job) -> RowBytes:
    """Of one sequence's cache with room for the job's context."""
    sizes = (job.model, job.cache, job.draft == "mtp", job.draft == "dspark")
    entries, page, rest = _cache_sizes(*sizes)
    return RowBytes(entries * allocated_length(job.config, job.context) // page, rest)


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device.

    Attributes:
        weights: parameters.
        optimizer: moments.
        gradients: of a training step, as large as the float32 masters.
        cache: compressed entries and indexer keys.
        state: rings of recent rows, and slots of draft heads.
        temporaries: an estimate of what a step makes and drops (`temporaries`).
    """

    weights: int
    optimizer: int
    gradients: int
    cache: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        """Together."""
        return sum(dataclasses.astuple(self))


def held(job: Job) -> Held:
    """What each device holds during the step.

    Raises:
        ProblemsError: where the model's sizes forbid the mesh.
    """
    found = parts_of(job)
    weights = sum(part.num_bytes for part in found)
    if job.work == "train":
        return Held(weights, moments(job), weights, 0, 0, temporaries(job))
    row, rows = row_bytes(job), job.rows_a_device
    return Held(weights, 0, 0, rows * row.entries, rows * row.state, temporaries(job))


def moments(job: Job) -> int:
    """Bytes of Muon's momentum and AdamW's two moments, which lie where their parameters do (report, section
    2.4: Muon for matrices, AdamW for the rest; or AdamW for all)."""
    settings = Muon() if job.optimizer == "muon" else AdamW()
    groups = {each.path: each.group for each in partition(job.model, settings)}
    numbers = {"/".join(map(str, part.parameter.path)): part.elements for part in parts_of(job)}
    return round(sum(4 * MOMENTS[groups[path]] * count for path, count in numbers.items()))


def temporaries(job: Job) -> int:
    """An estimate, in bytes, of what a step makes and drops on one device, with t tokens of its own:

    streams  2 * 2 t N D          residual streams before and after a sublayer, bfloat16
    queries  2 * 2 t H Dh / h     of one layer and its attention's results, h ways to split heads
    rows     g Ke (6 D + 4 F)     rows that come to its experts and their hidden numbers, g tokens a device
    logits   2 * 4 l V / v        float32, of l rows (all tokens of decode, each prompt's last of prefill)
    scores   4 s c / m            float32, of the indexer for s tokens at once, at most 128, and c tokens

    and in training, where every layer is computed again in the backward pass:

    kept     2 t N D (U + 1)      streams between the U units of layers that are computed again as one
    gathered 4 w                  numbers of one layer and of the head that are brought together over fsdp,
                                  and their gradients, bfloat16 both
    twice    of queries and rows: values and their gradients; logits of at most 1024 tokens at a time

    What the compiler really takes is beside it wherever a plan is compiled. Of whole decode steps of V4-Flash
    it took 0.03 GiB on v6e where this says 0.003, and 0.67 on tpu7x where this says 0.01: leave a GiB free.
    No whole training step was compiled yet.
    """
    config, placement = job.model, job.placement
    ways = math.prod(placement.mesh.shape[axis] for axis in job.row_axes)
    t, streams = job.tokens / ways, config.hc_mult * config.hidden_size
    total = 4.0 * t * streams + 4 * t * config.num_attention_heads * config.head_dim / heads_ways(job)
    # Rows of a device's experts: as many as every device sends away, if routing is even.
    rows = config.num_experts_per_tok * (6 * config.hidden_size + 4 * config.moe_intermediate_size)
    total += t * rows
    if job.work == "train":
        total *= 2
        units = sum(stack.repeats for stack in layer_stacks(config))
        total += 2 * t * streams * (units + config.num_nextn_predict_layers + 1)
        total += 4 * _gathered(job)
    scored = {"decode": t, "prefill": job.rows_a_device, "train": min(t, 1024)}[job.work]
    split = next((part.ways for part in parts_of(job) if part.parameter.role == "head"), 1)
    total += 8 * max(scored, job.tokens / split / ways if job.work == "decode" else 0) * config.vocab_size
    total += 4 * min(t, 128) * job.context / config.csa_ratio * ("csa" in config.attention_kinds)
    return round(total)


def _gathered(job: Job) -> float:
    """Numbers that a device brings together over fsdp at once: of a layer on average, and of the head."""
    layers = job.model.num_hidden_layers + job.model.num_nextn_predict_layers
    together = [part for part in parts_of(job) if GATHERED in part.axes]
    ways = job.placement.mesh.shape[GATHERED]
    head = sum(part.elements for part in together if part.parameter.role == "head")
    rest = sum(part.elements for part in together if part.parameter.role not in ("head", "embedding"))
    return ways * (rest / layers + head)


def heads_ways(job: Job) -> int:
    """Parts of the attention heads: over the axes that split groups of heads and no rows."""
    axes = job.placement.axes_for("G", job.config.o_groups, job.row_axes)
    return math.prod(job.placement.mesh.shape[axis] for axis in axes)


def seen_tokens(job: Job, part: Part, tokens: float) -> float:
    """Tokens that a device multiplies with its part of a weight: those of all devices that share the weight.

    Parts over fsdp are gathered, and meet the device's own tokens alone.

    Args:
        job: whose placement it is.
        part: of the weight.
        tokens: of the step over the whole mesh.
    """
    apart = [axis for axis in job.row_axes if axis == GATHERED or axis not in part.axes]
    return tokens / math.prod(job.placement.mesh.shape[axis] for axis in apart)
