"""From a table of what an operation lets be split (`pallas_kernels.splits`) to the specs of `per_device`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.splits import Splits, letters

Axes = str | tuple[str, ...]


def partition_specs(
    splits: Splits, axes: Mapping[str, Axes], operands: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Any]:
    """How each device gets its part of every operand, and where its part of every result belongs.

    Args:
        splits: the operation's entry in the `SPLITS` of its family.
        axes: letter -> the mesh axis, or axes, that share it. Letters that are not here are whole.
        operands: what the operation is given, by name, in order: arrays, or pytrees of them whose leaves have
            the same leading dims, or None.

    Returns:
        in_specs, one an operand, and out_specs: one spec, or a tuple of them for several results.

    Raises:
        ValueError: for letters that may not be split without more, or that no argument has; for operands that
            are not in the table, or have another rank than there; all problems at once.
    """
    problems = _letter_problems(splits, axes)
    several: dict[str, int] = {}  # dims that each `*n` stands for

    def spec(name: str, words: str, operand: Any) -> PartitionSpec:
        ranks = {jnp.ndim(leaf) for leaf in jax.tree.leaves(operand)}
        starred = [word for word in words.split() if word.startswith("*")]
        for rank in ranks:
            if starred and rank >= len(words.split()) - 1:
                several[starred[0]] = rank - len(words.split()) + 1
            elif rank != len(words.split()):
                problems.append(f"{name} has {rank} dims, but is [{words}]")
        return _spec(words, axes, several)

    in_specs = []
    for name, operand in operands.items():
        dims = splits.arguments.get(name)
        if dims is None:
            problems.append(f"{name} is not among the arguments {', '.join(splits.arguments)}")
        elif isinstance(dims, str):
            in_specs.append(spec(name, dims, operand))
        else:
            in_specs.append(type(dims)(*(spec(name, *both) for both in zip(dims, operand, strict=True))))
    if problems:
        raise ValueError("; ".join(problems))
    out_specs = jax.tree.map(lambda words: _spec(words, axes, several), splits.results)
    return tuple(in_specs), out_specs[0] if len(out_specs) == 1 else out_specs


def _letter_problems(splits: Splits, axes: Mapping[str, Axes]) -> list[str]:
    """Every letter of `axes` that a device may not have a part of."""
    words = [word for dims in jax.tree.leaves(dict(splits.arguments)) for word in dims.split()]
    known = {letter for word in words for letter in letters(word)}
    problems = []
    for letter in axes:
        if letter not in known:
            problems.append(f"no argument has a dim {letter}; there are {', '.join(sorted(known))}")
        elif letter in splits.summed.split():
            problems.append(f"{letter} can be split only if the results are summed, which the caller must do")
        elif letter not in splits.free.split():
            problems.append(
                f"{letter} must be whole on every device; {splits.free or 'nothing'} may be split"
            )
    return problems


def _spec(words: str, axes: Mapping[str, Axes], several: Mapping[str, int]) -> PartitionSpec:
    """The axes of each dim; whole ones at the end are left out."""
    entries: list[Axes | None] = []
    for word in words.split():
        shared = [axes[letter] for letter in sorted(letters(word)) if letter in axes]
        entries += [shared[0] if shared else None] + [None] * (several.get(word, 1) - 1)
        if several.get(word) == 0:
            entries.pop()
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)
