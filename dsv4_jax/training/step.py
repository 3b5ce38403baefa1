"""One training step: forward, losses, gradients, AdamW and the balance rule in a single compiled call."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from dsv4_jax.model.layer_report import ModelReport
from dsv4_jax.model.transformer import Transformer
from dsv4_jax.training.balance import balanced_parameters
from dsv4_jax.training.data import Batch
from dsv4_jax.training.loss import LossParts, Targets, mean_cross_entropy, shifted_targets
from dsv4_jax.training.optimizer import AdamW, Params, apply_updates, merge_params, split_trainable
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
    """What a step measured before its update, f32[] each."""

    loss: Float32[Array, ""]  # the weighted total
    main: Float32[Array, ""]  # nats per token
    mtp: Float32[Array, ""]  # nats per token
    balance: Float32[Array, ""]  # mean over learned layers, 1 = uniform
    grad_norm: Float32[Array, ""]  # before clipping


def initial_state(params: Params, optimizer: AdamW) -> TrainState:
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


def forward_losses(model: Transformer, batch: Batch) -> tuple[LossParts, ModelReport]:
    """The terms of the loss of one batch, and what the layers report of their routing."""
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    span = spans.packed(tokens, segments)
    forward = model(span)
    cross_entropy = model.operations.cross_entropy
    targets = shifted_targets(tokens, segments, 1)
    main = mean_cross_entropy(model.hidden(forward.streams), model.head[...], targets, cross_entropy)
    mtp, report = jnp.float32(0), forward.report
    if model.mtp:
        hidden, mtp_report = model.predict_further(forward.streams, span)
        report = report._replace(mtp=(mtp_report,))
        targets = shifted_targets(tokens, segments, 2)
        targets = Targets(targets.ids[:, :-1], targets.valid[:, :-1])
        mtp = mean_cross_entropy(hidden, model.head[...], targets, cross_entropy)
    return LossParts(main, mtp, report.balance()), report


@compiled_step(static_argnums=(0, 1), donate_argnums=2)
def train_step(
    network: Network,
    optimizer: AdamW,
    state: TrainState,
    batch: Batch,
    learning_rate: Float32[Array, ""],
) -> tuple[TrainState, StepReport]:
    """One step. The given state is consumed (its buffers are donated).

    Args:
        network: the model that the parameters belong to.
        optimizer: its settings.
        state: from `initial_state` or an earlier step.
        batch: packed rows i32[B, T].
        learning_rate: of this step.

    Returns:
        The next state, and what the step measured before updating.
    """

    def loss(trained: Params) -> tuple[jax.Array, tuple[LossParts, ModelReport]]:
        model = network.holding(merge_params(trained, state.fixed))
        parts, layers = forward_losses(model, batch)
        return parts.total(), (parts, layers)

    (total, (parts, layers)), grads = jax.value_and_grad(loss, has_aux=True)(state.trained)
    with jax.enable_x64(False):  # Optax leaves the type of Adam's bias correction to JAX's default.
        updates, moments = optimizer.transform().update(grads, state.moments, state.trained)
    num_learned = network.config.router_kinds.count("learned") + len(layers.mtp)
    report = StepReport(
        total,
        parts.main,
        parts.mtp,
        parts.balance / max(num_learned, 1),
        jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads))),
    )
    trained = apply_updates(state.trained, updates, learning_rate)
    fixed = balanced_parameters(state.fixed, layers)
    return TrainState(trained, fixed, moments, state.step + 1), report


@functools.partial(jax.jit, static_argnums=0)
def validation_sums(
    network: Network, params: Params, batch: Batch
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of the negative log-likelihoods of a batch in nats, and the number of targets."""
    model = network.holding(params)
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    targets = shifted_targets(tokens, segments, 1)
    hidden = model.hidden(model(spans.packed(tokens, segments)).streams)
    count = targets.valid.sum(dtype=jnp.float32)
    return mean_cross_entropy(hidden, model.head[...], targets, model.operations.cross_entropy) * count, count


def validation_loss(network: Network, params: Params, batches: Sequence[Batch]) -> float:
    """Mean negative log-likelihood in nats per target over all batches."""
    sums = [validation_sums(network, params, batch) for batch in batches]
    total, count = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
    return float(total / max(count, 1.0))
