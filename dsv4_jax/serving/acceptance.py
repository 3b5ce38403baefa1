"""How many guesses were right, by place; and a warning when a draft head does not seem to fit its model."""

import logging

from dsv4_jax.inference.drafters import ENOUGH, FLOORS, Draft

LOGGER = logging.getLogger(__name__)


class DraftAcceptance:
    """Counts of an engine's drafts.

    A wrong capture point or a stale ring gives no error, only slow answers: acceptance at the first place
    under its floor (`inference.drafters.FLOORS`) is said once.
    """

    def __init__(self, draft: Draft | None) -> None:
        self._draft = draft
        self._kept: list[int] = []
        self._tried: list[int] = []
        self._warned = False
        self.guesses = 0  # made, whether or not one before them was wrong

    def add(self, tried: int, kept: int) -> None:
        """Takes the guesses of one slot in one step: a guess was tried if all before it were right."""
        self.guesses += tried
        while len(self._kept) < tried:
            self._kept.append(0)
            self._tried.append(0)
        for place in range(min(kept + 1, tried)):
            self._tried[place] += 1
            self._kept[place] += place < kept
        self._warn()

    def by_place(self) -> tuple[tuple[int, int], ...]:
        """(kept, tried) of the first guess behind a token, the second, and so on."""
        return tuple(zip(self._kept, self._tried, strict=True))

    def _warn(self) -> None:
        floor = None if self._draft is None else FLOORS.get(self._draft)
        if self._warned or floor is None or not self._tried or self._tried[0] < ENOUGH:
            return
        if self._kept[0] < floor * self._tried[0]:
            self._warned = True
            LOGGER.warning(
                "draft=%r: %d of %d first guesses were right, fewer than %.0f %%: answers are right, but the"
                " head does not fit the model, or reads the wrong layers",
                self._draft,
                self._kept[0],
                self._tried[0],
                100 * floor,
            )
