"""How a model answers in a conversation of this process."""

import dataclasses

from dsv4_jax.config import quantities
from dsv4_jax.errors import ProblemsError


@dataclasses.dataclass(frozen=True)
class Manner:
    """How to answer.

    Attributes:
        thinking: whether to reason before the answer.
        effort: how much, of the profile's.
        max_new_tokens: of one answer, reasoning included.
        temperature, top_p: of the draws.
        seed: of the first answer; each further one counts it up.
    """

    thinking: bool = True
    effort: str = "high"
    max_new_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def checked_manner(manner: Manner) -> Manner:
    """The manner as it is. Raises ProblemsError with everything that is wrong with its numbers."""
    checks = (
        quantities.integer_problem("--max-new-tokens", manner.max_new_tokens, 1),
        quantities.seed_problem(manner.seed),
        *quantities.sampling_problems(manner.temperature, manner.top_p),
    )
    if problems := [problem for problem in checks if problem]:
        raise ProblemsError("cannot chat", problems)
    return manner
