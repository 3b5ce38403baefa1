"""Which optimiser treats which parameter of a model, and what its matrices are, to be looked at.

A view of the table of parameters: report, sections 2.4 and 4.2.2.
"""

import dataclasses
import math
from typing import Literal

from dsv4_jax.config import ModelConfig
from dsv4_jax.parameters import DECAYED, Parameter, is_trained, parameters
from dsv4_jax.training.muon import MUON_ROLES, Muon, matrices_of
from dsv4_jax.training.optimizer import AdamW, Sgd

Optimizer = AdamW | Muon | Sgd
"""Settings of a training step: hashable, with `transform(placement)`."""


Group = Literal["Muon", "AdamW", "SGD", "rule"]
"""Who changes a parameter; rule: the balance rule moves router biases, and hash tables stay."""


@dataclasses.dataclass(frozen=True)
class Treated:
    """What happens to one parameter in a step.

    Attributes:
        path: a/b/c from the root of the tree.
        shape: of the array.
        matrices: (how many, rows, columns) of those that Muon orthogonalises, one by one; else empty.
        group: who changes it.
        decayed: whether weight decay shrinks it.
    """

    path: str
    shape: tuple[int, ...]
    matrices: tuple[tuple[int, int, int], ...]
    group: Group
    decayed: bool


def partition(config: ModelConfig, settings: Optimizer) -> list[Treated]:
    """What happens to every parameter of a model, in the order of the table."""
    return [_treated(parameter, settings) for parameter in parameters(config).values()]


def _treated(parameter: Parameter, settings: Optimizer) -> Treated:
    path, shape, role = "/".join(map(str, parameter.path)), parameter.shape, parameter.role
    if not is_trained(parameter.path):
        return Treated(path, shape, (), "rule", False)
    match settings:
        case Sgd():
            return Treated(path, shape, (), "SGD", False)
        case Muon() if role in MUON_ROLES:
            matrices = tuple(matrices_of(parameter, settings).shapes(shape))
            return Treated(path, shape, matrices, "Muon", settings.weight_decay > 0)
        case Muon():
            return Treated(path, shape, (), "AdamW", settings.weight_decay > 0 and settings.decayed(role))
        case AdamW():
            return Treated(path, shape, (), "AdamW", settings.weight_decay > 0 and role in DECAYED)
    raise TypeError(f"{settings!r} are no settings of an optimizer")


def partition_table(config: ModelConfig, settings: Optimizer) -> str:
    """The partition for people: a line a parameter, and what each group adds up to.

    Args:
        config: of the model.
        settings: of the optimizer.
    """
    rows = [("parameter", "shape", "group", "decay", "matrices")]
    sizes: dict[str, int] = {}
    treated = partition(config, settings)
    for each in treated:
        words = " + ".join(f"{count} of {rows} x {columns}" for count, rows, columns in each.matrices)
        shape = " x ".join(map(str, each.shape))
        rows.append((each.path, shape, each.group, "yes" if each.decayed else "no", words))
        size = math.prod(each.shape)
        sizes[each.group] = sizes.get(each.group, 0) + size
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows]
    total = sum(sizes.values())
    lines += [
        f"{group}: {sum(each.group == group for each in treated)} arrays,"
        f" {size:,} numbers ({100 * size / total:.1f} %)"
        for group, size in sizes.items()
    ]
    return "".join(line.rstrip() + "\n" for line in lines)
