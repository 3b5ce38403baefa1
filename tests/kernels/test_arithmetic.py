"""`cdiv` and `round_up` against their definitions."""

import math

import pytest

from pallas_kernels.arithmetic import cdiv, round_up


@pytest.mark.parametrize("value", [0, 1, 7, 8, 9, 16, 10**18 + 1])
@pytest.mark.parametrize("divisor", [1, 3, 8])
def test_rounding_up(value, divisor):
    assert cdiv(value, divisor) == value // divisor + (value % divisor > 0)
    assert round_up(value, divisor) == divisor * cdiv(value, divisor)
    assert 0 <= round_up(value, divisor) - value < divisor
    assert math.gcd(round_up(value, divisor), divisor) in (divisor, 0)
