"""What tests of kernels share: the strict interpreter, and one way to compare results."""

from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait", out_of_bounds_reads="raise"
)
"""Memory nobody wrote is NaN, copies happen at the wait, races are printed, no read goes out of bounds."""


def errors(got: Any, want: Any) -> dict[str, float]:
    """Largest difference relative to the largest wanted value, for each leaf of two trees of arrays, by path.

    Infinite where a leaf's shape is another, and where NaN or an infinity stands that is not wanted there (a
    wanted NaN never matches). Dtypes may differ: results in bfloat16 are compared with exact ones.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(want)
    assert jax.tree.structure(got) == structure
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    return {name(path): _error(x, y) for (path, y), x in zip(leaves, jax.tree.leaves(got), strict=True)}


def _error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return np.inf
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite]) or not np.isfinite(got[finite]).all():
        return np.inf
    difference = np.abs(got[finite] - want[finite]).max(initial=0)
    return difference / max(np.abs(want[finite]).max(initial=0), 1e-30)


def assert_close(got: Any, want: Any, bound: float) -> None:
    """That no leaf's error, relative to its largest wanted value, is above `bound`."""
    wrong = {name: error for name, error in errors(got, want).items() if not error <= bound}
    assert not wrong, wrong
