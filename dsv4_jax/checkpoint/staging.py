"""Replaces files of a directory as one step: a reader finds the former ones, the new ones, or none.

New files are written and synced in a hidden directory beside their place. Committing is then a
list of renames: former markers out, other former files out, new files in, the new marker in last.
Whoever reads the directory looks for a marker first (the index, or the single file), so between the
first and the last rename it is refused. An error undoes the renames; after a crash the former files
are in `.replaced-*`.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from dsv4_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows, where this package can be imported, but neither reads nor writes checkpoints
    fcntl = None  # type: ignore[assignment]

INCOMING_PREFIX = ".incoming-"
REPLACED_PREFIX = ".replaced-"

_WRITE_CHUNK_BYTES = 64 << 20  # one write call takes less than 2^31 bytes


class StagedFiles:
    """New files for `directory`, invisible until `commit`; a context manager.

    Leaving the context without a commit removes everything that was staged.

    Args:
        directory: made if it does not exist.

    Raises:
        CheckpointError: here and in all methods: the system refused, or another process is writing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._names: list[str] = []
        token = secrets.token_hex(4)
        self._incoming = directory / f"{INCOMING_PREFIX}{token}"
        self._replaced = directory / f"{REPLACED_PREFIX}{token}"
        self._descriptor = -1
        self._created = not os.path.lexists(directory)
        if fcntl is None:
            raise self.refused("writing checkpoints needs Linux or macOS (on Windows: WSL)")
        try:
            with self._reporting():
                os.makedirs(directory, exist_ok=True)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                self._descriptor = os.open(directory, flags)
                self._lock()
                # Under the lock these can only be left from a crash; they may fill the disk.
                self._remove(INCOMING_PREFIX)
                os.mkdir(self._incoming)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "StagedFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator["StagedOutput"]:
        """Opens a new staged file; when the context ends without an error its bytes are on disk."""
        with self._reporting(name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(self._incoming / name, flags, 0o666)
        try:
            yield StagedOutput(self, name, descriptor)
            with self._reporting(name):
                os.fsync(descriptor)
        finally:
            with self._reporting(name):
                os.close(descriptor)
        self._names.append(name)

    @property
    def incoming(self) -> str:
        """Name of the staging folder in the directory."""
        return self._incoming.name

    def adopt(self, name: str, num_bytes: int) -> None:
        """Takes in a file that another process staged (`StagedByAnother`), for the next commit."""
        with self._reporting(name):
            found = os.stat(self._incoming / name).st_size
        if found != num_bytes:
            raise self.refused(f"{name}: has {found} bytes, another process wrote {num_bytes}")
        self._names.append(name)

    def present(self) -> list[str]:
        """Names now in the directory."""
        with self._reporting():
            return os.listdir(self.directory)

    def commit(self, marker: str, *, former_markers: Collection[str], former_files: Collection[str]) -> None:
        """Moves the staged files into the directory, `marker` last, or raises with nothing changed.

        Args:
            marker: the staged file without which a reader refuses the directory.
            former_markers: present files that were this for the former content; moved out first.
            former_files: other present files to move out, among them all that are replaced.
        """
        moves = [(name, self.directory, self._replaced) for name in former_files]
        moves += [(name, self._incoming, self.directory) for name in self._names if name != marker]
        done: list[tuple[Path, Path]] = []

        def move(name: str, source: Path, target: Path) -> None:
            # Noted first: an interrupt may come between the rename and the next line.
            done.append((source / name, target / name))
            os.rename(source / name, target / name)

        with self._reporting():
            os.mkdir(self._replaced)
            try:
                for name in former_markers:
                    move(name, self.directory, self._replaced)
                os.fsync(self._descriptor)  # before any new file becomes durable
                for arguments in moves:
                    move(*arguments)
                os.fsync(self._descriptor)
                if self._created:
                    self._sync(self.directory.parent)
                move(marker, self._incoming, self.directory)
                os.fsync(self._descriptor)
            except BaseException:
                self._undo(done)
                raise
        self._created = False  # the directory stays
        self._remove(REPLACED_PREFIX)

    @staticmethod
    def _sync(directory: Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _undo(self, done: list[tuple[Path, Path]]) -> None:
        # Reversed, so the former marker returns last; if this fails too, a reader finds no marker.
        for source, target in reversed(done):
            if os.path.lexists(target):  # not if the interrupt came before its rename
                os.rename(target, source)
        os.fsync(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self.refused("another process is writing to this directory") from None
        except OSError:  # a file system without locks: two writers at once are then undetected
            pass

    def _remove(self, prefix: str) -> None:
        with contextlib.suppress(OSError):  # what cannot be removed only takes space
            for name in os.listdir(self.directory):
                if name.startswith(prefix):
                    shutil.rmtree(self.directory / name, ignore_errors=True)

    def _close(self) -> None:
        """Removes what is staged; former files that could not be put back stay in `.replaced-*`."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(self._replaced)  # only if empty
        if self._created:
            with contextlib.suppress(OSError):
                os.rmdir(self.directory)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def refused(self, problem: str) -> CheckpointError:
        """The error for this directory."""
        return CheckpointError(f"checkpoint {self.directory} could not be written", [problem])

    @contextlib.contextmanager
    def _reporting(self, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise self.refused(f"{name or self.directory}: {reason}") from error


class StagedByAnother(StagedFiles):
    """Where another process stages files of a checkpoint, for this one to add its own by `create`.

    The other one holds the lock, commits (`adopt`) and removes.

    Args:
        directory: of the checkpoint, the same folder for both processes.
        incoming: name of the other's staging folder in it (`StagedFiles.incoming`).

    Raises:
        CheckpointError: this process does not see that folder.
    """

    def __init__(self, directory: Path, incoming: str) -> None:
        self.directory = directory
        self._names = []
        self._incoming = directory / incoming
        if not self._incoming.is_dir():
            raise self.refused(
                f"{self._incoming}: another process made this folder, and this one does not see it; all"
                " processes must write to one shared file system"
            )

    def __exit__(self, *_: object) -> None:
        """Leaves everything to the other process."""


class StagedOutput:
    """A file being staged; made by `StagedFiles.create`."""

    def __init__(self, files: StagedFiles, name: str, descriptor: int) -> None:
        self._files, self._name, self._descriptor = files, name, descriptor

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        rest = memoryview(data).cast("B")
        with self._files._reporting(self._name):
            while rest:
                rest = rest[os.write(self._descriptor, rest[:_WRITE_CHUNK_BYTES]) :]
