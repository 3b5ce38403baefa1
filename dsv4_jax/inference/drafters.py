"""What guesses the next tokens of a row, before the model confirms them (`speculative`).

* "mtp": the MTP block of the preview checkpoints, one token further (report, section 2.1).
* "dspark": the draft head of the later ones, a block of tokens in one pass (`model.dspark`).
* "lookup": what followed in the row itself the last time its latest tokens occurred; for every checkpoint.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from dsv4_jax.config import ModelConfig

Draft = Literal["mtp", "dspark", "lookup"]

FLOORS: dict[Draft, float] = {"mtp": 0.4, "dspark": 0.4}
"""Acceptance at position 1 below which something is wrong with a head or with what it reads: published heads
reach 0.58 to 0.94 there, and a wrong capture point or a stale ring gives no error. Lookup has no floor: what
a text repeats is up to the text."""

ENOUGH = 64
"""First drafts before acceptance is compared with a floor."""

LOOKUP_WIDTHS = (0, 3, 7)
"""Drafts that a verifying step of lookup has room for: each is a compiled program of its own."""

SHORTEST_MATCH, LONGEST_MATCH = 2, 16
"""Tokens at the end of a row that lookup compares with what came before."""


def draft_problem(draft: object, config: ModelConfig) -> str | None:
    """Why a model cannot draft so, or None."""
    if draft is None:
        return None
    if draft not in get_args(Draft):
        return f"draft={draft!r} must be one of {', '.join(map(repr, get_args(Draft)))}, or None"
    if draft == "mtp" and not config.num_nextn_predict_layers:
        return "draft='mtp': this model has no MTP block (num_nextn_predict_layers = 0)"
    if draft == "dspark" and config.dspark is None:
        return "draft='dspark': this model has no DSpark draft head"
    return None


def most_drafts(draft: Draft, config: ModelConfig) -> int:
    """k, drafts of one step at most."""
    if draft == "dspark":
        return config.dspark.block_size
    return 1 if draft == "mtp" else LOOKUP_WIDTHS[-1]


def widths_for(draft: Draft | None, config: ModelConfig) -> tuple[int, ...]:
    """Numbers of drafts that a step of the engine may verify, ascending; each is a compiled program.

    Of a block of drafts a step may verify the first few: the block, and so every draft, stays the same.
    """
    if draft is None:
        return (0,)
    if draft == "lookup":
        return LOOKUP_WIDTHS
    most = most_drafts(draft, config)
    return tuple(sorted({0, most // 2, most}))


def rewind_for(draft: Draft | None, config: ModelConfig) -> int:
    """`max_rewind` of a cache for this drafter: a verifying step then finds its rows in the rings, as one
    token does, and a cache is of the size it has without drafts, where that is enough."""
    return 8 if draft is None else max(most_drafts(draft, config) + 1, 8)


def width_for(num_drafts: int) -> int:
    """The narrowest of LOOKUP_WIDTHS that has room for so many drafts."""
    return next(width for width in LOOKUP_WIDTHS if width >= num_drafts)


def looked_up(tokens: Sequence[int], most: int) -> list[int]:
    """What followed the longest earlier occurrence of the last tokens, the latest one of equal length.

    Args:
        tokens: of one row, prompt and what was generated.
        most: ids to return at most.

    Returns:
        At most `most` ids; none if not even SHORTEST_MATCH tokens occurred before.
    """
    line = np.asarray(tokens, np.int64)
    size = len(line)
    # ends[i]: a match ends before ends[i], and line[ends[i]] is what followed it.
    ends = np.arange(1, size)
    found = ends[:0]
    length = 0
    while length < min(LONGEST_MATCH, size - 1) and len(ends):
        ends = ends[ends > length]
        ends = ends[line[ends - 1 - length] == line[size - 1 - length]]
        if len(ends):
            found, length = ends, length + 1
    if most < 1 or length < SHORTEST_MATCH:
        return []
    return line[found[-1] : found[-1] + most].tolist()
