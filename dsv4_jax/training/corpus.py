"""Real text that every Python installation already has: the sources of its standard library."""

import dataclasses
import hashlib
import os
import sysconfig
from pathlib import Path

from dsv4_jax.errors import ProblemsError

LEFT_OUT_FOLDERS = frozenset(
    {
        "__pycache__",
        "ensurepip",  # bundled wheels
        "encodings",  # generated character tables: trivially predictable, would flatter the loss
        "idlelib",
        "lib2to3",
        "pydoc_data",  # one generated dictionary of documentation pages
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
LEFT_OUT_PREFIXES = ("_sysconfigdata", "__phello__")  # generated, holds paths of the build machine
MAX_FILE_BYTES = 400_000
MIN_CORPUS_BYTES = 200_000
VALIDATION_FRACTION = 0.06


class CorpusError(ProblemsError):
    """Too little text was found to train on."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One source file: its path relative to the root with forward slashes, and its text."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents split by file; both parts are in order of their names."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of both parts."""
        return sum(len(doc.text.encode()) for doc in self.train + self.validation)


def _digest(name: str, purpose: str) -> int:
    """64 bits that depend on the arguments alone; different purposes are independent."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big")


def is_validation(name: str, fraction: float = VALIDATION_FRACTION) -> bool:
    """Whether a file belongs to the validation part.

    Depends on the name alone, so a file never moves to the other side with the seed, the order, the size
    cap, or Python's hash randomisation.
    """
    return _digest(name, "split") < fraction * 2**64


def source_files(root: Path) -> list[Path]:
    """The .py files of the standard library below `root`, sorted by relative path.

    Generated tables, tests, bundled packages, IDLE and lib2to3 are left out; links are not followed.
    """
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in LEFT_OUT_FOLDERS and not name.startswith(("config-", *LEFT_OUT_PREFIXES))
        ]
        found += [
            Path(folder, name)
            for name in files
            if name.endswith(".py") and not name.startswith(LEFT_OUT_PREFIXES)
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path) -> str | None:
    """The text with unix line ends, or None for what is not plain readable UTF-8 of a sensible size."""
    try:
        if path.is_symlink() or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
            return None
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text.replace("\r\n", "\n")


def gather_corpus(max_bytes: int = 16_000_000, root: Path | None = None) -> Corpus:
    """The standard library of the running interpreter as text, split into training and validation files.

    Args:
        max_bytes: cap on the total; files are then taken in the order of a hash of their names (an
            unbiased sample that does not change when other files come or go), each whole.
        root: a folder of .py files; the interpreter's own standard library if None.

    Raises:
        CorpusError: when less than 200 kB, or no validation file, was found.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    taken, total = [], 0
    for path in sorted(
        source_files(root), key=lambda path: _digest(path.relative_to(root).as_posix(), "sample")
    ):
        text = _read(path)
        if text is None:
            continue
        size = len(text.encode())
        if total + size > max_bytes:
            continue
        total += size
        taken.append(Document(path.relative_to(root).as_posix(), text))
    taken.sort(key=lambda document: document.name)
    corpus = Corpus(
        train=tuple(doc for doc in taken if not is_validation(doc.name)),
        validation=tuple(doc for doc in taken if is_validation(doc.name)),
    )
    problems = []
    if total < MIN_CORPUS_BYTES:
        problems.append(f"only {total:,} bytes of .py text found, at least {MIN_CORPUS_BYTES:,} needed")
    if not corpus.validation or not corpus.train:
        problems.append(
            f"{len(corpus.train)} training and {len(corpus.validation)} validation files, "
            "at least one of each needed"
        )
    if problems:
        raise CorpusError(f"cannot gather a corpus from {root}", problems)
    return corpus
