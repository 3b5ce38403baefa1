"""AdamW with warm-up and decay, over the part of the parameter tree that has gradients.

Report, sections 2.4 and 4.2.2, for what AdamW treats; here it treats the matrices too (Muon is to come).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

Params = dict  # nested dict of arrays, keyed by names and layer numbers
PathKey = str | int

WITHOUT_GRADIENT = ("bias", "tid2eid")
"""Last path parts of what gradients never change: the router bias has its own rule, the hash table none."""

WITHOUT_DECAY = ("norm", "sink", "ape", "base", "scale")
"""Endings of the last path part: norm weights, sinks, positional biases, mHC base and scale."""


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings of the optimiser. Betas, epsilon and decay are the report's (section 4.2.2)."""

    peak_learning_rate: float
    num_steps: int
    warmup_fraction: float = 0.05
    final_fraction: float = 0.1  # of the peak, as in both V4 schedules
    shape: Literal["linear", "cosine"] = "linear"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def learning_rate(self, step: int | jax.Array) -> jax.Array:
        """Linear from 0 (exclusive) to the peak, then decay; the last step has `final_fraction` of it."""
        step = jnp.asarray(step, jnp.float32)
        warmup = max(1, round(self.warmup_fraction * self.num_steps))
        rising = (step + 1) / warmup
        progress = jnp.clip((step + 1 - warmup) / max(1, self.num_steps - warmup), 0.0, 1.0)
        if self.shape == "cosine":
            progress = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
        falling = 1.0 - (1.0 - self.final_fraction) * progress
        return self.peak_learning_rate * jnp.minimum(rising, falling)

    def transform(self) -> optax.GradientTransformation:
        """Clipping by global norm, then AdamW with decoupled decay on matrices only."""
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.adamw(
                self.learning_rate,
                b1=self.beta1,
                b2=self.beta2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
                mask=decay_mask,
            ),
        )


def _name(path: tuple) -> str:
    return str(path[-1].key)


def decay_mask(params: Params) -> Params:
    """True for what decays: matrices, embedding and head."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not _name(path).endswith(WITHOUT_DECAY), params
    )


def split_trainable(params: Params) -> tuple[Params, Params]:
    """(trained by gradients, the rest), two nested dicts that `merge_params` puts together again."""
    trained: Params = {}
    fixed: Params = {}
    for key, value in params.items():
        if isinstance(value, dict):
            for target, part in zip((trained, fixed), split_trainable(value), strict=True):
                if part:
                    target[key] = part
        else:
            (fixed if str(key) in WITHOUT_GRADIENT else trained)[key] = value
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
