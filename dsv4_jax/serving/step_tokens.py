"""How many tokens the engine's steps computed and drew: a histogram that costs nothing a step."""

import bisect

BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class StepTokens:
    """Counts steps by their tokens: of prompts that were computed, and of answers that were given out.

    Attributes:
        counts: steps of at most BOUNDS[k] tokens and more than the bound before; the last: of more than all.
        total: tokens of all steps.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0

    def add(self, tokens: int) -> None:
        """One step; one without any token, which only waited for the device, does not count."""
        if tokens:
            self.counts[bisect.bisect_left(BOUNDS, tokens)] += 1
            self.total += tokens
