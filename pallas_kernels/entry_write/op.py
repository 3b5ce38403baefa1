"""Public entry point of the family: contract, dispatch, refusal to differentiate. No tiling here."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree, Shaped

from pallas_kernels.entry_write import kernel_tpu
from pallas_kernels.entry_write.reference import write_entries_reference
from pallas_kernels.formats.columns import Columns
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits


def write_entries(
    stack: Columns,
    repeat: Int32[Array, ""],
    new: PyTree[Shaped[Array, "B P C"]],
    first: Int32[Array, "B"],
    count: Int32[Array, "B"],
    *,
    impl: Literal["pallas", "reference"] = "pallas",
    interpret: Any = False,
) -> Columns:
    """Puts the new entries of each sequence behind those it has, in one repeat of a layer's stack.

    Equation (DeepSeek-V4 report, section 2.3.4, the cache of compressed entries):
        stack[repeat, b, first_b + p] = new[b, p]     for p < count_b and first_b + p < S

    Args:
        stack: arrays of S entries a sequence, rows [R, B, S, C] or turned [R, B, C, S], of 1, 2 or 4 bytes a
            number; in V4 FP8 entries (C = 448, 8 and 64) or FP4 index keys (64 and 4). Consumed: its memory
            becomes the result's if the program does not need it any more.
        repeat: i32[], 0 <= repeat < R.
        new: the same tree with arrays [B, P, C], P >= 1 (1 for a decode step).
        first: i32[B], 0 <= first; where each sequence's new entries go.
        count: i32[B], 0 <= count <= P, how many of them are there.
        impl: "reference" scatters in plain XLA. There is no silent fallback.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        The stack after the writes. B may be 0.

    Numerics: none; bits are copied (a backend that computes bfloat16 in float32 may change those of a NaN).
    Gradients: none, and asking for them raises: whole sequences have no cache.
    Cost: HBM bytes: of each array and sequence, the blocks that P entries can touch, read and written once
        ((P + 126) div 128 + 1 blocks of 128 entries of turned arrays, (P + 30) div 32 + 1 of 32 of rows),
        whatever S is, and as much of `new`, laid out in blocks. XLA's scatter copies a whole stack of narrow
        numbers there and back, since it wants tiles of another shape than loops and kernels do.
    Sharding: `SPLITS`; of turned arrays S is the last dim.
    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown impl; all problems at once.
        TypeError: when differentiated.
    """
    if problems := _problems(stack, repeat, new, first, count, impl):
        raise ValueError("write_entries: " + "; ".join(problems))
    if not len(first):
        return stack
    if impl == "reference":
        arrays = jax.tree.map(
            lambda rows, new: write_entries_reference(rows, repeat, new, first, count), stack.rows, new
        )
        return Columns(Columns(arrays, stack.turned).rows, stack.turned)
    run = functools.partial(kernel_tpu.write, turned=stack.turned, interpret=interpret)
    leaves, tree = jax.tree.flatten(stack.stored)
    repeat = jnp.clip(repeat, 0, leaves[0].shape[0] - 1)
    written = _without_gradient(run, leaves, repeat, jax.tree.leaves(new), first, count)
    return Columns(jax.tree.unflatten(tree, written), stack.turned)


def _problems(stack, repeat, new, first, count, impl) -> list[str]:
    """Every rule the arguments break."""
    rows = jax.tree_util.tree_flatten_with_path(stack.rows)[0]
    if jax.tree.structure(stack.stored) != jax.tree.structure(new):
        return [
            f"new has the structure {jax.tree.structure(new)}, the stack {jax.tree.structure(stack.stored)}"
        ]
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"repeat {repeat.shape} must be a scalar": repeat.shape == (),
        f"first {first.shape} and count {count.shape} must be one shape [B]": first.ndim == 1
        and first.shape == count.shape,
    }
    for name, x in (("repeat", repeat), ("first", first), ("count", count)):
        rules[f"{name} is {x.dtype}, must be int32"] = x.dtype == jnp.int32
    size, num_new = stack.size, jax.tree.leaves(new)[0].shape[1:2]
    for (path, array), added in zip(rows, jax.tree.leaves(new), strict=True):
        name = jax.tree_util.keystr(path).lstrip(".") or "stack"
        if array.ndim != 4 or added.ndim != 3:
            rules[f"{name} {array.shape} must be [R, B, S, C], and new {added.shape} [B, P, C]"] = False
            continue
        repeats, batch, entries, width = array.shape
        want = (batch, *num_new, width)
        rules |= not_empty(R=repeats, S=entries, C=width, P=added.shape[1])
        rules |= {
            f"{name} has {entries} entries, another array {size}": entries == size,
            f"{name}: new {added.shape} must be {want}": added.shape == want,
            f"{name}: new is {added.dtype}, must be {array.dtype}": added.dtype == array.dtype,
            f"{name} is for {batch} sequences, first for {first.shape}": first.shape == (batch,),
            f"{name} is {array.dtype}, must have 1, 2 or 4 bytes": array.dtype.itemsize in (1, 2, 4),
            f"{name}: {width} numbers of {array.dtype.itemsize} bytes must fill whole words of 4": width
            * array.dtype.itemsize
            % 4
            == 0,
        }
    return [rule for rule, holds in rules.items() if not holds]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_gradient(run, *operands):
    return run(*operands)


@_without_gradient.defjvp
def _refuse(run, primals, tangents):
    raise TypeError("write_entries has no gradient: whole sequences have no cache")


SPLITS = {
    "write_entries": Splits(
        arguments={"stack": "R B S C", "repeat": "", "new": "B P C", "first": "B", "count": "B"},
        results=("R B S C",),
        free="B",
    )
}
