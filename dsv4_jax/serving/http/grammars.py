"""Grammars of answers, compiled by llguidance for a model's tokenizer, under limits of size, time and work.

Compiling takes up to `COMPILE_SECONDS` and releases Python's lock: call it in a thread. Compiled grammars are
kept and shared; every answer has a state of its own. Added tokens (marks of the chat format) never stand for
text: only where a grammar names one of them by its id.
"""

import collections
import concurrent.futures
import dataclasses
import json
import threading
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from dsv4_jax.serving.constraints import WORD
from dsv4_jax.serving.http.errors import busy, invalid

COMPILE_SECONDS = 2.0
COMPILED_AT_ONCE = 2
KEPT = 64
"""Compiled grammars that are kept, the latest used, and refusals among them."""

_Found = tuple[str | None, LLMatcher]
"""(what is wrong with a grammar, or None; the compiled grammar)."""

LIMITS = {
    "max_grammar_size": 200_000,  # symbols of productions
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # 1 to 2 kB each
    "verbose_errors": False,
}


class TokenState:
    """Where in a grammar one answer is (`serving.constraints.GrammarState`)."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, words: np.ndarray) -> None:
        """Writes the tokens that may come next; none after a fault of the matcher, or where it must end."""
        if self._matcher.is_error() or self._matcher.is_stopped():
            words[:] = 0
            return
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():  # beyond a limit of work
            words[:] = 0

    def may_end(self) -> bool:
        """Whether what was taken is complete."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    def take(self, token: int) -> bool:
        """Goes on by a token; False if the grammar does not have it."""
        return self._matcher.consume_token(token)


@dataclasses.dataclass(frozen=True)
class CompiledGrammar:
    """A grammar of answers (`serving.constraints.Grammar`)."""

    matcher: LLMatcher
    opens_after: int | None

    def begin(self) -> TokenState:
        """Its beginning, for one answer."""
        return TokenState(self.matcher.deep_copy())


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: of the model. vocab_size: V. eos_ids: tokens that end a turn.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        description = json.loads(tokenizer.to_str()) | {"truncation": None, "padding": None}
        for token in description["added_tokens"]:
            token["special"] = True
        ends = sorted(eos_ids)
        self._tokenizer = LLTokenizer(json.dumps(description), n_vocab=vocab_size, eos_token=ends)
        self._ends, self._num_words = ends, -(-vocab_size // WORD)
        self._limits = LLParserLimits(**LIMITS)
        self._pool = concurrent.futures.ThreadPoolExecutor(
            COMPILED_AT_ONCE, thread_name_prefix="dsv4-grammar"
        )
        self._kept: collections.OrderedDict[str, _Found] = collections.OrderedDict()
        self._running: dict[str, concurrent.futures.Future[_Found]] = {}
        self._changing = threading.Lock()

    def compiled(self, text: str, opens_after: int | None, path: str) -> CompiledGrammar:
        """A grammar from text of Lark.

        Args:
            opens_after: the token that it begins after; None: it begins with the answer.
            path: of the field that asks for it.

        Raises:
            HttpProblem: 400 for what cannot be compiled or is beyond a limit, 429 if too many wait for it.
        """
        with self._changing:
            found = self._kept.get(text)
            if found is not None:
                self._kept.move_to_end(text)
            elif (work := self._running.get(text)) is None:
                work = self._running[text] = self._pool.submit(self._work, text)
        if found is None:
            try:
                found = work.result(COMPILE_SECONDS)
            except concurrent.futures.CancelledError:
                raise busy("too many schemas are compiled now") from None
            except concurrent.futures.TimeoutError:
                if work.cancel():
                    with self._changing:
                        self._running.pop(text, None)
                    raise busy("too many schemas are compiled now") from None
                # It goes on: what comes of it is there for the next who asks.
                rule = f"takes longer than the {COMPILE_SECONDS:g} s that compiling a grammar may take"
                raise invalid([f"{path}: {rule}"]) from None
        problem, matcher = found
        if problem is not None:
            raise invalid([f"{path}: {problem}"])
        return CompiledGrammar(matcher, opens_after)

    def _work(self, text: str) -> _Found:
        try:
            found = self._compile(text)
            with self._changing:
                self._kept[text] = found
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return found
        finally:
            with self._changing:
                self._running.pop(text, None)

    def _compile(self, text: str) -> _Found:
        matcher = LLMatcher(self._tokenizer, text, limits=self._limits, log_level=0)
        if matcher.is_error():
            return _told(matcher.get_error()), matcher
        if warnings := matcher.get_grammar_warnings():
            return _told(warnings[0]), matcher
        words = np.zeros(self._num_words, np.uint32)
        state = TokenState(matcher.deep_copy())
        state.allowed(words)
        for token in self._ends:
            words[token // WORD] &= ~np.uint32(1 << token % WORD)
        if not words.any() and not state.may_end():
            return "no value satisfies it, or finding one is beyond the limits of work", matcher
        return None, matcher


_KINDS = (
    ("Unimplemented keys", "has a keyword that is not supported"),
    ("Unknown format", "has a format that is not supported"),
    ("Invalid type", "has a type that JSON does not have"),
    ("oneOf", "has a oneOf whose choices are not told apart; use anyOf"),
    ("Unsatisfiable", "no value satisfies it"),
    ("for integer range", "has bounds of an integer that are beyond what can be kept"),
    ("for float range", "has bounds of a number that are beyond what can be kept"),
    ("not disjoint", "has patternProperties whose patterns can match the same name"),
    ("Expected positive integer", "has a length or a count that is no whole number from 0 on"),
    ("regex", "has a pattern that is no regular expression of the supported kind"),
    ("look-around", "has a pattern with look-around, which is not supported"),
    ("does not exist", "has a $ref that points nowhere"),
    ("registry", "has a $ref that points nowhere"),
    ("too large", "is beyond the limits of a grammar's size"),
    ("fuel", "is beyond the limits of the work that compiling may take"),
    ("limit", "is beyond the limits of a grammar's size or work"),
)


def _told(error: str) -> str:
    """What a client is told about an error of the compiler, which may repeat what the client sent."""
    for word, rule in _KINDS:
        if word in error:
            return rule
    return "cannot be compiled to a grammar"
