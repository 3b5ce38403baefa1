"""Integer arithmetic used by every kernel family; this is the only copy."""


def cdiv(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator) of non-negative integers."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return cdiv(value, multiple) * multiple
