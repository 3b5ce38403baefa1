"""What every source of training data gives: documents by number, or what is wrong with a record.

A record that cannot be used is no error by itself: whoever reads decides (`Reading.bad_records`). It says
where it is, so that it can be found in the data.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from dsv4_jax.config.quantities import integer_problem
from dsv4_jax.errors import ProblemsError
from dsv4_jax.training.fill_in_the_middle import FillInTheMiddle


class DataError(ProblemsError):
    """Training data that cannot be read or does not fit the model."""


class Document(NamedTuple):
    """The tokens of one document, begin and end of it included.

    Attributes:
        tokens: ids [n] of an integer dtype; may be mapped from a file and unread.
        counts: bool[n], whether a token is a target of the loss; None: all of them. Either all documents of
            a source have it or none.
        whole: must not be cut: longer than a row it is a bad record.
    """

    tokens: np.ndarray
    counts: np.ndarray | None = None
    whole: bool = False


class BadRecord(NamedTuple):
    """A record that is no document.

    Attributes:
        place: file and line, or row.
        problem: the rule that it breaks, with the value.
    """

    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


class Documents(Protocol):
    """Documents by number; reading one changes nothing, so several threads may."""

    def __len__(self) -> int:
        """How many records there are, bad ones included."""

    def read(self, number: int, draw: np.random.Generator) -> Document | BadRecord:
        """The document of this number; `draw` is for what is random about it (fill in the middle)."""

    def place(self, number: int) -> str:
        """Where a record is, for messages."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records become rows; the same for every kind of source.

    Attributes:
        bad_records: "refuse" ends the run at the first of them with its place; "skip" counts them.
        num_threads: that read and tokenise ahead; they change no batch. 0: none.
        window_rows: documents are packed together until they fill so many rows; None: `window_tokens`.
        middle: fill in the middle, for sources of text; None: never.
    """

    bad_records: Literal["refuse", "skip"] = "refuse"
    num_threads: int = 2
    window_rows: int | None = None
    middle: FillInTheMiddle | None = None

    def problems(self) -> list[str]:
        """What is wrong with the fields."""
        found = [integer_problem("num_threads", self.num_threads, 0, 1024)]
        if self.window_rows is not None:
            found.append(integer_problem("window_rows", self.window_rows, 1))
        if self.bad_records not in ("refuse", "skip"):
            found.append(f'bad_records={self.bad_records!r} must be "refuse" or "skip"')
        return [problem for problem in found if problem]

    def window_tokens(self, seq_len: int) -> int:
        """Tokens that are packed together, at least: 32 rows or 2^18 tokens, whichever is more.

        A window leaves about half a row empty, so more of them pack better, and fewer start sooner.
        """
        rows = max(32, 2**18 // seq_len) if self.window_rows is None else self.window_rows
        return rows * seq_len


def matching_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that these paths and glob patterns name, each once, sorted by path.

    `**` stands for folders of any depth.

    Raises:
        DataError: patterns without a file, all of them at once.
    """
    found: set[Path] = set()
    problems = []
    if isinstance(patterns, str) or not patterns:
        problems.append(f"files={patterns!r} must be a tuple of at least one path or pattern")
        patterns = ()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            found.add(path)
            continue
        root = Path(path.anchor) if path.anchor else Path()
        relative = str(path.relative_to(root))
        here = [file for file in root.glob(relative) if file.is_file()] if relative != "." else []
        if not here:
            problems.append(f"{pattern!r} names no file")
        found.update(here)
    if problems:
        raise DataError("cannot read the training data", problems)
    return tuple(sorted(found))
