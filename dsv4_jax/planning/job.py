"""What is to be planned: a model, a slice, and the work it is to do there."""

import dataclasses
import functools
import math
from typing import Literal

from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inspection.spread import described_placement
from dsv4_jax.numerics.cache_formats import CacheFormat
from dsv4_jax.planning.slices import Slice
from sharding.activations import Placement
from sharding.rules import TABLES

Work = Literal["decode", "prefill", "train"]
Draft = Literal["none", "mtp", "dspark"]
Weights = Literal["native", "bfloat16"]
Optimizer = Literal["muon", "adamw"]


@dataclasses.dataclass(frozen=True)
class Job:
    """One step of a model on a slice.

    Attributes:
        config: of the model.
        slice: where.
        work: what a step does: one token a row, a chunk of every row's prompt, or an update.
        batch: rows over the whole slice.
        context: tokens of a row: what the cache has room for, and how many are in it; in training the
            length of a packed row.
        mesh: a spelling with as many devices as the slice.
        chunk: tokens of a row that one prefill step appends.
        cache: format of the cache.
        weights: how they are held for inference; training has float32 masters.
        draft: who guesses further tokens in decode. Its head then takes memory and time.
        tokens_a_pass: tokens that a decode step appends to a row on average, 1 without a draft.
        optimizer: of training: Muon for matrices and AdamW for the rest, or AdamW for all.
    """

    config: ModelConfig
    slice: Slice
    work: Work
    batch: int
    context: int
    mesh: str
    chunk: int = 2048
    cache: CacheFormat = "fp8+mxfp4"
    weights: Weights = "native"
    draft: Draft = "none"
    tokens_a_pass: float = 1.0
    optimizer: Optimizer = "muon"

    @functools.cached_property
    def placement(self) -> Placement:
        """Mesh and rules. Raises ProblemsError for a spelling that is no mesh."""
        return described_placement(self.mesh, TABLES[self.work])

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The model without draft heads that nobody uses."""
        if self.work == "train":
            return self.config
        none = {"num_nextn_predict_layers": 0} if self.draft != "mtp" else {}
        none |= {"dspark": None} if self.draft != "dspark" else {}
        return dataclasses.replace(self.config, **none)

    @property
    def places(self) -> int:
        """Tokens of a row that a step computes."""
        if self.work == "train":
            return self.context
        if self.work == "prefill":
            return min(self.chunk, self.context)
        drafts = {"none": 0, "mtp": 1, "dspark": self.config.dspark.block_size if self.config.dspark else 0}
        return 1 + drafts[self.draft]

    @property
    def tokens(self) -> int:
        """Computed by a step over the whole slice."""
        return self.batch * self.places

    @property
    def useful_tokens(self) -> float:
        """Of a step that somebody pays for: drafts that are refused are not."""
        return self.batch * (self.tokens_a_pass if self.work == "decode" else self.places)

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Axes of the mesh that split rows, and tokens of a row."""
        axes = self.placement.axes_for("B", self.batch)
        if self.work == "decode":
            return axes
        return axes + self.placement.axes_for("T", self.places, axes)

    @property
    def rows_a_device(self) -> int:
        """Of the batch. Rows that no axis splits are copied."""
        axes = self.placement.axes_for("B", self.batch)
        return self.batch // math.prod(self.placement.mesh.shape[axis] for axis in axes)


def check(job: Job) -> None:
    """Refuses what cannot be planned, all of it at once.

    Raises:
        ProblemsError: naming each value and its rule.
    """
    problems = []
    for name, value in (("batch", job.batch), ("context", job.context), ("chunk", job.chunk)):
        if value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
    if job.context > job.config.max_position_embeddings:
        most = job.config.max_position_embeddings
        problems.append(f"--context {job.context}: the model has {most} positions (max_position_embeddings)")
    if job.draft == "mtp" and not job.config.num_nextn_predict_layers:
        problems.append("--draft mtp: this model has no MTP block")
    if job.draft == "dspark" and job.config.dspark is None:
        problems.append("--draft dspark: this model has no DSpark head; give the config.json of one that has")
    if job.draft != "none" and job.work != "decode":
        problems.append(f"--draft {job.draft}: only decode drafts, not {job.work}")
    if not 1 <= job.tokens_a_pass:
        problems.append(f"--tokens-a-pass {job.tokens_a_pass:g}: a step appends at least 1 token")
    elif not problems and job.work == "decode" and job.tokens_a_pass > job.places:
        problems.append(f"--tokens-a-pass {job.tokens_a_pass:g}: a step computes {job.places} tokens a row")
    try:
        devices = math.prod(job.placement.mesh.shape.values())
    except ProblemsError as refused:
        problems += refused.problems
    else:
        if devices != job.slice.devices:
            two = f", {job.slice.chip.devices} a chip" if job.slice.chip.devices > 1 else ""
            rule = f"{job.slice} has {job.slice.devices} devices{two}"
            problems.append(f"--mesh {job.mesh}: takes {devices} devices, and {rule}")
        if job.placement.mesh.shape["context"] > 1:
            problems.append(f"--mesh {job.mesh}: plans have no formula for the axis context")
    if problems:
        raise ProblemsError("cannot plan that", problems)
