"""Where a model's parameters live on a mesh: a sharding for each, by rules for the letters of dims."""

import itertools
from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import ProblemsError
from dsv4_jax.parameters import LETTERS, Parameter, Path, parameters
from sharding.placement import Axis, rule_problems, sharding_of
from sharding.rules import Rules

NO_BLOCKS: Mapping[Path, tuple[int, int]] = {}


def parameter_shardings(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh | None,
    rules: Rules | None,
    source: str,
    blocks: Mapping[Path, tuple[int, int]] = NO_BLOCKS,
) -> dict[Path, NamedSharding]:
    """The sharding of every parameter of a model; an empty dict without a mesh.

    Args:
        config: of the model.
        mesh: devices to place the parameters on; None: the default device.
        rules: letter of a dim (`dsv4_jax.parameters`) -> axes of the mesh that it is split over, see
            `sharding.placement`; dims without a rule are whole on every device.
        source: what the parameters come from, for the error.
        blocks: rows and columns that share a scale, of the parameters that are held quantised, as arrays
            [*leading, O, I].

    Raises:
        ProblemsError: rules without a mesh, or that do not fit the mesh or the parameters, all at once.
    """
    rules = rules or {}
    shardings: dict[Path, NamedSharding] = {}
    if mesh is None:
        problems = ["rules are given, but no mesh"] if rules else []
    else:
        problems = rule_problems(mesh, rules, LETTERS)
        for path, parameter in parameters(config).items():
            axes = placed_axes(parameter, blocks.get(path))
            shardings[path], more = sharding_of("/".join(map(str, path)), axes, mesh, rules)
            problems += more
    if problems:
        raise ProblemsError(f"cannot place the parameters of {source}", problems)
    return shardings


def placed_axes(parameter: Parameter, block: tuple[int, int] | None) -> list[Axis]:
    """The axes of a parameter's array; with the block of a quantised weight those of its [*leading, O, I]."""
    dims, shape = parameter.dims, parameter.shape
    if block is None:
        return [Axis((letter,), (size,)) for letter, size in zip(dims, shape, strict=True)]
    axes = placed_axes(parameter, None)[: parameter.num_leading]
    ends = list(itertools.accumulate(parameter.folds, initial=parameter.num_leading))
    folds = list(itertools.pairwise(ends))
    return axes + [Axis(dims[a:b], shape[a:b], n) for (a, b), n in zip(folds, block, strict=True)]
