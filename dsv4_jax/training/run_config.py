"""What a training run is told.

A field lives in exactly one of `ModelConfig`, `Policy`, mesh and rules, and `RunConfig`.

A run is a Python function without parameters, called `run`, in a file of its own, that returns a `RunConfig`
(see `experiments/train_stdlib.py`); `dsv4 train FILE` runs it.
"""

import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple, Protocol

from dsv4_jax.config import ModelConfig
from dsv4_jax.config.quantities import integer_problem, seed_problem
from dsv4_jax.errors import ConfigError
from dsv4_jax.model.training_mode import TrainingMode
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import BatchStream
from dsv4_jax.training.gradient_exchange import mesh_problem
from dsv4_jax.training.health import Health
from dsv4_jax.training.lora import Lora, setting_problems
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.schedules import BatchRamp, LearningRate, LossWeights, as_float32
from dsv4_jax.training.step_settings import Optimizer, Rates, StepSettings
from sharding.mesh import MeshError, parse

RULES = "train"
"""The table of `sharding.rules` by which a run uses its mesh."""


class Source(Protocol):
    """Where text comes from; a frozen dataclass."""

    def open(
        self,
        tokenizer: Any,
        batch_size: int,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> BatchStream:
        """A stream of packed batches i32[batch_size, seq_len]."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Some steps in a row that share lengths, attention and data.

    Attributes:
        num_steps: how many.
        seq_len: T, tokens of a row.
        batch_size: B, rows of a batch; of a full one where it grows.
        ramp: how it grows; None: it is full from the first step on.
        accumulate: equal parts in which a full batch is taken, one after the other; a smaller one is taken in
            fewer.
        attention: "dense" attends to every visible entry; sparse attention comes after a dense stage (report,
            section 4.2.2).
        indexer: how indexers are trained: not at all; alone, before sparse attention; or beside the rest.
        source: of its text; None: that of the run.
    """

    num_steps: int
    seq_len: int
    batch_size: int
    ramp: BatchRamp | None = None
    accumulate: int = 1
    attention: Literal["sparse", "dense"] = "sparse"
    indexer: Literal["none", "warm-up", "sparse"] = "none"
    source: Source | None = None

    @property
    def unit(self) -> int:
        """Rows that the stream of the stage gives at a time; a batch is one or more of these."""
        return self.batch_size if self.ramp is None else self.ramp.first

    def rows(self, step: int) -> int:
        """Rows of the batch of step `step` of the stage, counted from 0."""
        return self.batch_size if self.ramp is None else self.ramp.at(step, self.batch_size)

    def parts(self, rows: int) -> int:
        """Into how many parts a batch of `rows` is accumulated; none is larger than those of a full one."""
        wanted = -(-self.accumulate * rows // self.batch_size)
        return next(parts for parts in range(wanted, rows + 1) if rows % parts == 0)

    @property
    def num_tokens(self) -> int:
        """Positions that the stage processes."""
        if self.ramp is None:
            return self.num_steps * self.batch_size * self.seq_len
        growing = min(self.num_steps, self.ramp.num_steps)
        rows = sum(self.rows(step) for step in range(growing)) + (self.num_steps - growing) * self.batch_size
        return rows * self.seq_len

    def problems(self, name: str) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        sizes = ("num_steps", "seq_len", "batch_size", "accumulate")
        found = [integer_problem(f"{name}.{size}", getattr(self, size), 1) for size in sizes]
        problems = [problem for problem in found if problem]
        if isinstance(self.ramp, BatchRamp):
            problems += self.ramp.problems(f"{name}.ramp", self.batch_size)
        elif self.ramp is not None:
            problems.append(f"{name}.ramp={self.ramp!r} must be of type BatchRamp or None")
        if not problems and self.batch_size % self.accumulate:
            problems.append(f"{name}.accumulate={self.accumulate} must divide batch_size={self.batch_size}")
        wanted = {"warm-up": "dense", "sparse": "sparse"}.get(self.indexer, self.attention)
        if self.attention not in ("sparse", "dense"):
            problems.append(f"{name}.attention={self.attention!r} must be 'sparse' or 'dense'")
        elif self.indexer not in ("none", "warm-up", "sparse"):
            problems.append(f"{name}.indexer={self.indexer!r} must be 'none', 'warm-up' or 'sparse'")
        elif self.attention != wanted:
            problems.append(f"{name}.indexer={self.indexer!r} needs attention={wanted!r}")
        return problems


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Saved states of the run, from which it goes on after an end of any kind.

    Attributes:
        every: steps between two; one more comes at the end of a run and when it is told to stop.
        keep: how many are kept; the newest complete one always is.
    """

    every: int = 1000
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class Logging:
    """What a run tells while it goes.

    Attributes:
        every: steps between two lines of a log; a terminal shows every step.
        tensorboard: also write event files for TensorBoard.
        profile_steps: (first, last), counted from 0: steps that `jax.profiler` records.
        plot: draw the pictures of `training.plots` at validations and at the end.
    """

    every: int = 10
    tensorboard: bool = False
    profile_steps: tuple[int, int] | None = None
    plot: bool = False


@dataclasses.dataclass(frozen=True)
class Validation:
    """Held-out loss, and what the model writes, at intervals and at the end.

    Attributes:
        source: of the held-out text.
        every: steps between two.
        num_batches: of the source's first batches, the same each time.
        prompt: that the model continues; None: it writes nothing.
        sample_tokens: how far.
    """

    source: Source
    every: int = 1000
    num_batches: int = 8
    prompt: str | None = None
    sample_tokens: int = 48


class Place(NamedTuple):
    """Where a step lies in the run."""

    stage: int  # its number
    step: int  # within the stage
    rows: int  # of its batch


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        model: of fresh parameters, or a checkpoint folder to start from.
        policy: dtypes and numerics.
        source: of the text; a frozen dataclass with `open` (`Source`).
        stages: one after the other.
        learning_rate: over all of them.
        optimizer: its settings, without the rate.
        losses: weights of the losses.
        lora: train small matrices beside these matrices of the model, which itself stays as it is; merged in
            what is exported. None: all parameters are trained.
        tokenizer: a tokenizer.json; None: the checkpoint's, or one that is learnt from the standard library.
        mesh: devices to spread the model over, "fsdp=4,expert=2", used by the rules "train"; None: one.
        exchange: "exact": devices add gradients in the dtype that they have; "bfloat16": they send them in
            bfloat16, rounded stochastically, and add in float32 (`gradient_exchange`). That is for a mesh of
            data alone.
        seed: of the parameters and of the order of the data.
        out: folder of everything that the run writes.
        checkpoints, logging, validation, health: see there.

    Raises:
        ConfigError: for fields that break a rule, all problems at once.
    """

    model: ModelConfig | pathlib.Path
    policy: Policy
    source: Source
    stages: tuple[Stage, ...]
    learning_rate: LearningRate
    optimizer: Optimizer = AdamW()
    losses: LossWeights = LossWeights()
    lora: Lora | None = None
    tokenizer: pathlib.Path | None = None
    mesh: str | None = None
    exchange: Literal["exact", "bfloat16"] = "exact"
    seed: int = 0
    out: pathlib.Path = pathlib.Path("trained")
    checkpoints: Checkpoints = Checkpoints()
    logging: Logging = Logging()
    validation: Validation | None = None
    health: Health = Health()

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ConfigError("cannot run this training", problems)

    @property
    def num_steps(self) -> int:
        """Of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def num_tokens(self) -> int:
        """Positions that all stages process."""
        return sum(stage.num_tokens for stage in self.stages)

    def place(self, step: int) -> Place:
        """Where step `step` lies, counted from 0 and smaller than `num_steps`."""
        first = 0
        for number, stage in enumerate(self.stages):
            if step < first + stage.num_steps:
                return Place(number, step - first, stage.rows(step - first))
            first += stage.num_steps
        raise ValueError(f"step={step} must be in 0..{self.num_steps - 1}")

    def source_of(self, stage: int) -> Source:
        """Of the text of a stage, by its number."""
        own = self.stages[stage].source
        return self.source if own is None else own

    def settings(self, place: Place) -> StepSettings:
        """What is static about a step."""
        stage = self.stages[place.stage]
        parts = stage.parts(place.rows)
        seed = self.seed if self.exchange == "bfloat16" else None
        return StepSettings(self.optimizer, parts, stage.attention, stage.indexer, self.losses.z > 0, seed)

    def mode(self, step: int) -> TrainingMode:
        """How the model attends at a step, with no loss for its indexers: for validations."""
        return self.settings(self.place(step)).mode._replace(index_loss=False)

    def rates(self, step: int) -> Rates:
        """Learning rate and weights of step `step`, counted from 0."""
        decays = step >= self.learning_rate.decay_start(self.num_steps)
        numbers = (
            self.learning_rate.at(step, self.num_steps),
            self.losses.mtp_in_decay if decays else self.losses.mtp,
            self.losses.balance,
            self.losses.indexer,
            self.losses.z,
            self.losses.bias_speed,
        )
        return Rates(*map(as_float32, numbers))

    def limited_to(self, num_steps: int) -> "RunConfig":
        """The same run with its stages cut, or its last one made longer, so that it has `num_steps` steps."""
        stages, left = [], num_steps
        for number, stage in enumerate(self.stages):
            last = number + 1 == len(self.stages)
            here = left if last else min(left, stage.num_steps)
            if here > 0:
                stages.append(dataclasses.replace(stage, num_steps=here))
            left -= here
        return dataclasses.replace(self, stages=tuple(stages))

    def _problems(self) -> list[str]:
        wrong = self._wrong_kinds()
        problems = list(wrong.values())
        if not isinstance(self.model, (ModelConfig, pathlib.Path)):
            problems.append(f"model={self.model!r} must be a ModelConfig, or the path of a checkpoint folder")
        stages = () if "stages" in wrong else self.stages
        sources = {"source": self.source} | {
            f"stages[{number}].source": stage.source
            for number, stage in enumerate(stages)
            if stage.source is not None
        }
        if self.validation is not None and "validation" not in wrong:
            sources["validation.source"] = self.validation.source
        problems += [
            f"{name}={source!r} must have a method open(tokenizer, batch_size, seq_len, seed, ...)"
            for name, source in sources.items()
            if not callable(getattr(source, "open", None))
        ]
        if self.stages == ():
            problems.append("stages=() must hold at least one Stage")
        for number, stage in enumerate(stages):
            problems += stage.problems(f"stages[{number}]")
        for name in ("learning_rate", "losses", "health"):
            problems += [] if name in wrong else getattr(self, name).problems()
        problems += filter(None, [seed_problem(self.seed), *self._interval_problems(wrong)])
        if self.lora is not None and not wrong.keys() & {"lora", "losses"}:
            problems += self._lora_problems(self.lora)
        if self.mesh is not None and "mesh" not in wrong:
            try:
                parse(self.mesh)
            except MeshError as refused:
                problems += [f"mesh={self.mesh!r}: {problem}" for problem in refused.problems]
        return problems or self._exchange_problems()

    def _exchange_problems(self) -> list[str]:
        """Of a run that is fine otherwise."""
        if self.exchange == "exact":
            return []
        if self.exchange != "bfloat16":
            return [f"exchange={self.exchange!r} must be 'exact' or 'bfloat16'"]
        sizes = {} if self.mesh is None else parse(self.mesh)
        problem = mesh_problem(sizes)
        problems = [f"exchange='bfloat16' with mesh={self.mesh!r}: {problem}"] if problem else []
        for number, stage in enumerate(self.stages):
            rows = stage.unit
            while rows <= stage.batch_size:
                parts = sizes.get("data", 1) * stage.parts(rows)
                if rows % parts:
                    problems.append(
                        f"stages[{number}]: batches of {rows} rows must be a multiple of {parts}, devices"
                        " times parts, for exchange='bfloat16'"
                    )
                rows *= 2
        return problems

    def _wrong_kinds(self) -> dict[str, str]:
        """Fields that hold something else than they should, with a sentence each."""
        found = {}
        for name, kind in (_KINDS | _KINDS_OR_NONE).items():
            value = getattr(self, name)
            optional = name in _KINDS_OR_NONE
            if not (isinstance(value, kind) or (optional and value is None)):
                found[name] = f"{name}={value!r} must be of type {kind.__name__}{' or None' * optional}"
        if not (isinstance(self.stages, tuple) and all(isinstance(each, Stage) for each in self.stages)):
            found["stages"] = f"stages={self.stages!r} must be a tuple of Stage"
        if not callable(getattr(self.optimizer, "transform", None)):
            found["optimizer"] = f"optimizer={self.optimizer!r} must be AdamW(...), Muon(...) or the like"
        return found

    def _lora_problems(self, lora: Lora) -> list[str]:
        problems = [f"lora: {problem}" for problem in setting_problems(lora)]
        if not isinstance(self.optimizer, AdamW):
            problems.append(f"optimizer={self.optimizer!r} must be AdamW with lora: its matrices are small")
        if self.losses.bias_speed != 0:
            problems.append(
                f"losses.bias_speed={self.losses.bias_speed!r} must be 0 with lora, which leaves the model"
                " and its routers' biases as they are"
            )
        return problems

    def _interval_problems(self, wrong: dict[str, str]) -> list[str | None]:
        numbers = {
            "checkpoints": ("every", "keep"),
            "logging": ("every",),
            "validation": ("every", "num_batches", "sample_tokens"),
        }
        found = [
            integer_problem(f"{name}.{field}", getattr(part, field), 1)
            for name, fields in numbers.items()
            if name not in wrong and (part := getattr(self, name)) is not None
            for field in fields
        ]
        if "logging" not in wrong and (steps := self.logging.profile_steps) is not None:
            two = isinstance(steps, tuple) and len(steps) == 2 and all(type(each) is int for each in steps)
            if not two or not 0 <= steps[0] <= steps[1]:
                found.append(f"logging.profile_steps={steps!r} must be (first, last) with 0 <= first <= last")
        return found


_KINDS: dict[str, type] = {
    "policy": Policy,
    "learning_rate": LearningRate,
    "losses": LossWeights,
    "out": pathlib.Path,
    "checkpoints": Checkpoints,
    "logging": Logging,
    "health": Health,
}
_KINDS_OR_NONE: dict[str, type] = {
    "lora": Lora,
    "tokenizer": pathlib.Path,
    "mesh": str,
    "validation": Validation,
}
