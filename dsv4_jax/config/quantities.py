"""Numbers that come from outside: one rule for integers, for seeds, and for arrays of integers.

A bool is not a number here, and 3.0 is not an integer: both are slips more often than wishes, and a cast
would hide them. Every check gives the problem as a text, so that a caller can report all at once.
"""

import math
import operator
from typing import Any

import numpy as np

from dsv4_jax.config.rules import shown

MAX_SEED = 2**63 - 1
"""Seeds are 0 .. 2^63 - 1: no two of them mean the same draw, and each fits a signed 64-bit integer."""

INT32_MAX = 2**31 - 1


def integer_problem(name: str, value: object, low: int, high: int | None = None) -> str | None:
    """What is wrong with an argument that must be an integer in low..high; None if nothing is.

    Python and numpy integers are integers, and so are integer arrays without axes; bools and floats are not.
    """
    bounds = f"of at least {low}" if high is None else f"in {low}..{high}"
    whole = None if is_bool(value) else _as_int(value)
    if whole is not None and low <= whole and (high is None or whole <= high):
        return None
    return f"{name}={shown(value if whole is None else whole)} must be an integer {bounds}"


def checked_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The argument as a Python int. Raises ValueError that names it and the range."""
    problem = integer_problem(name, value, low, high)
    if problem:
        raise ValueError(problem)
    return operator.index(value)


def seed_problem(seed: object) -> str | None:
    """What is wrong with a seed; None if it is an integer in 0 .. 2^63 - 1."""
    problem = integer_problem("seed", seed, 0, MAX_SEED)
    return problem and f"{problem} (2^63 - 1)"


def checked_seed(seed: Any) -> int:
    """The seed as a Python int. Raises ValueError that names it and the range."""
    problem = seed_problem(seed)
    if problem:
        raise ValueError(problem)
    return operator.index(seed)


def sampling_problems(temperature: Any, top_p: Any) -> list[str]:
    """What is wrong with the numbers that sampling is told: a temperature that is negative or not finite in
    float32, a top_p outside (0, 1]."""
    problems = []
    heat, mass = as_float(temperature), as_float(top_p)
    if heat is None or not 0.0 <= heat <= float(np.finfo(np.float32).max):
        problems.append(f"temperature={shown(temperature)} must be a number, finite and at least 0")
    if mass is None or not 0.0 < mass <= 1.0:
        problems.append(f"top_p={shown(top_p)} must be a number in (0, 1]")
    return problems


def integer_array(name: str, values: Any) -> tuple[np.ndarray | None, str | None]:
    """(array of integers, None), or (None, what is wrong).

    The array has the integer dtype that holds the values, or dtype object if none does, so that a range
    check sees the values that were given. Bools among the integers of a list are found, too.
    """
    if isinstance(values, (str, bytes, bytearray)):
        return None, f"{name} must be integers, but are {type(values).__name__}: {shown(values)}"
    try:
        array = np.asarray(values)
    except ValueError:  # rows of a list that differ in length
        return None, f"{name} must be one array: its rows have different lengths"
    kinds = _element_types(values)
    for kind in kinds:
        if issubclass(kind, (bool, np.bool_, str, bytes)):
            return None, f"{name} must be integers, but hold {kind.__name__}"
    if kinds and all(issubclass(kind, int) for kind in kinds) and not _is_whole(array):
        array = np.asarray(values, object)  # beyond 64 bits
    elif not _is_whole(array):
        return None, f"{name} of dtype {array.dtype} must be integers"
    return array, None


def outside(array: np.ndarray, low: int, high: int) -> list[int]:
    """Up to five values of an integer array that are not in low..high, in increasing order."""
    if not array.size or (low <= array.min() and array.max() <= high):
        return []
    return sorted({int(value) for value in array[(array < low) | (array > high)].flat})[:5]


def as_float(value: Any) -> float | None:
    """A real number of any type as a float; None for what is not one (bools, text, arrays with axes)."""
    if is_bool(value) or isinstance(value, (str, bytes, bytearray)) or np.shape(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:  # an int beyond float64
        return math.copysign(math.inf, value)


def is_bool(value: object) -> bool:
    """True for a bool of Python, numpy or JAX."""
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def _as_int(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_whole(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.integer)


def _element_types(values: Any) -> set[type]:
    """Types of the elements of nested lists; none for an array, whose dtype says it."""
    if not isinstance(values, (list, tuple)):
        return set()
    kinds = set(map(type, values))
    if any(issubclass(kind, (list, tuple)) for kind in kinds):
        kinds = {kind for kind in kinds if not issubclass(kind, (list, tuple))}
        kinds = kinds.union(*map(_element_types, values))
    return kinds
