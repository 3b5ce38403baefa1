"""Fill in the middle: part of the documents is told out of order, so that the model learns to insert.

A document is cut at two places and becomes prefix, suffix, middle, each behind its special token (the order
"PSM" of DeepSeek-V3, arXiv 2412.19437, section 4.1; V4's report, section 4.2, keeps it).
"""

import dataclasses

import numpy as np
from tokenizers import Tokenizer

BEGIN = "<｜fim▁begin｜>"
HOLE = "<｜fim▁hole｜>"
END = "<｜fim▁end｜>"


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """How often, and by which special tokens.

    Attributes:
        rate: share of the documents, 0 to 1; V3 takes 0.1.
        begin, hole, end: names of the special tokens in the tokenizer: before the prefix, before the suffix,
            and before the middle.
    """

    rate: float = 0.1
    begin: str = BEGIN
    hole: str = HOLE
    end: str = END

    @property
    def names(self) -> tuple[str, str, str]:
        """The special tokens in the order in which they stand in a document."""
        return self.begin, self.hole, self.end

    def problems(self, tokenizer: Tokenizer) -> list[str]:
        """What is wrong with the rate, and the special tokens that the tokenizer lacks."""
        found = []
        if not (isinstance(self.rate, (int, float)) and 0.0 <= self.rate <= 1.0):
            found.append(f"rate={self.rate!r} of fill in the middle must be a number in 0..1")
        return found + [
            f"the tokenizer has no token {name!r}, which fill in the middle needs ({field})"
            for field, name in zip(("begin", "hole", "end"), self.names, strict=True)
            if tokenizer.token_to_id(name) is None
        ]

    def parts(self, text: str, draw: np.random.Generator) -> tuple[str, str, str] | None:
        """(prefix, middle, suffix) of a text, cut between characters; None for a text that stays as it is."""
        if draw.random() >= self.rate:
            return None
        first, second = np.sort(draw.integers(0, len(text) + 1, 2)).tolist()
        return text[:first], text[first:second], text[second:]
