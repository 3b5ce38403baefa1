"""The comparison that all tests of kernels use notices what it should."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.checks import STRICT, assert_close, errors

WANT = {"a": np.array([1.0, -4.0]), "b": (np.array([0.0, -np.inf]),)}


def changed(name, value):
    return WANT | {name: value}


def test_errors_are_relative_to_the_largest_wanted_value_of_a_leaf():
    assert errors(WANT, WANT) == {"a": 0, "b.0": 0}
    assert errors(changed("a", jnp.array([1.0, -4.5])), WANT) == {"a": 0.125, "b.0": 0}
    assert errors(np.array(3), np.array(2)) == {"": 0.5}
    assert errors(np.zeros(0), np.zeros(0)) == {"": 0}


@pytest.mark.parametrize(
    "got",
    [
        changed("a", np.array([1.0, np.nan])),
        changed("a", np.array([1.0, np.inf])),
        changed("a", np.array([1.0])),
        changed("b", (np.array([-np.inf, 0.0]),)),
        changed("b", (np.array([0.0, np.inf]),)),
        changed("b", (np.array([0.0, np.nan]),)),
        changed("b", (np.array([1e-20, -np.inf]),)),  # nothing is close to 0 but 0
    ],
    ids=str,
)
def test_what_is_not_close(got):
    with pytest.raises(AssertionError, match="inf|99999999"):
        assert_close(got, WANT, 1e3)


def test_a_wanted_nan_never_matches_and_other_trees_are_refused():
    assert errors(np.array(np.nan), np.array(np.nan)) == {"": np.inf}
    with pytest.raises(AssertionError):
        errors({"a": WANT["a"]}, WANT)


def test_the_bound_is_kept_and_the_leaf_named():
    got = changed("a", np.array([1.0, -4.5]))
    assert_close(got, WANT, 0.125)
    with pytest.raises(AssertionError, match="'a': .*0.125"):
        assert_close(got, WANT, 0.12)


def test_strict_is_as_strict_as_can_be():
    assert STRICT.detect_races and STRICT.uninitialized_memory == "nan"
    assert STRICT.dma_execution_mode == "on_wait" and STRICT.out_of_bounds_reads == "raise"


def test_no_test_has_a_comparison_or_a_strictness_of_its_own():
    """Names alone are looked for: a copy under another name is found by whoever reads it."""
    own = re.compile(r"^def (close|errors|assert_close)\(|InterpretParams\(", re.MULTILINE)
    tests = pathlib.Path(__file__).parents[1]
    found = [path.name for path in sorted(tests.rglob("*.py")) if own.search(path.read_text())]
    assert found == ["checks.py"]
