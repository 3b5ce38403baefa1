"""One layer's parameters out of the stack of its repeats, inside a loop over them."""

from typing import Any

import jax
from jaxtyping import Array, Int32

from dsv4_jax.parameters import Path, row_at
from pallas_kernels.formats.weights import is_quantized


def one_repeat(
    states: dict[str, Any], repeat: Int32[Array, ""], in_place: bool, root: Path
) -> dict[str, Any]:
    """A repeat's parameters; operations index the stacks of experts, of which a cached step uses few.

    With `in_place`, other quantised weights stay in their stacks too. `root` is the path of the states in the
    parameter tree.
    """
    # The barrier keeps the slicing inside the loop: a backend that computes bfloat16 in float32 would
    # otherwise convert whole stacks before it, at every call.
    states, repeat = jax.lax.optimization_barrier((states, repeat))

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if row_at((*root, *(part.key for part in path))).role == "expert":
            return leaf
        if in_place and is_quantized(leaf):
            return leaf.at(repeat)
        return jax.tree.map(lambda array: array[repeat], leaf)

    return jax.tree_util.tree_map_with_path(one, states, is_leaf=is_quantized)
