"""Weights that are split over fsdp are gathered where a layer uses them, one repeat of its unit at a time.

Without that the compiler hands the split of a weight's D to the activations that meet it, and moves residual
streams instead of weights. Inside a recomputed unit the backward pass gathers them again.
"""

from typing import Any

import jax

from dsv4_jax.config import ModelConfig
from dsv4_jax.parameter_shardings import placed_axes
from dsv4_jax.parameters import Path, parameters
from pallas_kernels.formats.weights import is_quantized
from sharding.activations import Placement
from sharding.placement import Axis, sharding_of
from sharding.rules import without_axis

GATHERED = "fsdp"

OF_OPERATIONS = ("expert", "embedding")
"""Roles of parameters whose operations bring together what they need themselves."""


def gathered(weights: Any, root: Path, config: ModelConfig, placement: Placement | None) -> Any:
    """The same weights, whole over fsdp and split over the other axes as the rules say.

    Args:
        weights: the part of the parameter tree below `root`, with or without the axis R of repeats. Routed
            experts and embeddings are left as they are: their operations gather them, or what is needed.
        root: path of that part.
        config: of the model.
        placement: of the model; nothing is done without one, or where fsdp has size 1.
    """
    if placement is None or placement.mesh.shape[GATHERED] == 1:
        return weights
    table = parameters(config)
    rules = without_axis(placement.table.parameters, GATHERED)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        place = (*root, *(key.key for key in path))
        parameter = table[place]
        if parameter.role in OF_OPERATIONS:
            return leaf
        block = leaf.blocks.block if is_quantized(leaf) else None
        axes = placed_axes(parameter, block)
        held = leaf.blocks.data if is_quantized(leaf) else leaf
        axes = axes[len(axes) - held.ndim :]  # one repeat's leaves have no axis R
        return _pinned(leaf, "/".join(map(str, place)), axes, placement, rules)

    return jax.tree_util.tree_map_with_path(one, weights, is_leaf=is_quantized)


def _pinned(leaf: Any, name: str, axes: list[Axis], placement: Placement, rules: Any) -> Any:
    sharding, _ = sharding_of(name, axes, placement.mesh, rules)
    return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, sharding), leaf)
