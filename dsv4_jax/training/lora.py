"""LoRA: a product of two small matrices is trained beside each chosen matrix, which stays as it is.

    W' = W + (alpha / rank) B A,   A [rank, I] drawn, B [O, rank] zero at the start       (arXiv 2106.09685)

W may be a plain array or held in FP8 or FP4. W' is made anew in every step, inside of what is differentiated:
that costs the memory of the chosen matrices in the policy's param dtype, of their gradients in it, and
6 O I rank operations for each. It saves the moments and float32 masters of everything. A stack of layers or
experts has a pair of small matrices for each of its members.
"""

import dataclasses
import fnmatch
import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax.config import ModelConfig
from dsv4_jax.config.quantities import as_float, checked_seed, integer_problem
from dsv4_jax.errors import ProblemsError
from dsv4_jax.model.initial import Network
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.transformer import Transformer
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import LORA, WIDE_ROLES, Parameter, Parameters, Path, parameters
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import TrainState
from pallas_kernels.formats.weights import is_quantized, plain
from sharding.activations import Placement


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices are changed, and by how much freedom.

    Attributes:
        rank: of what is added to each matrix.
        alpha: what is added is scaled by alpha / rank.
        targets: patterns of paths in the table of parameters, such as "*/attn/wq_*" or "*/experts/*"; `*`
            stands for anything, slashes included. Of what they match, matrices are meant.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Of the product B A."""
        return self.alpha / self.rank


class LoraNetwork(NamedTuple):
    """A `Network` whose parameters have the branch `lora`: what `train_step` takes in its place."""

    config: ModelConfig
    policy: Policy
    operations: Operations | None
    lora: Lora

    @property
    def plain(self) -> Network:
        """The network without the branch."""
        return Network(self.config, self.policy, self.operations)

    @property
    def placement(self) -> Placement | None:
        """As `Network.placement`."""
        return self.plain.placement

    def put(self, x: jax.typing.ArrayLike, dims: str) -> jax.Array:
        """As `Network.put`."""
        return self.plain.put(x, dims)

    def holding(self, tree: Parameters) -> Transformer:
        """The model with W' for every chosen W; the other parameters are untouched."""
        return self.plain.holding(_changed(self, tree))


def with_lora(network: Network, lora: Lora) -> LoraNetwork:
    """The network that `lora_state` belongs to.

    Raises:
        ProblemsError: of the settings; all problems at once.
    """
    chosen(network.config, lora)
    return LoraNetwork(*network, lora)


def setting_problems(lora: Lora) -> list[str]:
    """What is wrong with the settings, whatever the model; a sentence each."""
    problems = [problem] if (problem := integer_problem("rank", lora.rank, 1)) else []
    alpha = as_float(lora.alpha)
    if alpha is None or not math.isfinite(alpha):
        problems.append(f"alpha={lora.alpha!r} must be a finite number")
    if isinstance(lora.targets, str) or not lora.targets:
        problems.append(f"targets={lora.targets!r} must be a tuple of at least one pattern")
    return problems


def chosen(config: ModelConfig, lora: Lora) -> dict[Path, Parameter]:
    """The rows of the table that the targets mean, by path.

    Raises:
        ProblemsError: a rank or alpha that cannot be, targets that match no matrix; all problems at once.
    """
    problems = setting_problems(lora)
    matrices = {
        path: parameter for path, parameter in parameters(config).items() if parameter.role in WIDE_ROLES
    }
    names = {path: "/".join(map(str, path)) for path in matrices}
    found = set()
    for pattern in () if isinstance(lora.targets, str) else lora.targets:
        matched = {path for path, name in names.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            problems.append(
                f"target {pattern!r} matches no matrix of this model, such as {min(names.values())}"
            )
        found |= matched
    if problems:
        raise ProblemsError("these matrices cannot be fine-tuned by LoRA", problems)
    return {path: parameter for path, parameter in matrices.items() if path in found}


def lora_parameters(config: ModelConfig, lora: Lora, seed: int) -> Parameters:
    """The small matrices: f32[*leading, rank, I] `a` normal(0, 1 / I), f32[*leading, O, rank] `b` zero.

    Each is at the path of the matrix [O, I] that it belongs to, with the matrix' leading axes. What is drawn
    depends on the seed and that path alone.

    Raises:
        ProblemsError: as `chosen`. ValueError: for a seed outside 0 .. 2^63 - 1.
    """
    seed = checked_seed(seed)
    tree: Parameters = {}
    for path, parameter in chosen(config, lora).items():
        out, contracted = parameter.stored
        draw = np.random.default_rng([seed, zlib.crc32("/".join(map(str, path)).encode())])
        shape = (*parameter.leading, lora.rank, contracted)
        pair = {
            "a": jnp.asarray(draw.standard_normal(shape, np.float32) / np.float32(math.sqrt(contracted))),
            "b": jnp.zeros((*parameter.leading, out, lora.rank), jnp.float32),
        }
        _put(tree, path, pair)
    return tree


def lora_shapes(config: ModelConfig, lora: Lora) -> Parameters:
    """`lora_parameters` as `jax.ShapeDtypeStruct`; nothing is drawn. Raises ProblemsError as `chosen`."""
    tree: Parameters = {}
    for path, parameter in chosen(config, lora).items():
        out, contracted = parameter.stored
        shapes = {"a": (lora.rank, contracted), "b": (out, lora.rank)}
        pair = {
            name: jax.ShapeDtypeStruct((*parameter.leading, *shape), jnp.float32)
            for name, shape in shapes.items()
        }
        _put(tree, path, pair)
    return tree


def lora_state(network: LoraNetwork, base: Parameters, seed: int, optimizer: AdamW) -> TrainState:
    """The state before the first step: the small matrices are trained, the whole model is fixed.

    Of a model on a mesh, every device holds the small matrices whole. The balance rule would move the router
    biases of the model: train with a bias speed of 0 to leave them.

    Args:
        network: of `with_lora`.
        base: parameters of the model, plain or quantised; later donated, as they are.
        seed: of the small matrices.
        optimizer: its settings. Decay draws the small matrices to zero, and so the model to what it was.

    Raises:
        ProblemsError: as `chosen`.
    """
    trained = {LORA: lora_parameters(network.config, network.lora, seed)}
    held = jax.tree.leaves(base)[0].sharding
    step = jnp.int32(0)
    moments = optimizer.transform().init(trained)
    if isinstance(held, NamedSharding):
        everywhere = NamedSharding(held.mesh, PartitionSpec())
        trained, moments, step = jax.device_put((trained, moments, step), everywhere)
    return TrainState(trained, base, moments, step)


def merged(network: LoraNetwork, params: Parameters) -> Parameters:
    """The parameters of a model without the branch, W' in the place of each chosen W: to run, save or export.

    A chosen matrix that was held in FP8 or FP4 becomes an array of the policy's param dtype, for W' is on no
    such grid; `checkpoint.save` rounds it again if it is given a release's formats.

    Args:
        network: of `with_lora`.
        params: of a `TrainState`: the base with its branch.
    """
    return jax.jit(_changed, static_argnums=0)(network, params)


def _changed(network: LoraNetwork, tree: Parameters) -> Parameters:
    factors = tree[LORA]
    changed = {key: value for key, value in tree.items() if key != LORA}
    for path, parameter in chosen(network.config, network.lora).items():
        pair, weight = _at(factors, path), _at(changed, path)
        product = jnp.matmul(pair["b"], pair["a"], precision=jax.lax.Precision.HIGHEST)
        added = (jnp.float32(network.lora.scale) * product).reshape(parameter.shape)
        dtype = network.policy.param_dtype if is_quantized(weight) else weight.dtype
        _put(changed, path, (plain(weight, jnp.float32) + added).astype(dtype))
    return changed


def _at(tree: Parameters, path: Path) -> object:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Parameters, path: Path, value: object) -> None:
    """Puts a value into nested dicts; those on the way are copied, so that their owner keeps his."""
    for key in path[:-1]:
        tree[key] = dict(tree.get(key, {}))
        tree = tree[key]
    tree[path[-1]] = value
