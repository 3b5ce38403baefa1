"""The structure of a model without its memory, and freshly drawn parameters."""

import functools
import zlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.config import ModelConfig
from dsv4_jax.config.quantities import checked_seed
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.transformer import Transformer
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import INITIAL_VALUE, Parameter, parameters

Parameters = dict[str, Any]
"""Nested dict of arrays, the pure state of `Transformer`; list positions are int keys."""


@functools.lru_cache(maxsize=32)
def _abstract(config: ModelConfig, policy: Policy, operations: Operations | None) -> tuple[Any, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, policy, operations)))


class Network(NamedTuple):
    """What is static about a model: the static argument of every compiled step.

    An NNX graph would do as well, but takes a millisecond to hash, at every call.
    """

    config: ModelConfig
    policy: Policy
    operations: Operations | None = None  # None: what the policy says

    def shapes(self) -> Parameters:
        """The parameters as `jax.ShapeDtypeStruct`; nothing is allocated."""
        return nnx.to_pure_dict(_abstract(*self)[1])

    def holding(self, parameters: Parameters) -> Transformer:
        """The model with these parameters, arrays or tracers."""
        return nnx.merge(_abstract(*self)[0], parameters)


def initial_parameters(config: ModelConfig, policy: Policy, seed: int) -> Parameters:
    """Draws a new model on the host.

    Every parameter's values depend on the seed and its own path alone, so adding a layer kind or a part
    leaves the others as they were. V4's initialisation is not published: matrices are
    normal(0, initializer_range), biases and sinks 0, norms 1, mHC scale 0.01 (mHC paper).

    Args:
        seed: in 0 .. 2^63 - 1.

    Raises:
        ValueError: for any other seed.
    """
    seed = checked_seed(seed)
    drawn: Parameters = {}
    for path, parameter in parameters(config).items():
        stream = np.random.default_rng([seed, zlib.crc32("/".join(map(str, path)).encode())])
        node = drawn
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(_draw(parameter, config, policy, stream))
    return drawn


def _draw(
    parameter: Parameter, config: ModelConfig, policy: Policy, stream: np.random.Generator
) -> np.ndarray:
    shape, dtype = parameter.shape, parameter.dtype(policy.param_dtype)
    if parameter.role == "table":
        return np.stack([_balanced(shape[1:], config.n_routed_experts, stream) for _ in range(shape[0])])
    if parameter.role in INITIAL_VALUE:
        return np.full(shape, INITIAL_VALUE[parameter.role], dtype)
    values = stream.standard_normal(shape, np.float32)
    return (values * np.float32(config.initializer_range)).astype(dtype)


def _balanced(shape: tuple[int, int], num_experts: int, stream: np.random.Generator) -> np.ndarray:
    """i32[V, Ke]: token i takes Ke neighbours of an endlessly repeated cycle of experts, so they differ
    and every expert is used equally often. DeepSeek's own hash function is not published."""
    vocab, top_k = shape
    cycle = stream.permutation(num_experts).astype(np.int32)
    place = stream.permutation(vocab)[:, None] * top_k + np.arange(top_k)
    return cycle[place % num_experts]
