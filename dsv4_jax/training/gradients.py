"""The parameters of a model as `jax.grad` wants them: apart from those that have no gradient.

Training decides which have one (`training.optimizer.split_trainable`); this is the same split for callers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.parameters import Parameters
from dsv4_jax.training.optimizer import merge_params, split_trainable
from pallas_kernels.formats.weights import is_quantized


def trainable(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """(trained, fixed): what gradients change, and the rest; `joined` puts them together again.

    Fixed are the hash tables, which are integers, and the router's selection biases, which follow the balance
    rule. Arrays are shared with `parameters`, not copied, and may be traced.

    Raises:
        ValueError: for weights that are held in FP8 or FP4: those have no gradients.
    """
    trained, fixed = split_trainable(parameters)
    leaves = jax.tree_util.tree_leaves_with_path(trained, is_leaf=is_quantized)
    frozen = ["/".join(str(key.key) for key in path) for path, leaf in leaves if not _has_gradient(leaf)]
    if frozen:
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        raise ValueError(
            f"{frozen[0]}{more} held in FP8 or FP4 have no gradient: load with weights='dequantized'"
        )
    return trained, fixed


def joined(trained: Parameters, fixed: Parameters) -> Parameters:
    """The whole parameter tree of `trainable`'s two parts.

    Raises:
        ValueError: when both hold the same parameter.
    """
    return merge_params(trained, fixed)


def _has_gradient(leaf: Any) -> bool:
    return not is_quantized(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
