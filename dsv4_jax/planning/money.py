"""Dollars of a million tokens, beside what the published API asks for them."""

import dataclasses
from typing import Any

from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning.plan import Plan

PUBLISHED = {"flash": {"prefill": 0.14, "decode": 0.28}, "pro": {"prefill": 1.74, "decode": 3.48}}
"""DeepSeek's API, dollars of a million input (without a cache hit) and output tokens."""


@dataclasses.dataclass(frozen=True)
class Money:
    """Of a million tokens: input tokens for prefill, output tokens for decode, trained ones for training.

    Attributes:
        least, most: dollars, at the shortest and at the longest step.
        published: dollars that the API asks, None where it sells no such tokens.
        break_even: dollars a chip and hour at which the tokens cost what the API asks, at the longest and
            at the shortest step.
    """

    least: float
    most: float
    published: float | None
    break_even: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self)


def money(plan: Plan, usd_per_chip_hour: float, utilisation: float, model: str | None = None) -> Money:
    """What the tokens of a plan cost.

    Args:
        plan: whose tokens they are.
        usd_per_chip_hour: what a chip is rented for, dollars.
        utilisation: share of rented time in which such steps run.
        model: "flash" or "pro", whose prices are published; None for another.

    Raises:
        ProblemsError: for a rate that is not positive, or a utilisation not in (0, 1].
    """
    problems = []
    if not 0 < usd_per_chip_hour < float("inf"):
        problems.append(f"--usd-per-chip-hour {usd_per_chip_hour:g}: must be more than 0, and finite")
    if not 0 < utilisation <= 1:
        problems.append(f"--utilisation {utilisation:g}: must be more than 0 and at most 1")
    if problems:
        raise ProblemsError("cannot count money", problems)
    slow, fast = (rate * 3600 * utilisation / 1e6 for rate in plan.tokens_a_second_a_chip)  # millions an hour
    published = PUBLISHED.get(model or "", {}).get(plan.job.work)
    even = None if published is None else (published * slow, published * fast)
    return Money(usd_per_chip_hour / fast, usd_per_chip_hour / slow, published, even)
