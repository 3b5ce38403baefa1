"""Kernels on a mesh: the compiler does not partition them, so each device runs one on its own part."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def per_device(
    kernel: Callable[..., Any],
    mesh: Mesh | AbstractMesh,
    in_specs: Sequence[PartitionSpec],
    out_specs: Any,
) -> Callable[..., Any]:
    """`kernel` with its arguments split over a mesh; every device calls it with its own shard.

    Which dims may be split is the kernel's to say: see **Sharding** in its docstring. Nothing is communicated
    in the forward pass. An argument that is whole on several devices gets the sum of their gradients.

    Args:
        kernel: takes and returns arrays, or pytrees of them.
        mesh: the devices.
        in_specs: one PartitionSpec an argument, for all its leaves.
        out_specs: PartitionSpecs of what it returns (a pytree prefix).

    Returns:
        A function of the whole arrays.

    Raises:
        ValueError: for specs with axes that the mesh does not have; when called, for another number of
            arguments, or dims that their axes do not divide. All problems at once.
    """
    in_specs = tuple(in_specs)
    unknown = {
        axis
        for spec in (*in_specs, *jax.tree.leaves(out_specs, is_leaf=_is_spec))
        for entry in spec
        for axis in _axes(entry)
        if axis not in mesh.axis_names
    }
    if unknown:
        raise ValueError(f"axes {sorted(unknown)} are not in the mesh; it has {list(mesh.axis_names)}")
    # Kernels do not say over which axes their results vary, so that cannot be checked.
    split = jax.shard_map(kernel, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def call(*arguments: Any) -> Any:
        if len(arguments) != len(in_specs):
            raise ValueError(f"{len(arguments)} arguments, but {len(in_specs)} specs")
        problems = [
            f"argument {index}: dim {dim} of {leaf.shape} cannot be split {parts} ways ({entry})"
            for index, (argument, spec) in enumerate(zip(arguments, in_specs, strict=True))
            for leaf in jax.tree.leaves(argument)
            for dim, entry in enumerate(spec)
            if (parts := math.prod(mesh.shape[axis] for axis in _axes(entry))) > 1
            and (dim >= leaf.ndim or leaf.shape[dim] % parts)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return split(*arguments)

    return call


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
