"""The structure of a model without its memory, and freshly drawn parameters."""

import functools
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv4_jax.boxes import Box, at, inside, overlap, pieces, shape_of
from dsv4_jax.config import ModelConfig
from dsv4_jax.config.quantities import checked_seed
from dsv4_jax.model.gathering import gathered
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.rounded_weights import rounded_weights
from dsv4_jax.model.transformer import Transformer
from dsv4_jax.numerics.grids import grids
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.parameters import INITIAL_VALUE, Parameter, Parameters, parameters
from sharding.activations import Placement
from sharding.placement import aligned, placed
from sharding.rules import Rules


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

    @property
    def placement(self) -> Placement | None:
        """The mesh that it is spread over, and how it uses it; None: one device."""
        return None if self.operations is None else self.operations.placement

    def put(self, x: jax.typing.ArrayLike, dims: str) -> jax.Array:
        """An array of the host on the model's devices, split by the rules for its dims (`Placement.put`)."""
        return jnp.asarray(x) if self.placement is None else self.placement.put(x, dims)

    def shapes(self) -> Parameters:
        """The parameters as `jax.ShapeDtypeStruct`; nothing is allocated."""
        return nnx.to_pure_dict(_abstract(*self)[1])

    def holding(self, parameters: Parameters) -> Transformer:
        """The model with these parameters, arrays or tracers."""
        rounding = grids(self.policy, self.config.qk_rope_head_dim).weight
        parameters = rounded_weights(parameters, self.config, rounding)
        whole = {
            key: tree if key == "stacks" else gathered(tree, (key,), self.config, self.placement)
            for key, tree in parameters.items()
        }
        return nnx.merge(_abstract(*self)[0], whole)


def initial_parameters(
    config: ModelConfig,
    policy: Policy,
    seed: int,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Parameters:
    """Draws a new model on the host, box by box: what a device will hold, and a few MB more, at a time.

    Every parameter's values depend on the seed and its own path alone, so adding a layer kind or a part
    leaves the others as they were, and splitting it over devices does too. V4's initialisation is not
    published: matrices are normal(0, initializer_range), biases and sinks 0, norms 1, mHC scale 0.01 (mHC
    paper).

    Args:
        config: of the model.
        policy: gives the dtype of matrices.
        seed: in 0 .. 2^63 - 1.
        mesh: devices to place the parameters on; None: the default device.
        rules: letter of a dim (`dsv4_jax.parameters`) -> axes of the mesh that it is split over, such as
            {"E": "expert"}; dims without a rule are whole on every device.

    Raises:
        ValueError: for any other seed.
        ProblemsError: rules that do not fit the mesh or the parameters, all of them at once.
    """
    seed = checked_seed(seed)
    shardings = parameter_shardings(config, mesh, rules, "a new model")
    tree: Parameters = {}
    for path, parameter in parameters(config).items():
        stream = np.random.default_rng([seed, zlib.crc32("/".join(map(str, path)).encode())])
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        values = _Values(parameter, config, parameter.dtype(policy.param_dtype), stream)
        node[path[-1]] = placed(values.box, parameter.shape, shardings.get(path))
    return tree


class _Values:
    """The initial values of one parameter, of which boxes can be had.

    They come from one stream of random numbers, piece by piece. A stream cannot be entered in the middle (a
    normal number takes one draw or more), so the first box draws everything and keeps the state of the stream
    before each piece; the boxes after it draw the pieces that they touch.
    """

    def __init__(
        self, parameter: Parameter, config: ModelConfig, dtype: np.dtype, stream: np.random.Generator
    ) -> None:
        self._parameter, self._config, self._dtype = parameter, config, dtype
        self._stream = stream
        self._states = [stream.bit_generator.state]

    def box(self, box: Box) -> np.ndarray:
        """A new array with the values in a box of the parameter's axes."""
        target = aligned(shape_of(box), self._dtype)
        role = self._parameter.role
        if role in INITIAL_VALUE:
            target[...] = INITIAL_VALUE[role]
            return target
        for number, piece in enumerate(self._pieces()):
            shared = overlap(box, piece)
            last = len(self._states) == number + 1
            if shared is None and not last:
                continue
            self._stream.bit_generator.state = self._states[number]
            values = self._drawn(shape_of(piece))
            if last:
                self._states.append(self._stream.bit_generator.state)
            if shared is not None:
                target[inside(shared, box)] = values[inside(shared, piece)]
        return target

    def _pieces(self) -> Iterable[Box]:
        shape = self._parameter.shape
        if self._parameter.role == "table":  # each layer's is balanced as a whole
            return (at((layer,), shape) for layer in range(shape[0]))
        return pieces(shape)

    def _drawn(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._parameter.role == "table":
            return _balanced(shape[1:], self._config.n_routed_experts, self._stream)[None]
        values = self._stream.standard_normal(shape, np.float32)
        return (values * np.float32(self._config.initializer_range)).astype(self._dtype)


def _balanced(shape: tuple[int, int], num_experts: int, stream: np.random.Generator) -> np.ndarray:
    """i32[V, Ke]: token i takes Ke neighbours of an endlessly repeated cycle of experts, so they differ
    and every expert is used equally often. DeepSeek's own hash function is not published."""
    vocab, top_k = shape
    cycle = stream.permutation(num_experts).astype(np.int32)
    place = stream.permutation(vocab)[:, None] * top_k + np.arange(top_k)
    return cycle[place % num_experts]
