"""Token files: ids of documents end to end, mapped into memory and read only where a row needs them.

    corpus.npy        one axis of uint16, uint32 or int32, or corpus.bin: the same numbers without a header
    corpus.ends.npy   int64: where each document ends, begin and end tokens included

What is packed with what follows from the ends alone, so that each process reads its own rows and no more. A
corpus that many processes train on should be tokenised once into such a file.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dsv4_jax.training.documents import BadRecord, DataError, Document

TokenType = Literal["uint16", "uint32", "int32"]
_TYPES = tuple(np.dtype(name) for name in ("uint16", "uint32", "int32"))
_CHUNK = 2**24


def ends_path(path: Path) -> Path:
    """Where the document ends of a token file are."""
    return path.with_name(f"{path.stem}.ends.npy")


def write_token_file(path: Path, documents: Iterable[np.ndarray], dtype: TokenType = "uint32") -> int:
    """Writes a token file and its document ends; documents are taken one at a time.

    Args:
        path: of the file to write, `.bin`; a file that is there is replaced.
        documents: token ids [n] each.
        dtype: of the file.

    Returns:
        How many tokens were written.

    Raises:
        ValueError: another suffix, or ids that `dtype` cannot hold; the message names the document.
    """
    if path.suffix != ".bin":
        raise ValueError(f"path={str(path)!r} must end in .bin")
    limits, ends = np.iinfo(dtype), [0]
    with open(path, "wb") as file:
        for number, tokens in enumerate(documents):
            if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
                raise ValueError(f"document {number} has token ids that {dtype} cannot hold")
            file.write(np.asarray(tokens).astype(dtype).tobytes())
            ends.append(ends[-1] + len(tokens))
    np.save(ends_path(path), np.asarray(ends[1:], np.int64))
    return ends[-1]


class TokenFileDocuments:
    """The documents of token files.

    Args:
        paths: `.npy` or `.bin` files.
        dtype: of `.bin` files; None if there are none.
        end_token: the id that ends a document, for files without document ends: they are then read through
            once, to find them.

    Raises:
        DataError: files that are not what they should be, all problems at once.
    """

    def __init__(self, paths: Sequence[Path], dtype: TokenType | None, end_token: int | None) -> None:
        self._paths = paths
        self._tokens: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        problems = []
        for path in paths:
            try:
                tokens = _mapped(path, dtype)
                ends = _read_ends(path, tokens) if end_token is None else _found_ends(tokens, end_token)
            except (OSError, ValueError) as error:
                problems.append(f"{path}: {error}")
                continue
            self._tokens.append(tokens)
            self._ends.append(ends)
        if problems:
            raise DataError("cannot read token files", problems)
        self._first = list(itertools.accumulate(map(len, self._ends), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def place(self, number: int) -> str:
        file = bisect.bisect_right(self._first, number) - 1
        return f"{self._paths[file]}, document {number - self._first[file] + 1}"

    def read(self, number: int, draw: np.random.Generator) -> Document | BadRecord:
        """The document as a view of the file: nothing is read yet."""
        file = bisect.bisect_right(self._first, number) - 1
        index = number - self._first[file]
        start = int(self._ends[file][index - 1]) if index else 0
        end = int(self._ends[file][index])
        if start == end:
            return BadRecord(self.place(number), "has no tokens")
        return Document(self._tokens[file][start:end])


def _mapped(path: Path, dtype: TokenType | None) -> np.ndarray:
    if path.suffix == ".npy":
        tokens = np.load(path, mmap_mode="r")
    elif dtype is None:
        raise ValueError("has no header: dtype must say what its numbers are")
    elif path.stat().st_size % np.dtype(dtype).itemsize:
        raise ValueError(f"has {path.stat().st_size} bytes, which is no whole number of {dtype}")
    elif not path.stat().st_size:
        raise ValueError("is empty")
    else:
        tokens = np.memmap(path, dtype, mode="r")
    if tokens.ndim != 1 or tokens.dtype not in _TYPES:
        names = ", ".join(map(str, _TYPES))
        raise ValueError(f"holds {tokens.dtype}{list(tokens.shape)}; one axis of {names} is needed")
    return tokens


def _read_ends(path: Path, tokens: np.ndarray) -> np.ndarray:
    where = ends_path(path)
    if not where.is_file():
        raise ValueError(f"has no document ends {where.name} beside it, and no end_token is given")
    ends = np.load(where)
    if ends.ndim != 1 or ends.dtype != np.int64 or not len(ends):
        raise ValueError(f"{where.name} holds {ends.dtype}{list(ends.shape)}; one axis of int64 is needed")
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(tokens):
        raise ValueError(
            f"{where.name} must never fall and end at the {len(tokens)} tokens of the file; "
            f"its first is {ends[0]}, its last {ends[-1]}"
        )
    return ends


def _found_ends(tokens: np.ndarray, end_token: int) -> np.ndarray:
    """i64[documents]: after every end token, and after the last token."""
    starts = range(0, len(tokens), _CHUNK)
    found = [start + 1 + np.flatnonzero(tokens[start : start + _CHUNK] == end_token) for start in starts]
    ends = np.concatenate(found).astype(np.int64)
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))
