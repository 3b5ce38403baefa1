"""How many drafts a step verifies: as many as pay for the time that they take.

A step that verifies w drafts takes `seconds[w]`, measured when the engine starts, and gives a row one token
and as many more as were right. The width with the most tokens a second is used (DSpark's adaptive
verification, with the acceptance of the steps just read in place of confidences). No drafts is one of the
widths, so drafts that are wrong cost what it takes to find that out, and a short look now and then whether
they still are.
"""

import collections
from collections.abc import Sequence

MEMORY = 0.95
"""Weight of what was known of acceptance when one row of one step is added: half of it is 14 rows old."""

LOOK_STEPS = 8
"""Steps of a look at the widest."""

FIRST_PAUSE, LONGEST_PAUSE = 64, 2048
"""Steps between looks; a pause doubles when a look changes nothing."""


class DraftWidths:
    """Chooses among a few widths, each a compiled program of its own.

    Until every width has its seconds the widest is used.

    Args:
        widths: drafts that a step may verify, ascending.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        self.seconds: dict[int, float] = {}  # of one step
        self.forced: int | None = None  # used whatever else is known
        self.steps: collections.Counter[int] = collections.Counter()  # by width
        self.survival = [1.0] * self.widths[-1]  # share of rows whose drafts up to a place were right
        self._pause, self._since, self._looking = FIRST_PAUSE, 0, 0

    def best(self) -> int:
        """The width with the most tokens a second, by what is known; of equal ones the narrower."""
        if len(self.seconds) < len(self.widths):
            return self.widths[-1]
        return max(self.widths, key=lambda width: (self.tokens(width) / self.seconds[width], -width))

    def tokens(self, width: int) -> float:
        """That a row gets of a step, expected."""
        total, least = 1.0, 1.0
        for place in range(width):
            # No place survives more often than the one before it, however old the news of it are.
            least = min(least, self.survival[place])
            total += least
        return total

    def next(self) -> int:
        """The width of the next step."""
        width = self.best() if self.forced is None else self.forced
        if self.forced is None and width != self.widths[-1]:
            width = self._look(width)
        self.steps[width] += 1
        return width

    def _look(self, width: int) -> int:
        if self._looking:
            self._looking -= 1
            return self.widths[-1]
        self._since += 1
        if self._since >= self._pause:
            self._pause, self._since = min(2 * self._pause, LONGEST_PAUSE), 0
            self._looking = LOOK_STEPS - 1
            return self.widths[-1]
        return width

    def add(self, width: int, kept: Sequence[int]) -> None:
        """Takes what a step of this width gave: of every row that it served, the drafts that were right."""
        if not width or not kept:
            return
        before = self.best()
        old = MEMORY ** len(kept)
        for place in range(width):
            share = sum(count > place for count in kept) / len(kept)
            self.survival[place] = old * self.survival[place] + (1 - old) * share
        if self.best() > before:  # drafts have become worth more: look again soon if that does not last
            self._pause = FIRST_PAUSE
