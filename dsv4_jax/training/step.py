"""One training step: forward, losses, gradients, update and the balance rule in a single compiled call."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int16, Int32

from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from dsv4_jax.model.layer_report import ModelReport
from dsv4_jax.model.training_mode import INFERENCE, TrainingMode
from dsv4_jax.training.balance import balanced_parameters
from dsv4_jax.training.batch_losses import BatchTotals
from dsv4_jax.training.batch_losses import forward_losses as forward_losses
from dsv4_jax.training.data import Batch
from dsv4_jax.training.gradient_exchange import over_data
from dsv4_jax.training.loss import LossParts, mean_cross_entropy, shifted_targets
from dsv4_jax.training.optimizer import Params, apply_updates, merge_params, split_trainable
from dsv4_jax.training.step_settings import Optimizer as Optimizer
from dsv4_jax.training.step_settings import Rates as Rates
from dsv4_jax.training.step_settings import StepSettings as StepSettings
from dsv4_jax.training.trained_parts import moments_after, moved_by, of_indexer, parted
from sharding.compiling import compiled_step


class TrainState(NamedTuple):
    """Everything a step changes; an exact restart needs this and nothing else."""

    trained: Params  # nested dict: what gradients change
    fixed: Params  # nested dict: router biases and hash tables
    moments: optax.OptState
    step: Int32[Array, ""]  # steps done

    @property
    def params(self) -> Params:
        """The whole parameter tree of the model."""
        return merge_params(self.trained, self.fixed)


class StepReport(NamedTuple):
    """What a step measured before its update, f32[] each but the loads."""

    loss: Float32[Array, ""]  # the weighted total
    main: Float32[Array, ""]  # nats per token
    mtp: Float32[Array, ""]  # nats per token
    balance: Float32[Array, ""]  # mean over learned layers, 1 = uniform
    grad_norm: Float32[Array, ""]  # before clipping, of everything but the indexers; 0 in their warm-up
    indexer: Float32[Array, ""]  # nats per token, mean over layers with an indexer; 0 where they do not train
    indexer_grad_norm: Float32[Array, ""]  # before clipping
    z: Float32[Array, ""]  # mean squared log-sum-exp of the head's logits; 0 without a z-loss
    clamped: Float32[Array, ""]  # share of the shared experts' SwiGLU inputs that the clamp changed
    learning_rate: Float32[Array, ""]
    loads: Float32[Array, "layers E"]  # tokens of each expert, the MTP block's layer last

    @property
    def scalars(self) -> dict[str, Float32[Array, ""]]:
        """All but the loads, by name."""
        return {name: value for name, value in self._asdict().items() if name != "loads"}


def initial_state(params: Params, optimizer: Optimizer) -> TrainState:
    """The state before the first step. The parameters' buffers are used, and later donated, as they are; what
    goes with a parameter lies where it does, and counters are on all devices of the parameters."""
    trained, fixed = split_trainable(params)
    first = jax.tree.leaves(trained)[0]
    held = None if isinstance(first, jax.core.Tracer) else first.sharding

    def placed(leaf: jax.Array) -> jax.Array:
        if leaf.ndim or not isinstance(held, NamedSharding):
            return leaf
        return jax.device_put(leaf, NamedSharding(held.mesh, PartitionSpec()))

    moments = jax.tree.map(placed, optimizer.transform().init(trained))
    return TrainState(trained, fixed, moments, placed(jnp.int32(0)))


@compiled_step(static_argnums=(0, 1), donate_argnums=2)
def train_step(
    network: Network,
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    rates: Rates,
    experts: Int16[Array, "layers B T Ke"] | None = None,
) -> tuple[TrainState, StepReport]:
    """One step. The given state is consumed (its buffers are donated).

    Args:
        network: the model that the parameters belong to.
        settings: what is compiled in.
        state: from `initial_state` or an earlier step.
        batch: packed rows i32[B, T].
        rates: of this step.
        experts: of every token, by older parameters (`anticipatory_routing.chosen_experts`); None: by these.

    Returns:
        The next state, and what the step measured before updating.

    Raises:
        ValueError: for rows that cannot be split into `settings.accumulate` equal parts; for an exchange in
            bfloat16 on another mesh than one of data alone.
    """
    moving, still = parted(state.trained, moved_by(settings.indexer))
    constant = merge_params(still, state.fixed)
    given = (state.step, moving, constant, batch, rates, experts)
    measured, gradients = _gradients(network, settings, *given)
    total, parts, layers, tokens = measured
    rate = jnp.asarray(rates.learning_rate, jnp.float32)
    trained, moments = _updated(network, settings, state, still, gradients, rate)
    if network.placement is not None and getattr(network, "lora", None) is not None:
        # Left alone, the compiler splits what LoRA trains like the matrices that it is added to: the state
        # would lie elsewhere than before, and the next step would be compiled again.
        everywhere = NamedSharding(network.placement.mesh, PartitionSpec())
        trained, moments = jax.lax.with_sharding_constraint((trained, moments), everywhere)
    of_indexers, of_backbone = parted(gradients, of_indexer)
    by_layer = layers.by_layer()
    config = network.config
    num_learned = config.router_kinds.count("learned") + len(layers.mtp)
    num_indexers = config.attention_kinds.count("csa")
    num_inputs = tokens * (2 * config.moe_intermediate_size * len(by_layer.clamped))
    report = StepReport(
        loss=total,
        main=parts.main,
        mtp=parts.mtp,
        balance=parts.balance / max(num_learned, 1),
        grad_norm=_norm(of_backbone),
        indexer=parts.indexer / max(num_indexers, 1),
        indexer_grad_norm=_norm(of_indexers),
        z=parts.z,
        clamped=by_layer.clamped.sum() / jnp.maximum(num_inputs, 1.0),
        learning_rate=rate,
        loads=by_layer.loads,
    )
    fixed = state.fixed
    if settings.indexer != "warm-up":
        fixed = balanced_parameters(fixed, layers, rates.bias_speed)
    return TrainState(trained, fixed, moments, state.step + 1), report


class _Measured(NamedTuple):
    total: Float32[Array, ""]
    parts: LossParts
    layers: ModelReport
    tokens: Float32[Array, ""]  # valid ones


def _gradients(
    network: Network,
    settings: StepSettings,
    step: Int32[Array, ""],
    moving: Params,
    still: Params,
    batch: Batch,
    rates: Rates,
    experts: jax.Array | None,
) -> tuple[_Measured, Params]:
    """What the batch measures, and the gradients of `moving`."""
    totals = BatchTotals.of(batch)
    if settings.exchange_seed is None:
        of_parts = settings.accumulate > 1
        gradients, measured = _of_rows(
            network, settings, (moving, still, rates, totals), batch, experts, of_parts=of_parts
        )
        return measured._replace(tokens=totals.tokens), gradients
    if network.placement is None:
        raise ValueError("exchange_seed is for a model on a mesh")
    alone = network._replace(operations=None)  # each device computes the whole model, of its own rows
    own = functools.partial(_of_rows, alone, settings, of_parts=True)
    batch = Batch(*map(jnp.asarray, batch[:2]), *batch[2:])
    key = jax.random.fold_in(jax.random.key(settings.exchange_seed), step)
    whole = (moving, still, rates, totals)
    gradients, measured = over_data(own, network.placement.mesh, key, whole, batch, experts)
    return measured._replace(tokens=totals.tokens), gradients


def _of_rows(
    network: Network,
    settings: StepSettings,
    whole: tuple[Params, Params, Rates, BatchTotals],
    batch: Batch,
    experts: jax.Array | None,
    *,
    of_parts: bool,
) -> tuple[Params, _Measured]:
    """Gradients of some rows and what they measure, a part of the rows at a time.

    Args:
        network: the model. settings: of the step.
        whole: what changes, what does not, rates, and the counts of the whole batch.
        batch: the rows. experts: of their tokens.
        of_parts: whether each term of the loss is a share of the whole batch's; if not, the rows are all.
    """
    moving, still, rates, totals = whole
    z_weight = jnp.asarray(rates.z, jnp.float32) if settings.z_loss else None

    def loss(moving: Params, batch: Batch, experts: jax.Array | None) -> tuple[jax.Array, _Measured]:
        model = network.holding(merge_params(moving, still))
        counts = totals if of_parts else None
        parts, layers = forward_losses(model, batch, settings.mode, counts, experts, z_weight)
        objective = total = parts.total(rates)
        if settings.indexer == "warm-up":
            objective = rates.indexer * parts.indexer
        return objective, _Measured(total, parts, layers, totals.tokens)

    differentiate = jax.grad(loss, has_aux=True)
    if settings.accumulate == 1:
        return differentiate(moving, batch, experts)
    split = functools.partial(_split_rows, count=settings.accumulate)
    parts = jax.tree.map(split, batch), None if experts is None else split(experts, axis=1)
    shape = jax.eval_shape(differentiate, moving, *jax.tree.map(lambda part: part[0], parts))
    # Sums are float32, whatever the gradients are.
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shape)

    def add(sums: tuple, part: tuple) -> tuple[tuple, None]:
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, differentiate(moving, *part)), None

    (gradients, measured), _ = jax.lax.scan(add, start, parts)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), gradients, shape[0]), measured


def _split_rows(x: jax.Array, count: int, axis: int = 0) -> jax.Array:
    """Row r of the batch goes to part r mod `count`, so that rows split over devices stay where they are."""
    rows = x.shape[axis]
    if rows % count:
        raise ValueError(f"accumulate={count} does not divide the batch's {rows} rows")
    x = jnp.moveaxis(jnp.asarray(x), axis, 0)
    x = jnp.swapaxes(x.reshape(rows // count, count, *x.shape[1:]), 0, 1)
    return jnp.moveaxis(x, 1, axis + 1)


def _updated(
    network: Network,
    settings: StepSettings,
    state: TrainState,
    still: Params,
    gradients: Params,
    rate: Float32[Array, ""],
) -> tuple[Params, optax.OptState]:
    """The next parameters and moments; what stands still keeps its moments and is not decayed."""
    # Clipped already: a part's norm must not scale the other part.
    whole = settings.optimizer
    if whole.max_grad_norm is not None:
        gradients = merge_params(
            *(_clipped(part, whole.max_grad_norm) for part in parted(gradients, of_indexer))
        )
        whole = dataclasses.replace(whole, max_grad_norm=math.inf)
    everything = merge_params(gradients, jax.tree.map(jnp.zeros_like, still))
    with jax.enable_x64(False):  # Optax leaves the type of Adam's bias correction to JAX's default.
        updates, moments = whole.transform(network.placement).update(everything, state.moments, state.trained)
    moves = moved_by(settings.indexer)
    updates, moving = (parted(tree, moves)[0] for tree in (updates, state.trained))
    trained = merge_params(apply_updates(moving, updates, rate), still)
    return trained, moments_after(state.moments, moments, moves)


def _clipped(gradients: Params, max_norm: float) -> Params:
    return optax.clip_by_global_norm(max_norm).update(gradients, optax.EmptyState())[0] if gradients else {}


def _norm(gradients: Params) -> Float32[Array, ""]:
    leaves = jax.tree.leaves(gradients)
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), jnp.float32(0)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def validation_sums(
    network: Network, params: Params, batch: Batch, mode: TrainingMode = INFERENCE
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of the negative log-likelihoods of a batch in nats, and the number of targets."""
    model = network.holding(params)
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    targets = shifted_targets(tokens, segments, 1, batch.counts)
    hidden = model.hidden(model(spans.packed(tokens, segments), mode=mode).streams)
    count = targets.valid.sum(dtype=jnp.float32)
    return mean_cross_entropy(hidden, model.head[...], targets, model.operations.cross_entropy) * count, count


def validation_loss(
    network: Network, params: Params, batches: Sequence[Batch], mode: TrainingMode = INFERENCE
) -> float:
    """Mean negative log-likelihood in nats per target over all batches; `mode` says how the model attends."""
    sums = [validation_sums(network, params, batch, mode) for batch in batches]
    total, count = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
    return float(total / max(count, 1.0))
