"""What a case of `tpu_cycles.py` is: a program, how often the parts of its kernels run, figures beside it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Shapes = dict[str, jax.ShapeDtypeStruct]
Grid = tuple[int, ...]
Us = dict[str, float]  # microseconds by chip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How to count one kernel of a program.

    Attributes:
        when: how often the kernel's conditionals (`pl.when`) run each time their surroundings do, given the
            grid: one number for all of them, or one for each that is not small (see `tpu_schedule.SMALL`) in
            the order of the program. None counts all in full, which is too much.
        trips: trips of all loops whose bound is known only at run time, or of each.
        prefetch: the scalar operands that index maps read.
        copied_bytes: HBM bytes of copies that the kernel makes by hand, which no block spec shows.
    """

    when: Callable[[Grid], float | Sequence[float]] | None = None
    trips: float | Sequence[float] | None = None
    prefetch: tuple[np.ndarray, ...] = ()
    copied_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays, and which of its kernels are counted, by name."""

    function: Callable
    shapes: Shapes
    kernels: dict[str, Kernel]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row a chip.

    Attributes:
        build: imports the kernels and makes the program.
        cost: FLOP and HBM bytes, after the Cost section of the operation's contract.
    """

    name: str
    build: Callable[[], Program]
    cost: Callable[[], tuple[float, float]]
    target: Us = dataclasses.field(default_factory=dict)
    peer: Us = dataclasses.field(default_factory=dict)


def us(v6e: float, tpu7x: float | None = None) -> Us:
    return {"v6e": v6e} | ({} if tpu7x is None else {"tpu7x": tpu7x})


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


f32 = functools.partial(array, dtype=jnp.float32)
i32 = functools.partial(array, dtype=jnp.int32)


def gradients(function: Callable, shapes: Shapes, wanted: Sequence[str]) -> tuple[Callable, Shapes]:
    """The program of all results and the gradients of `wanted`, and its arguments: cotangents come last.

    They are arguments, because XLA would write constants of their size for longer than many a kernel runs.
    """
    results, structure = jax.tree.flatten(jax.eval_shape(lambda arrays: function(**arrays), shapes))
    cotangents = {f"cotangent{i}": result for i, result in enumerate(results)}

    def both(**arrays):
        given = jax.tree.unflatten(structure, [arrays.pop(name) for name in cotangents])
        fixed = {name: x for name, x in arrays.items() if name not in wanted}
        results, pull = jax.vjp(lambda x: function(**x, **fixed), {name: arrays[name] for name in wanted})
        return results, pull(given)

    return both, shapes | cotangents


def once(grid: Grid) -> float:
    """Conditionals of the first or the last of all steps."""
    return 1 / math.prod(grid)


def once_a_row(grid: Grid) -> float:
    """Conditionals of the first or the last step of the innermost grid axis."""
    return 1 / grid[-1]
