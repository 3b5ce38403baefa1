"""Which sizes may be 0, for every family: there may be nothing to compute, but no model has an axis of 0."""


def not_empty(**sizes: int) -> dict[str, bool]:
    """The rule that these axes, named by the letters of an operation's contract, have at least one element.

    Axes of a batch, of tokens, of entries to choose from and of choices may be empty; those of the model
    (heads, channels, experts, layers of a stack) may not.
    """
    return {f"{letter}={size} must be at least 1": size >= 1 for letter, size in sizes.items()}
