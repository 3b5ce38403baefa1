"""Random parameters that leave no part of the model idle, for tests that need no second implementation.

Freshly initialised parameters hide mistakes: unit norms, zero biases and sinks, mixing matrices of 1/4.
"""

import math
from typing import Any

import jax
import numpy as np

from dsv4_jax.config import ModelConfig
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy

FLOAT32 = Policy.of("float32")
CONTRACTED = {"wq_b": 1, "wo_a": 2, "wo_b": 2, "fn": 2}
"""Trailing axes summed over, where that is not one."""
GAINS = {"gate_up": 7.0, "down": 0.05, "fn": 1.0, "weight": 1.5}
"""Output size for unit inputs; gate_up drives the SwiGLU beyond its clamp of 10 now and then."""


def telling_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """The parameter tree of `config`, float32 numpy, every leaf far from neutral."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name, shape = str(path[-1].key), leaf.shape
        if name == "tid2eid":
            order = rng.random((*shape[:-1], config.n_routed_experts)).argsort(-1)
            return order[..., : shape[-1]].astype(np.int32)
        if name == "scale":
            return rng.uniform(0.6, 1.4, shape).astype(np.float32)
        if "norm" in name:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        if name in ("base", "ape", "attn_sink", "embed"):
            return rng.normal(size=shape).astype(np.float32)
        if name == "bias":
            return (0.3 * rng.normal(size=shape)).astype(np.float32)
        fan_in = math.prod(shape[-CONTRACTED.get(name, 1) :])
        return (GAINS.get(name, 1.0) / math.sqrt(fan_in) * rng.normal(size=shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, Network(config, FLOAT32).shapes())


def telling_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A float32 LanguageModel with telling parameters."""
    return LanguageModel(config, FLOAT32, telling_parameters(config, seed))
