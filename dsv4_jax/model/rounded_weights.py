"""Matrices as the products of a training policy see them: rounded, with gradients to what was rounded.

Report, section 5.2.1. Experts round their own (`numerics.grids.Grids.expert`), layer by layer; these are
rounded at the start of a call, whole stacks at once.
"""

import math
from typing import Any

import jax

from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics.grids import Rounding, as_it_is
from dsv4_jax.parameters import Parameters, parameters
from pallas_kernels.formats.weights import is_quantized


def rounded_weights(tree: Parameters, config: ModelConfig, rounding: Rounding) -> Parameters:
    """The parameters with `rounding` applied to every plain matrix that official releases store with scales.

    Args:
        tree: the parameters of a model; traced or not.
        config: of the model.
        rounding: of matrices [*stack, O, I].
    """
    if rounding is as_it_is:
        return tree
    table = parameters(config)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        parameter = table[tuple(key.key for key in path)]
        if parameter.role != "matrix" or parameter.matrix is None or is_quantized(leaf):
            return leaf
        rows = parameter.own[: parameter.matrix[0]]
        matrices = leaf.reshape(*parameter.leading, math.prod(rows), -1)
        return rounding(matrices).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_quantized)
