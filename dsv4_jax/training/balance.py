"""Balancing without a loss: after each step the selection bias of overloaded experts goes down a little.

Inherited from DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); V4 report, section 4.2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Num

from dsv4_jax.model.layer_report import LayerReport, ModelReport
from dsv4_jax.parameters import Path, row_at
from pallas_kernels.formats.weights import is_quantized

BIAS_SPEED = 0.001


def updated_bias(
    bias: Float32[Array, "*layers E"],
    loads: Num[Array, "*layers E"],
    speed: float | Float32[Array, ""] = BIAS_SPEED,
) -> Float32[Array, "*layers E"]:
    """bias_e + speed * sign(mean(n) - n_e); exactly equal load changes nothing.

    Args:
        bias: selection bias of one learned-routing layer, or of a stack of layers.
        loads: n, routed valid tokens of each expert over the whole global batch.
        speed: size of the step.
    """
    # E n_e against sum(n), so that equal loads compare equal: the mean itself is rounded.
    loads = loads.astype(jnp.float32)
    excess = loads.shape[-1] * loads - loads.sum(axis=-1, keepdims=True)
    return bias - jnp.float32(speed) * jnp.sign(excess)


def balanced_parameters(
    fixed: dict, report: ModelReport, speed: float | Float32[Array, ""] = BIAS_SPEED
) -> dict:
    """The parameters without gradients after one application of the rule; hash tables stay.

    Args:
        fixed: nested dict that holds `.../ffn/gate/bias` f32[R, E] of every learned-routing layer.
        report: of the layers, over the whole global batch; it says each layer's loads f32[R, E].
        speed: as in `updated_bias`.
    """

    def layer(path: Path) -> LayerReport:
        if path[0] == "mtp":
            return report.mtp[path[1]]
        _, stack, _, position, *_ = path  # stacks/{stack}/blocks/{position}/...
        return report.stacks[stack][position]

    def update(path: tuple, leaf: jax.Array) -> jax.Array:
        keys = tuple(key.key for key in path)
        if row_at(keys).role != "selection_bias" or keys[0] == "dspark":  # which a step does not run
            return leaf
        return updated_bias(leaf, layer(keys).loads, speed)

    return jax.tree_util.tree_map_with_path(update, fixed, is_leaf=is_quantized)
