"""What a training step is told: settings that its compiled program depends on, and rates that are data."""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import numpy as np
import optax
from jaxtyping import Array, Float32

from dsv4_jax.errors import ConfigError
from dsv4_jax.model.training_mode import TrainingMode
from sharding.activations import Placement


class Optimizer(Protocol):
    """Settings of an optimizer: a frozen dataclass (`optimizer.AdamW`).

    Attributes:
        max_grad_norm: gradients are clipped to this global norm; None: not at all.
    """

    max_grad_norm: float | None

    def transform(self, placement: Placement | None = None) -> optax.GradientTransformation:
        """From gradients to updates; the learning rate is not in it. `placement`: of the parameters."""


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What is static about a step: each choice is a compiled program of its own.

    Attributes:
        optimizer: its settings.
        accumulate: the batch's rows are taken in so many equal parts, one after the other; the gradient is
            that of the whole batch.
        attention: "sparse", or "dense": CSA layers attend to every visible entry and their indexers are not
            asked (report, section 4.2: sparse attention begins after a dense stage).
        indexer: how the indexers are trained (report, section 2.3, and DeepSeek-V3.2, arXiv 2512.02556):
            "none": not at all, and not decayed either; "warm-up": they alone, everything else is frozen,
            under dense attention; "sparse": beside everything else, on the entries that they chose.
        z_loss: whether the mean squared log-sum-exp of the head's logits is part of the loss (`Rates.z`).
        exchange_seed: devices exchange gradients in bfloat16, rounded stochastically by this seed and the
            number of the step (`gradient_exchange`); None: the compiler adds them as they are.

    Raises:
        ConfigError: for values outside these, and for an indexer stage under the other attention; all
            problems at once.
    """

    optimizer: Optimizer
    accumulate: int = 1
    attention: Literal["sparse", "dense"] = "sparse"
    indexer: Literal["none", "warm-up", "sparse"] = "none"
    z_loss: bool = False
    exchange_seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.accumulate < 1:
            problems.append(f"accumulate={self.accumulate} must be at least 1")
        if self.attention not in ("sparse", "dense"):
            problems.append(f"attention={self.attention!r} must be 'sparse' or 'dense'")
        if self.indexer not in ("none", "warm-up", "sparse"):
            problems.append(f"indexer={self.indexer!r} must be 'none', 'warm-up' or 'sparse'")
        wanted = {"warm-up": "dense", "sparse": "sparse"}.get(self.indexer, self.attention)
        if self.attention != wanted:
            problems.append(
                f"indexer={self.indexer!r} needs attention={wanted!r}: its target is what that attention sees"
            )
        if problems:
            raise ConfigError("cannot build these step settings", problems)

    @property
    def mode(self) -> TrainingMode:
        """What the model has to know of them."""
        return TrainingMode(dense=self.attention == "dense", index_loss=self.indexer != "none")


class Rates(NamedTuple):
    """Numbers of one step that schedules change, f32[] each: data, so that nothing is compiled again."""

    learning_rate: Float32[Array, ""] | np.float32
    mtp: Float32[Array, ""] | np.float32 = np.float32(0.3)  # report, section 4.2; 0.1 once the rate decays
    balance: Float32[Array, ""] | np.float32 = np.float32(1e-4)  # weight of the balance loss, as there
    indexer: Float32[Array, ""] | np.float32 = np.float32(1)  # weight of the indexers' loss, if they train
    z: Float32[Array, ""] | np.float32 = np.float32(0)  # weight of the z-loss, if the settings have it
    bias_speed: Float32[Array, ""] | np.float32 = np.float32(1e-3)  # of the routers' selection biases
