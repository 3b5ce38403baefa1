"""Anticipatory routing: experts chosen by older parameters, weighed by the current ones.

Report, section 4.2.3: loss spikes feed on the routing that they disturb. With the indices of step t from the
parameters of step t - d, fetched with the batch and computed ahead, that circle is cut; about 20 % more time.
It is for after a spike, not for always. The gate weights here use the current scores of the given experts,
which the report leaves open, and balance losses and biases count the experts that were applied.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int16

from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from dsv4_jax.model.training_mode import INFERENCE, TrainingMode
from dsv4_jax.parameters import Parameters
from dsv4_jax.training.data import Batch


@functools.partial(jax.jit, static_argnums=(0, 3))
def chosen_experts(
    network: Network, params: Parameters, batch: Batch, mode: TrainingMode = INFERENCE
) -> Int16[Array, "layers B T Ke"]:
    """The experts that these parameters choose for a batch: what `step.train_step` takes with the same batch.

    Args:
        network: of the model.
        params: the whole tree, older than those of the step by the caller's lag.
        batch: packed rows i32[B, T] of the step that the experts are for.
        mode: the step's (`StepSettings.mode`): dense attention gives other features than sparse.

    Returns:
        i16, of every layer in order, hash layers included, and of the MTP block's layer last; there the last
        column, which has no row, is 0.
    """
    model = network.holding(params)
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    span = spans.packed(tokens, segments)
    experts = frozenset({"experts"})
    forward = model(span, collect=experts, mode=mode._replace(index_loss=False))
    chosen = [taps["experts"] for taps in forward.taps]
    if model.mtp:
        _, _, taps = model.predict_further(forward.streams, span, experts)
        chosen.append(jnp.pad(taps["experts"], ((0, 0), (0, 1), (0, 0))))
    return jnp.stack(chosen).astype(jnp.int16)
