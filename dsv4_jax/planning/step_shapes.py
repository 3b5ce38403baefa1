"""The steps of a job, lowered for a slice that nobody has: shapes with places, and no arrays.

The steps are those that `LanguageModel` and training call, with their kernels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference import steps
from dsv4_jax.inspection.native_shapes import native_shapes
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.model.operations import operations
from dsv4_jax.numerics.cache_formats import CacheFormat
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.planning.described import placement_on
from dsv4_jax.planning.job import Job, Weights
from dsv4_jax.training.data import Batch
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from pallas_kernels.formats.weights import is_quantized
from sharding.activations import Placement
from sharding.rules import TABLES


class Lowered(NamedTuple):
    """A step before the compiler has seen it.

    Attributes:
        program: lowered.
        kinds: what the device holds when the step begins, by kind: trees of `jax.ShapeDtypeStruct` with
            shardings: weights and cache, or masters and moments.
        placement: mesh and rules.
    """

    program: jax.stages.Lowered
    kinds: dict[str, Any]
    placement: Placement


class Serving(NamedTuple):
    """Shapes of what serving holds, with their places."""

    network: Network
    weights: Any
    cache: Any


def serving_shapes(
    config: ModelConfig,
    placement: Placement,
    batch: int,
    capacity: int,
    cache: CacheFormat = "fp8+mxfp4",
    weights: Weights = "native",
) -> Serving:
    """A model on a mesh, with kernels and bfloat16 activations, its weights and its cache.

    Args:
        config: of the model, without draft heads.
        placement: mesh and rules.
        batch: rows over the whole mesh.
        capacity: tokens of a row that the cache has room for.
        cache: format.
        weights: FP8 and FP4 as official checkpoints hold them, or bfloat16.

    Raises:
        ProblemsError: where the model's sizes forbid the mesh.
    """
    policy = Policy.of("bfloat16", kernels="pallas", cache=cache)
    chosen = operations(policy, placement=placement)
    network = Network(config, policy, chosen)
    stored = (jnp.bfloat16, 8, policy.row_dtype, policy.cache_format, chosen.cache_of_bits)
    empty = jax.eval_shape(lambda: new_cache(config, batch, capacity, *stored))
    held = native_shapes(config) if weights == "native" else network.shapes()
    leaves = jax.tree_util.tree_leaves_with_path(held, is_leaf=is_quantized)
    blocks = {keys_of(path): leaf.blocks.block for path, leaf in leaves if is_quantized(leaf)}
    rules = placement.table.parameters
    shardings = parameter_shardings(config, placement.mesh, rules, "the model", blocks)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _placed(leaf, shardings[keys_of(path)]), held, is_leaf=is_quantized
    )
    rows = jax.tree.map(lambda leaf: _rows(leaf, "B" if leaf.ndim == 1 else "R B", placement), empty)
    return Serving(network, placed, rows)


def lowered_serving(held: Serving, batch: int, chunk: int | None = None) -> jax.stages.Lowered:
    """The step that appends tokens to every row.

    Args:
        held: the model, its weights and cache.
        batch: rows.
        chunk: tokens of a row that a step of prefill appends; None: decode, which appends one.
    """
    placement = held.network.placement
    assert placement is not None
    count = _rows(jax.ShapeDtypeStruct((batch,), jnp.int32), "B", placement)
    if chunk is None:
        tokens = _rows(jax.ShapeDtypeStruct((batch, 1), jnp.int32), "B", placement)
        return steps.extend.lower(*held, tokens, count)
    tokens = _rows(jax.ShapeDtypeStruct((batch, chunk), jnp.int32), "B T", placement)
    last = (batch, held.network.config.vocab_size)
    last = _rows(jax.ShapeDtypeStruct(last, jnp.float32), "B V", placement)
    return steps.prefill.lower(*held, tokens, count, last)


def lowered_training(
    config: ModelConfig, placement: Placement, batch: int, length: int, optimizer: AdamW | Muon
) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """The step of training with bfloat16 activations, float32 masters, kernels and `remat="unit"`, and what
    it holds: masters and moments.

    Args:
        config: of the model.
        placement: mesh and rules.
        batch: packed rows over the whole mesh.
        length: tokens of a row.
        optimizer: its settings.

    Raises:
        ProblemsError: where the model's sizes forbid the mesh.
    """
    mesh = placement.mesh
    policy = Policy.of("bfloat16", remat="unit", kernels="pallas", master="float32")
    network = Network(config, policy, operations(policy, placement=placement))
    placed = parameter_shardings(config, mesh, placement.table.parameters, "the model")

    def held(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = tuple(key.key for key in path if hasattr(key, "key"))
        # Moments have the paths of their parameters, perhaps behind the name of a group.
        own = next((keys[start:] for start in (0, 1) if keys[start:] in placed), None)
        sharding = placed[own] if own is not None and leaf.ndim else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer), network.shapes())
    state = jax.tree_util.tree_map_with_path(held, state)
    row = _rows(jax.ShapeDtypeStruct((batch, length), jnp.int32), "B T", placement)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    rates = Rates(*[scalar] * len(Rates._fields))
    program = train_step.lower(network, StepSettings(optimizer), state, Batch(row, row), rates)
    return program, {"weights": (state.trained, state.fixed), "optimizer": state.moments}


def lowered(job: Job) -> Lowered:
    """The step of a job.

    Raises:
        ProblemsError: without the TPU compiler; for a slice that it does not know; where the model's sizes
            forbid the mesh; for decode with a draft, whose step is not compiled here.
    """
    if job.draft != "none":
        why = f"--draft {job.draft}: --compile compiles the step without a draft; leave one of them out"
        raise ProblemsError("cannot compile that", [why])
    placement = placement_on(job.slice, job.mesh, TABLES[job.work])
    if job.work == "train":
        optimizer = AdamW() if job.optimizer == "adamw" else Muon(compute_dtype="bfloat16")
        program, kinds = lowered_training(job.model, placement, job.batch, job.context, optimizer)
        return Lowered(program, kinds, placement)
    held = serving_shapes(job.model, placement, job.batch, job.context, job.cache, job.weights)
    program = lowered_serving(held, job.batch, job.places if job.work == "prefill" else None)
    return Lowered(program, {"weights": held.weights, "cache": held.cache}, placement)


def keys_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path of `jax.tree_util` as one of the parameter table."""
    return tuple(key.key for key in path)


def _placed(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), leaf)


def _rows(leaf: Any, dims: str, placement: Placement) -> Any:
    return _placed(leaf, NamedSharding(placement.mesh, placement.spec(dims, leaf.shape)))
