"""Prefixes on disk: blocks and states as files, so that they outlive their pages and the engine itself.

A file is named by its key, and holds the arrays one after another with a checksum of them all. What is there
is complete: files are written beside their place and moved there, by any number of processes at once. A file
that is torn, damaged or of another shape counts as absent and is removed. The folder is bounded: what was
used least lately goes first. The report has an on-disk cache too (section 3.5).
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

LOGGER = logging.getLogger(__name__)

MAGIC = b"dsv4-prefix-1\n"
CHECKSUM_BYTES = 32
SUFFIXES = {"block": ".block", "state": ".state"}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a file must hold: one entry an array."""

    arrays: tuple[jax.ShapeDtypeStruct, ...]

    @staticmethod
    def of(tree: object) -> "Shapes":
        """Of the arrays of a tree, or of what stands for them."""
        leaves = jax.tree.leaves(tree)
        return Shapes(tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))

    @property
    def num_bytes(self) -> int:
        """Of the arrays."""
        return sum(int(np.prod(one.shape)) * one.dtype.itemsize for one in self.arrays)


class PrefixDisk:
    """A folder of blocks and states.

    Args:
        folder: made if it is not there. Files of other models do no harm: keys depend on the model.
        most_bytes: what the files may take together.
        block, state: the arrays of one file of each kind.
    """

    def __init__(self, folder: Path, most_bytes: int, block: Shapes, state: Shapes) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._shapes = {"block": block, "state": state}
        folder.mkdir(parents=True, exist_ok=True)
        self.damaged = 0  # files that were removed because they did not hold what they should

    def reach(self, keys: Sequence[bytes], first: int) -> int:
        """The end of the run of blocks from `first` on that are here."""
        while first < len(keys) and self._path("block", keys[first]).exists():
            first += 1
        return first

    def read(self, kind: str, key: bytes) -> list[np.ndarray] | None:
        """The arrays of a file, which then counts as used; None: it is absent, or was damaged."""
        path, shapes = self._path(kind, key), self._shapes[kind]
        try:
            content = path.read_bytes()
        except OSError:
            return None
        body = content[len(MAGIC) + CHECKSUM_BYTES :]
        found = content[len(MAGIC) : len(MAGIC) + CHECKSUM_BYTES]
        if not content.startswith(MAGIC) or found != _checksum(shapes, body):
            self.damaged += 1
            LOGGER.warning("%s is damaged or of another kind: removed", path)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        arrays, start = [], 0
        for one in shapes.arrays:
            count = int(np.prod(one.shape))
            arrays.append(np.frombuffer(body, one.dtype, count, start).reshape(one.shape))
            start += count * one.dtype.itemsize
        return arrays

    def has(self, kind: str, key: bytes) -> bool:
        """Whether such a file is here."""
        return self._path(kind, key).exists()

    def write(self, kind: str, key: bytes, arrays: Sequence[np.ndarray]) -> bool:
        """Writes a file, complete or not at all. Returns whether it did: a full disk is no reason to stop."""
        path, shapes = self._path(kind, key), self._shapes[kind]
        body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        assert len(body) == shapes.num_bytes
        incoming = path.with_name(f"{path.name}.{secrets.token_hex(4)}.incoming")
        try:
            self._make_room(len(MAGIC) + CHECKSUM_BYTES + len(body))
            with open(incoming, "wb") as file:
                file.write(MAGIC + _checksum(shapes, body) + body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(incoming, path)
        except OSError as failure:
            LOGGER.warning("a prefix could not be kept in %s: %s", self._folder, failure)
            incoming.unlink(missing_ok=True)
            return False
        return True

    def _path(self, kind: str, key: bytes) -> Path:
        return self._folder / f"{key.hex()}{SUFFIXES[kind]}"

    def _make_room(self, num_bytes: int) -> None:
        files = []
        for path in self._folder.iterdir():
            if path.suffix not in SUFFIXES.values():
                continue  # what is not ours stays
            with contextlib.suppress(OSError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + num_bytes <= self._most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _checksum(shapes: Shapes, body: bytes) -> bytes:
    described = repr([(one.shape, str(one.dtype)) for one in shapes.arrays]).encode()
    return hashlib.blake2b(body, key=hashlib.blake2b(described).digest(), digest_size=CHECKSUM_BYTES).digest()


class PrefixWriter:
    """Writes files in a thread of its own: the engine neither waits for the device nor for the disk."""

    def __init__(self, disk: PrefixDisk) -> None:
        self._disk = disk
        self._asked: set[tuple[str, bytes]] = set()
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "dsv4-prefixes")

    def has(self, kind: str, key: bytes) -> bool:
        """Whether such a file is there or was asked for."""
        return (kind, key) in self._asked or self._disk.has(kind, key)

    def add(self, kind: str, key: bytes, tree: object) -> None:
        """Asks for a file of these arrays, unless it is there."""
        if self.has(kind, key):
            return
        self._asked.add((kind, key))
        self._executor.submit(self._write, kind, key, jax.tree.leaves(tree))

    def flush(self) -> None:
        """Waits for everything that was asked for so far."""
        self._executor.submit(lambda: None).result()

    def close(self) -> None:
        """Waits for everything that was asked for, and takes no more."""
        self._executor.shutdown()

    def _write(self, kind: str, key: bytes, leaves: Sequence[jax.Array]) -> None:
        try:
            self._disk.write(kind, key, jax.device_get(leaves))
        except Exception:
            LOGGER.exception("a prefix could not be kept")
        finally:
            self._asked.discard((kind, key))
