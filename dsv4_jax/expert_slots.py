"""Hot experts on several devices: what was routed, and a model whose experts have copies by it.

For serving on a mesh with an expert axis. Results are those of the model without copies, up to the order of
sums over devices; what changes is how much the fullest device has to do (`sharding.expert_copies`).
"""

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from dsv4_jax.config import ModelConfig, layer_stacks
from dsv4_jax.errors import ProblemsError
from dsv4_jax.model.initial import Network
from dsv4_jax.model.operations import operations
from dsv4_jax.parameters import Parameters, parameters
from pallas_kernels.formats.weights import QuantizedWeight, is_quantized
from sharding.expert_copies import Copies, LayerCopies, place_copies
from sharding.host_values import fetched

if TYPE_CHECKING:
    from dsv4_jax.language_model import LanguageModel


def expert_loads(
    lm: "LanguageModel", tokens: Int32[Array, "B T"], num_valid: Int32[Array, "B"] | None = None
) -> Int[np.ndarray, "L E"]:
    """How many of these tokens chose each expert, by layer: what `with_copies` places experts by.

    Args:
        lm: any model.
        tokens: typical ones of the service, [B, T].
        num_valid: of each row; None: all.
    """
    taps = lm.taps(tokens, ["experts"], num_valid)
    length = np.shape(tokens)[1]
    counted = np.ones(np.shape(tokens), bool)
    if num_valid is not None:
        counted = np.arange(length) < np.asarray(num_valid)[:, None]
    loads = []
    for tap in taps:
        chosen = np.asarray(fetched(tap["experts"]))[counted]
        loads.append(np.bincount(chosen.ravel(), minlength=lm.config.n_routed_experts))
    return np.stack(loads)


def with_copies(lm: "LanguageModel", loads: Float[np.ndarray, "L E"], spare: int = 1) -> "LanguageModel":
    """The same model with copies of its hot experts, which decodes and serves like it, but cannot be saved.

    Every device along the expert axis holds `spare` experts more of each layer, and the memory of them. The
    experts of one layer are brought together at a time while they are laid out. `lm` stays as it is and keeps
    its memory until it is dropped.

    Args:
        lm: on a mesh whose axis expert is larger than 1.
        loads: tokens of each expert in each layer (`expert_loads`), or anything in proportion to them.
        spare: slots of a device beyond its part of the experts, >= 1.

    Raises:
        ProblemsError: for a model without such a mesh or with copies already, loads of another shape, a
            `spare` below 1; all problems at once.
        ValueError: for loads that are negative or not finite.
    """
    config, placement = lm.config, lm.placement
    shape = (config.num_hidden_layers, config.n_routed_experts)
    devices = 1 if placement is None else placement.mesh.shape["expert"]
    rules = {
        "the model is on no mesh whose axis expert is larger than 1": devices > 1,
        "the model has copies already: start from the one without": not _has_copies(lm),
        f"loads {np.shape(loads)} must be [layers, experts] = {shape}": np.shape(loads) == shape,
        f"spare={spare} must be at least 1": spare >= 1,
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ProblemsError("no copies of experts", broken)
    slots = config.n_routed_experts // devices + spare
    tables = [place_copies(row, devices, slots) for row in np.asarray(loads, float)]
    by_path = {
        ("stacks", number, "blocks", block, "ffn"): tuple(
            tables[stack.layer_index(block, repeat)] for repeat in range(stack.repeats)
        )
        for number, stack in enumerate(layer_stacks(config))
        for block in range(len(stack.kinds))
    }
    copies = LayerCopies(tuple(by_path.items()))
    chosen = dataclasses.replace(operations(lm.policy, placement=placement), copies=copies)
    found = copy.copy(lm)
    found.parameters, found.network = (
        _laid_out(config, lm.parameters, by_path),
        Network(config, lm.policy, chosen),
    )
    return found


def _has_copies(lm: "LanguageModel") -> bool:
    return lm.network.operations is not None and lm.network.operations.copies is not None


def _laid_out(
    config: ModelConfig, given: Parameters, by_path: dict[tuple[Any, ...], tuple[Copies, ...]]
) -> Parameters:
    """The tree with the experts of these sublayers in their slots; everything else is shared."""
    table = parameters(config)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        place = tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)
        tables = by_path.get(place[:-2])
        if tables is None or table[place].role != "expert":
            return leaf
        order = np.stack([each.expert_of for each in tables])
        if not is_quantized(leaf):
            return _in_slots(leaf, order)
        blocks = jax.tree.map(lambda array: _in_slots(array, order), leaf.blocks)
        return QuantizedWeight(blocks, leaf.dims, leaf.repeat)

    return jax.tree_util.tree_map_with_path(one, given, is_leaf=is_quantized)


def _in_slots(array: jax.Array, order: Int[np.ndarray, "R slots"]) -> jax.Array:
    """[R, E, ...] -> [R, slots, ...], split over devices as the array is."""

    def layer(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        return given[0].at[given[1]].get(mode="promise_in_bounds")

    run = jax.jit(lambda array, order: jax.lax.map(layer, (array, order)), out_shardings=array.sharding)
    return run(array, order)
