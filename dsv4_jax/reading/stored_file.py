"""One file of a checkpoint as bytes: opened once, mapped or copied, and watched for changes.

A mapped file that another process truncates kills the reader with SIGBUS, and one that is rewritten
gives a mixture of two models. Size, modification time and inode are therefore compared before and
after mapping, and after each read; `read_into` copies, where a short file is an ordinary error.
"""

import dataclasses
import mmap
import os
import stat
import threading
from pathlib import Path

import numpy as np

from dsv4_jax.errors import CheckpointError

_READ_CHUNK_BYTES = 64 << 20
_GIT_LFS_MARKER = b"version https://git-lfs"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class FileIdentity:
    """What changes when a file is replaced, rewritten or truncated."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileIdentity":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, path: Path, status: os.stat_result) -> None:
        """Raises CheckpointError if `status`, taken of `path` now, is of another state of the file."""
        found = dataclasses.asdict(FileIdentity.of(status))
        changes = [
            f"{field} {before} -> {found[field]}"
            for field, before in dataclasses.asdict(self).items()
            if before != found[field]
        ]
        if changes:
            problem = f"was replaced, rewritten or truncated while it was read: {', '.join(changes)}"
            raise refusal(path, problem)

    def check_path(self, path: Path) -> None:
        """Raises CheckpointError if `path` no longer leads to the file as it was."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise refusal(path, f"vanished while it was read ({_reason(error)})") from error
        self.check(path, status)


def refusal(path: Path, problem: str) -> CheckpointError:
    """The error for one file; its problem starts with the file's name, ready to be collected."""
    return CheckpointError(f"{path} cannot be used", [f"{path.name}: {problem}"])


class StoredFile:
    """A regular file open for reading; use as a context manager.

    Args:
        path: the file. Directories, pipes and devices are refused without blocking.
        identity: what the file was when it was first read; None takes it as it is now.
        target: what `path` was found to lead to; opened instead of it, and refused if it became a link.

    Raises:
        CheckpointError: it cannot be opened, is not a regular file, or differs from `identity`.
    """

    def __init__(self, path: Path, identity: FileIdentity | None = None, target: Path | None = None) -> None:
        self.path = Path(path)
        self._mapping: mmap.mmap | None = None
        self._lock = threading.Lock()
        try:
            # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            if target is not None:
                flags |= os.O_NOFOLLOW
            self._descriptor = os.open(self.path if target is None else target, flags)
        except (OSError, ValueError) as error:
            raise refusal(self.path, f"cannot be opened ({_reason(error)})") from error
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise refusal(self.path, f"is {kind}; expected a file")
            self.identity = FileIdentity.of(status) if identity is None else identity
            self.check_unchanged()
        except OSError as error:
            self.close()
            raise refusal(self.path, f"cannot be examined ({_reason(error)})") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StoredFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the path no longer holds the file that was opened, as it was."""
        # The path sees a replacement, the descriptor a change of the mapped bytes.
        self.identity.check_path(self.path)
        self.identity.check(self.path, os.fstat(self._descriptor))

    def read_into(self, start: int, target: memoryview) -> None:
        """Copies `len(target)` bytes from byte `start` into `target`."""
        done, size = 0, len(target)
        try:
            while done < size:
                chunk = target[done : done + _READ_CHUNK_BYTES]
                count = os.preadv(self._descriptor, [chunk], start + done)
                if count == 0:
                    raise refusal(
                        self.path,
                        f"ends at byte {start + done}, expected {size - done} bytes more; download it again",
                    )
                done += count
        except OSError as error:
            problem = f"reading byte {start + done} failed ({_reason(error)})"
            raise refusal(self.path, problem) from error

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes) as a copy."""
        data = bytearray(num_bytes)
        self.read_into(start, memoryview(data))
        return bytes(data)

    def read_document(self, max_bytes: int) -> bytes:
        """All bytes of a small text file, without a UTF-8 byte order mark.

        Raises:
            CheckpointError: it is larger, is a git-LFS pointer, or changed meanwhile.
        """
        size = self.identity.size
        if size > max_bytes:
            raise refusal(self.path, f"has {size} bytes; at most {max_bytes} are accepted")
        data = self.read(0, size)
        self.check_unchanged()
        if data.startswith(_GIT_LFS_MARKER):
            problem = "is a git-LFS pointer, not the file itself; download the real files (git lfs pull)"
            raise refusal(self.path, problem)
        return data.removeprefix(_BYTE_ORDER_MARK)

    def view(self, start: int, num_bytes: int) -> np.ndarray:
        """Bytes [start, start + num_bytes) as a read-only u8[num_bytes] over the mapped file."""
        with self._lock:
            if self._mapping is None:
                self.check_unchanged()
                try:
                    self._mapping = mmap.mmap(self._descriptor, self.identity.size, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    problem = f"cannot be mapped ({_reason(error)}); copy=True reads without it"
                    raise refusal(self.path, problem) from error
        # Mapping touches no page yet, so a file truncated meanwhile is found here.
        self.check_unchanged()
        return np.frombuffer(self._mapping, np.uint8, num_bytes, start)

    def drop_pages(self, start: int, end: int) -> None:
        """Gives the mapped pages inside [start, end) back to the system; they can be read again."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if self._mapping is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Closes the file; arrays made by `view` stay valid and keep the mapping alive."""
        if self._mapping is not None:
            try:
                self._mapping.close()
            except BufferError:  # a view is still alive; its last reference unmaps
                pass
            self._mapping = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
