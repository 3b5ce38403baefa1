"""A checkpoint folder, and the one rule by which any file of it is opened.

A file has a plain name, is a regular file, and lies in the folder: a link may lead elsewhere in it, to the
blobs of its repository in a hub cache, or below a folder that the caller allows. What is read once is
remembered, and must be the same file in the same state, in the same folder, when everything has been read.
Otherwise a folder that is replaced meanwhile gives the config of one model and the weights of another.
"""

import os
import re
from pathlib import Path

from dsv4_jax.errors import CheckpointError
from dsv4_jax.reading.stored_file import FileIdentity, StoredFile, refusal
from dsv4_jax.reading.strict_json import plain, shown

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Folder:
    """An open folder; a context manager.

    Args:
        directory: its path.
        allow_links: a folder that links may lead into, such as the disk that holds the shards.

    Attributes:
        directory: as given.
        names: of everything in it when it was opened.

    Raises:
        CheckpointError: one of the two is not a directory that can be listed.
    """

    def __init__(self, directory: str | Path, allow_links: str | Path | None = None) -> None:
        self.directory = Path(directory)
        self._identities: dict[str, FileIdentity] = {}
        self._absent: set[str] = set()
        # Held open, so that its inode is not given to the folder that replaces it.
        self._descriptor = -1
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._descriptor = os.open(self.directory, flags)
            self.names = frozenset(os.listdir(self._descriptor))
            self._roots = _roots(self.directory)
        except (OSError, ValueError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise self.refused([f"{self.directory}: cannot be listed as a directory ({reason})"]) from error
        if allow_links is not None:
            try:
                self._roots.append(Path(allow_links).resolve(strict=True))
            except (OSError, ValueError, RuntimeError) as error:
                self.close()
                problem = f"allow_links={str(allow_links)!r} is no folder ({error})"
                raise self.refused([problem]) from error

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, name: str) -> StoredFile:
        """Opens a file by the rule above; from now on it must not change.

        Raises:
            CheckpointError: the rule is broken, or it is not the file that was opened before.
        """
        path = self.directory / name
        if _PLAIN_NAME.fullmatch(name) is None:
            raise refusal(path, f"{shown(name)} is not a plain file name")
        file = StoredFile(path, self._identities.get(name), self._target(path))
        self._identities[name] = file.identity
        return file

    def read(self, name: str, max_bytes: int) -> bytes:
        """A small text file whole, see `StoredFile.read_document`."""
        with self.open(name) as file:
            return file.read_document(max_bytes)

    def read_if_present(self, name: str, max_bytes: int) -> bytes | None:
        """As `read`; None for a file that is not there, which must then stay so."""
        if os.path.lexists(self.directory / name):
            return self.read(name, max_bytes)
        self._absent.add(name)
        return None

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the folder, or a file that was read from, is not what it was."""
        problems: list[str] = []
        try:
            now, opened = os.stat(self.directory), os.fstat(self._descriptor)
            if not os.path.samestat(now, opened):
                problems.append(f"{self.directory}: was replaced by another folder while it was read")
        except OSError as error:
            problems.append(f"{self.directory}: vanished while it was read ({error.strerror})")
        for name, identity in self._identities.items():
            try:
                identity.check_path(self.directory / name)
            except CheckpointError as error:
                problems += error.problems
        problems += [
            f"{name}: appeared while the other files were read"
            for name in sorted(self._absent)
            if os.path.lexists(self.directory / name)
        ]
        if problems:
            raise self.refused(problems)

    def refused(self, problems: list[str]) -> CheckpointError:
        """The error for this folder."""
        return CheckpointError(f"checkpoint {self.directory} cannot be used", problems)

    def close(self) -> None:
        """Closes the folder; its opened files are closed by those who opened them."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _target(self, path: Path) -> Path:
        """The path itself, or what it leads to if it is a link that may be followed."""
        if not os.path.islink(path):
            return path
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a cycle, before Python 3.13
            raise refusal(path, f"is a link that leads nowhere ({error})") from error
        if not any(target.is_relative_to(root) for root in self._roots):
            where = plain(str(target.parent))
            raise refusal(
                path,
                f"is a link that leaves the directory, to {plain(str(target))};"
                f" allow_links={where!r} (--allow-links {where}) accepts links to there",
            )
        return target


def _roots(directory: Path) -> list[Path]:
    """Where links may lead: the folder; the blobs of its repository, if it is in a hub cache.

    That cache is models--org--name/{snapshots/<revision>/<links>, blobs/<files>}.
    """
    home = directory.resolve(strict=True)
    repository = home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [home, repository / "blobs"]
    return [home]
