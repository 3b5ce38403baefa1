"""The two parts of what gradients change: the indexers, which have a loss of their own, and the backbone.

Report, section 2.3; which part a step moves is `step_settings.StepSettings.indexer`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import DictKey

from dsv4_jax.parameters import Path, row_at
from dsv4_jax.training.optimizer import Params

Moves = Callable[[Path], bool]
"""Path of a parameter -> whether a step changes it."""


def of_indexer(path: Path) -> bool:
    """Whether a parameter is an indexer's: its query and weight matrices, or its compressor."""
    return row_at(path).part == "indexers"


def of_backbone(path: Path) -> bool:
    """Whether it is any other."""
    return not of_indexer(path)


def moved_by(indexer: str) -> Moves:
    """What the steps of a stage change, by their `StepSettings.indexer`."""
    return {"none": of_backbone, "warm-up": of_indexer, "sparse": lambda path: True}[indexer]


def parted(tree: Params, chosen: Moves, root: Path = ()) -> tuple[Params, Params]:
    """(the chosen parameters, the others), two nested dicts that `optimizer.merge_params` puts together.

    Args:
        tree: nested dict of parameters, or of what each of them has.
        chosen: by path.
        root: path of the tree.
    """
    inside: Params = {}
    outside: Params = {}
    for key, value in tree.items():
        path = (*root, key)
        if isinstance(value, dict):
            for target, part in zip((inside, outside), parted(value, chosen, path), strict=True):
                if part:
                    target[key] = part
        else:
            (inside if chosen(path) else outside)[key] = value
    return inside, outside


def moments_after(before: Any, after: Any, moves: Moves) -> Any:
    """An optimizer's state: of parameters that do not move as it was before, of others and of counters after.

    Args:
        before: pytree in which what belongs to a parameter has the parameter's path, or one that ends so.
        after: likewise.
        moves: by path.
    """

    def chosen(path: tuple, old: jax.Array, new: jax.Array) -> jax.Array:
        keys = tuple(key.key for key in path if isinstance(key, DictKey))
        owner = _parameter(keys)
        return new if owner is None or moves(owner) else old

    return jax.tree_util.tree_map_with_path(chosen, before, after)


def _parameter(keys: Path) -> Path | None:
    """The longest end of the keys that is the path of a parameter."""
    for start in range(len(keys)):
        try:
            row_at(keys[start:])
        except KeyError:
            continue
        return keys[start:]
    return None
