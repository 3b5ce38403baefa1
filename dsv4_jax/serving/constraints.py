"""Answers under a grammar: which tokens may come next, as a mask for each slot.

What a grammar is stays behind two small protocols (`serving.http.grammars` has that of JSON and tool
calls). It begins with the answer, or after one token (the end of the reasoning): until then a row draws as
any other does, also from drafts.

**What it costs.** A mask depends on the token before it. So a row under a grammar draws one token a step,
without drafts, and the engine reads a step before it starts the next one while such a row runs: the device
waits for the host's masks, and with it the other rows of the batch. The alternative, others going on while
masked rows sit out every second step, would halve the speed of the masked ones to save the others that gap.
A row in its reasoning makes nobody wait: the device holds it by itself after the token that ends the
reasoning (`slots.Slots.gate`), until the host gives a mask. Batches without grammars upload nothing.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

WORD = 32
"""Tokens in a word of a mask; the first is the lowest bit."""


class GrammarState(Protocol):
    """Where in a grammar one answer is."""

    def allowed(self, words: np.ndarray) -> None:
        """Writes the tokens that may come next, without those that end an answer, to uint32[ceil(V / 32)]."""

    def may_end(self) -> bool:
        """Whether what was taken so far is complete."""

    def take(self, token: int) -> bool:
        """Goes on by a token; False if the grammar does not have it."""


class Grammar(Protocol):
    """A compiled grammar; the answers of several requests may share it."""

    @property
    def opens_after(self) -> int | None:
        """The token after which it begins; None: it holds from the first token on."""

    def begin(self) -> GrammarState:
        """Its beginning, for one answer."""


class Guide:
    """One answer's way through its grammar.

    Args:
        grammar: of the request. stops: token ids that end the answer: allowed where the grammar may end, and
            nowhere else.
    """

    def __init__(self, grammar: Grammar, stops: frozenset[int]) -> None:
        self.is_open = grammar.opens_after is None
        self._gate, self._stops = grammar.opens_after, stops
        self._state = grammar.begin()

    @property
    def gate(self) -> int | None:
        """The token that opens it, while it is closed."""
        return None if self.is_open else self._gate

    def take(self, token: int) -> bool:
        """Goes on by a drawn token; False if it was not allowed."""
        if self.is_open:
            return token in self._stops or self._state.take(token)
        self.is_open = token == self._gate
        return True

    def fill(self, words: np.ndarray) -> bool:
        """Writes the mask of the next token to uint32[ceil(V / 32)]; False if no token is allowed."""
        self._state.allowed(words)
        may_end = self._state.may_end()
        for token in self._stops:
            bit = np.uint32(1 << token % WORD)
            words[token // WORD] = words[token // WORD] | bit if may_end else words[token // WORD] & ~bit
        return bool(words.any())


class Masks:
    """The masks of all slots, on the device.

    Args:
        put: places an array of one row a slot. num_slots: S. vocab_size: V.
    """

    def __init__(self, put: Callable[[np.ndarray], jax.Array], num_slots: int, vocab_size: int) -> None:
        self._put, self._shape = put, (num_slots, -(-vocab_size // WORD))
        self._nobody = put(self._open()), put(np.zeros(num_slots, bool))

    def of(self, guides: Sequence[Guide | None]) -> tuple[jax.Array, jax.Array, list[int]]:
        """The masks of those slots whose guide is open.

        Returns:
            (uint32[S, ceil(V / 32)], bool[S]: which slots draw under theirs, slots that have no token left).
        """
        under = [slot for slot, guide in enumerate(guides) if guide is not None and guide.is_open]
        if not under:
            return *self._nobody, []
        words, given = self._open(), np.zeros(self._shape[0], bool)
        stuck = []
        for slot in under:
            given[slot] = guides[slot].fill(words[slot])
            if not given[slot]:
                stuck.append(slot)
        return self._put(words), self._put(given), stuck

    def _open(self) -> np.ndarray:
        return np.full(self._shape, 0xFFFFFFFF, np.uint32)
