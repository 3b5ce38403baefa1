"""Generation with drafts: several tokens a step, the same tokens as without.

A drafter guesses, one compiled step verifies (`steps.verify`), and rejected drafts are taken back from the
cache. Rows go on at their own pace; columns are handed out when every row has reached them.

Every accepted token is the one that the model draws in that step. A step of several positions may round
other than a step of one, as any two shapes may: in float32 the tests find no token changed, in bfloat16 two
logits that are nearly equal can change places. It is the order of sums that differs, not what is summed. On
a CPU each row of an expert that has few of them is multiplied in a loop of its own, as is a single row
everywhere, while more rows go through a matrix product; sums are float32, and now and then one is rounded to
the other bfloat16 number. With one way of multiplying for all counts of an expert's rows, steps of one and
of eight positions of four rows were equal in every bit; experts take 1.3 to 1.7 times as long then (the
table in `grouped_matmul.tuning`), so it is not done. Two steps of the same shape agree in every bit,
whatever the other rows hold: an engine with one width of drafts (`EngineSettings.draft_widths`) gives the
same answers in any company, in bfloat16 too.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dsv4_jax.inference import steps
from dsv4_jax.inference.drafters import ENOUGH, FLOORS, LOOKUP_WIDTHS, Draft, looked_up, width_for
from dsv4_jax.inference.generate import prefill
from dsv4_jax.inference.sampling import NO_TOKEN, checked_sampling, request_keys
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.initial import Network
from dsv4_jax.parameters import Parameters

LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass
class Acceptance:
    """What became of the drafts of one call, row by row and step by step.

    Attributes:
        accepted: of each row, the drafts that became tokens, one number a step.
        drafted: of each row, the drafts that were verified, one number a step.
    """

    accepted: list[list[int]]
    drafted: list[list[int]]

    @staticmethod
    def of(batch: int) -> "Acceptance":
        """Of rows without steps."""
        return Acceptance([[] for _ in range(batch)], [[] for _ in range(batch)])

    def by_position(self) -> list[tuple[int, int]]:
        """(accepted, drafted) at positions 1, 2, ...: a draft at a position counts only if all drafts before
        it were accepted, so that a ratio is the chance of one more token."""
        pairs = [
            pair
            for accepted, drafted in zip(self.accepted, self.drafted, strict=True)
            for pair in zip(accepted, drafted, strict=True)
        ]
        most = max((drafted for _, drafted in pairs), default=0)
        return [
            (
                sum(accepted > place for accepted, _ in pairs),
                sum(drafted > place and accepted >= place for accepted, drafted in pairs),
            )
            for place in range(most)
        ]


@dataclasses.dataclass
class _Row:
    """The tokens of one row."""

    prompt: list[int]
    new: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False

    def add(self, tokens: Sequence[int], stops: frozenset[int], most: int) -> int:
        """Takes over tokens up to a stop token, a token that could not be drawn, or the budget; how many."""
        before = len(self.new)
        for token in tokens:
            self.new.append(token)
            self.ended = token in stops or token == NO_TOKEN or len(self.new) == most
            if self.ended:
                break
        return len(self.new) - before


def stream(
    network: Network,
    parameters: Parameters,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    draft: Draft,
    acceptance: Acceptance,
    temperature: float,
    top_p: float,
    seed: int | Sequence[int],
    stop_token_ids: Sequence[int],
) -> Iterator[np.ndarray]:
    """As `generate.stream`, which tells the other arguments and the errors, with drafts.

    Args:
        cache: with the slot that the drafter reads, and the `max_rewind` of `rewind_for`.
        draft: who guesses.
        acceptance: of no steps yet; every step adds to it.
    """
    heat, nucleus = checked_sampling(temperature, top_p)
    requests = request_keys(seed, len(prompts))
    if max_new_tokens == 0:
        return
    stops = frozenset(stop_token_ids)
    rows = [_Row(list(prompt)) for prompt in prompts]
    logits, cache = prefill(network, parameters, cache, prompts)
    drawing = (requests, *(np.full(len(prompts), value) for value in (heat, nucleus)))
    drawing = tuple(network.put(each, "B") for each in drawing)
    lengths = network.put(np.array([len(prompt) for prompt in prompts], np.int32), "B")
    token = steps.draw(network, logits, drawing[0], lengths, *drawing[1:])
    for row, first in zip(rows, np.asarray(token), strict=True):
        row.add([int(first)], stops, max_new_tokens)
    column, warned = 0, False
    while True:
        while column < max_new_tokens and all(len(row.new) > column or row.ended for row in rows):
            yield _column(rows, column)
            column += 1
            if all(row.new[min(column, len(row.new)) - 1] in stops for row in rows):
                return
        if column == max_new_tokens:
            return
        drafts, num_drafts = _drafted(draft, network, parameters, cache, token, rows, drawing, max_new_tokens)
        put = network.put(drafts, "B"), network.put(num_drafts, "B")
        drawn, accepted, token, cache = steps.verify(network, parameters, cache, token, *put, *drawing)
        for place, (row, tokens, count) in enumerate(
            zip(rows, np.asarray(drawn), np.asarray(accepted), strict=True)
        ):
            if row.ended:
                continue
            taken = row.add(tokens[: count + 1].tolist(), stops, max_new_tokens)
            kept, offered = min(taken, int(count)), int(num_drafts[place])
            acceptance.accepted[place].append(kept)
            acceptance.drafted[place].append(kept if taken <= count else offered)
        warned = warned or _warn_of_low_acceptance(draft, acceptance)


def draft_block(
    network: Network,
    parameters: Parameters,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a DSpark head makes of prompts: `steps.draft_block` after their greedy next token.

    Args:
        network, parameters: of a model with such a head.
        cache: empty, with a slot for it.
        prompts: of one token at least.
    """
    logits, cache = prefill(network, parameters, cache, prompts)
    greedy = (np.zeros(len(prompts), np.float32), np.ones(len(prompts), np.float32))
    drawing = tuple(network.put(each, "B") for each in (request_keys(0, len(prompts)), *greedy))
    token = steps.draw(network, logits, drawing[0], cache.length, *drawing[1:])
    return steps.draft_block(network, parameters, cache, token, *drawing)


def _column(rows: Sequence[_Row], column: int) -> np.ndarray:
    """i32[B]; a row that has stopped repeats its stop token."""
    tokens = [row.new[min(column, len(row.new) - 1)] for row in rows]
    if broken := [number for number, token in enumerate(tokens) if token == NO_TOKEN]:
        places = "; ".join(f"row {row}, position {len(rows[row].prompt) + column}" for row in broken)
        raise FloatingPointError(f"logits are not finite numbers, no token can be drawn: {places}")
    return np.array(tokens, np.int32)


def _drafted(
    draft: Draft,
    network: Network,
    parameters: Parameters,
    cache: Cache,
    token: jax.Array,
    rows: Sequence[_Row],
    drawing: tuple[Any, ...],
    max_new_tokens: int,
) -> tuple[jax.Array | np.ndarray, np.ndarray]:
    """Drafts i32[B, k] and how many of them are meant, i32[B]: no more than tokens are still wanted after the
    one that the model draws itself, which also keeps every row inside its cache; -1 for rows that ended."""
    room = np.array([-1 if row.ended else max_new_tokens - len(row.new) - 1 for row in rows], np.int32)
    if draft == "lookup":
        most = LOOKUP_WIDTHS[-1]
        guesses = [looked_up(row.prompt + row.new, min(n, most)) for row, n in zip(rows, room, strict=True)]
        counts = np.array([len(guess) for guess in guesses], np.int32)
        drafts = np.zeros((len(rows), width_for(int(counts.max()))), np.int32)
        for line, guess in zip(drafts, guesses, strict=True):
            line[: len(guess)] = guess
        return drafts, np.minimum(counts, room)
    if draft == "dspark":
        drafts, _, _ = steps.draft_block(network, parameters, cache, token, *drawing)
    else:
        drafts = steps.draft_further(network, parameters, cache, token, *drawing)
    return drafts, np.minimum(room, drafts.shape[1]).astype(np.int32)


def _warn_of_low_acceptance(draft: Draft, acceptance: Acceptance) -> bool:
    """Whether there was reason to warn."""
    if draft not in FLOORS:
        return False
    (accepted, drafted), *_ = acceptance.by_position() or [(0, 0)]
    if drafted < ENOUGH or accepted >= FLOORS[draft] * drafted:
        return False
    LOGGER.warning(
        "draft=%r: %d of %d first drafts were accepted, fewer than %.0f %%: outputs are right, but the draft"
        " head does not fit the model, or reads the wrong layers or a stale ring",
        draft,
        accepted,
        drafted,
        100 * FLOORS[draft],
    )
    return True
