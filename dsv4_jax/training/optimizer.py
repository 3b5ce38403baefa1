"""AdamW and plain SGD over the part of the parameter tree that has gradients, and the rate of each step.

Report, sections 2.4 and 4.2.2, for what AdamW treats; these settings treat the matrices by it too, for
comparisons. The report's own, Muon for matrices, is `muon.Muon`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from dsv4_jax.parameters import DECAYED, Path, Role, is_trained, row_at
from sharding.activations import Placement

Params = dict  # nested dict of arrays, keyed by names and layer numbers


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up to the peak, then decay to a fraction of it."""

    peak: float
    num_steps: int
    warmup_fraction: float = 0.05
    final_fraction: float = 0.1  # as in both V4 schedules
    shape: Literal["linear", "cosine"] = "linear"

    def learning_rate(self, step: int) -> float:
        """Of step `step`, counted from 0; the last step has exactly `final_fraction` of the peak."""
        warmup = max(1, round(self.warmup_fraction * self.num_steps))
        progress = (step + 1 - warmup) / max(1, self.num_steps - warmup)
        progress = min(max(progress, 0.0), 1.0)
        if self.shape == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        falling = 1.0 - (1.0 - self.final_fraction) * progress
        return self.peak * min((step + 1) / warmup, falling)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Betas, epsilon and decay as in the report (section 4.2.2); the clip is the usual 1."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def transform(self, placement: Placement | None = None) -> optax.GradientTransformation:
        """Clipping by global norm, Adam, decoupled decay on matrices; the learning rate is not in it.

        The rate comes in as data (`apply_updates`), so that runs of different lengths share a program.

        Args:
            placement: of the parameters on a mesh; it makes no difference here.
        """
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.scale_by_adam(self.beta1, self.beta2, self.epsilon),
            optax.add_decayed_weights(self.weight_decay, decay_mask),
        )


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Gradients as they are, for comparing steps with others': no momentum, no decay, and no clip unless
    there is a norm for it."""

    max_grad_norm: float | None = None

    def transform(self, placement: Placement | None = None) -> optax.GradientTransformation:
        """As `AdamW.transform`."""
        if self.max_grad_norm is None:
            return optax.identity()
        return optax.clip_by_global_norm(self.max_grad_norm)


def apply_updates(params: Params, updates: Params, learning_rate: jax.Array) -> Params:
    """params - learning_rate * updates, in float32, cast to each parameter's dtype."""

    def apply(param: jax.Array, update: jax.Array) -> jax.Array:
        new = param.astype(jnp.float32) - learning_rate * update.astype(jnp.float32)
        return new.astype(param.dtype)

    return jax.tree.map(apply, params, updates)


def role_of(path: tuple[jax.tree_util.DictKey, ...]) -> Role:
    """What the table says of a leaf of the parameter tree, by its path as `jax.tree_util` gives it."""
    return row_at(tuple(key.key for key in path)).role


def decay_mask(params: Params) -> Params:
    """True for what decays (`parameters.DECAYED`)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: role_of(path) in DECAYED, params)


def split_trainable(params: Params, root: Path = ()) -> tuple[Params, Params]:
    """(trained by gradients, the rest), two nested dicts that `merge_params` puts together again.

    Args:
        params: the parameter tree of a model, or the part of it below `root`.
        root: path of that part.
    """
    trained: Params = {}
    fixed: Params = {}
    for key, value in params.items():
        path = (*root, key)
        if isinstance(value, dict):
            for target, part in zip((trained, fixed), split_trainable(value, path), strict=True):
                if part:
                    target[key] = part
        else:
            (trained if is_trained(path) else fixed)[key] = value
    return trained, fixed


def merge_params(left: Params, right: Params) -> Params:
    """The union of two nested dicts without a leaf in common.

    Raises:
        ValueError: when both hold the same leaf.
    """
    merged = dict(left)
    for key, value in right.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = merge_params(merged[key], value)
        else:
            raise ValueError(f"both parts of the parameters hold {key!r}")
    return merged
