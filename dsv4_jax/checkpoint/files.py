"""A checkpoint directory: which file holds each tensor, and its bytes as arrays.

Either `model.safetensors` alone, or `model.safetensors.index.json` with its shards. Everything that
the index and the headers say is checked, over all shards, before one byte of weights is read.
"""

import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dsv4_jax.checkpoint.safetensors import Header, TensorInfo, load_header
from dsv4_jax.checkpoint.shard_index import (
    INDEX_FILE,
    SINGLE_FILE,
    ShardIndex,
    disagreements,
    read_index,
    stored_twice,
)
from dsv4_jax.checkpoint.staging import REPLACED_PREFIX
from dsv4_jax.checkpoint.stored_file import StoredFile, refusal
from dsv4_jax.errors import CheckpointError
from dsv4_jax.strict_json import plain, shown

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


class CheckpointFiles:
    """The tensors of an opened checkpoint directory; made by `open_checkpoint`, a context manager.

    Leaving the context without an error runs `check_unchanged` once more, then closes the files.

    Attributes:
        directory: as given to `open_checkpoint`.
        tensors: every stored tensor by name.
        metadata: `__metadata__` of the shards, merged; the first shard wins.
        warnings: what is odd but harmless, one sentence each.
    """

    def __init__(self, directory: Path, headers: Iterable[Header], warnings: list[str], copy: bool) -> None:
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        self._identities = {}
        for header in headers:
            tensors |= header.tensors
            metadata = header.metadata | metadata
            self._identities[header.path] = header.identity
        self.directory = directory
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self.warnings = warnings
        self._copy = copy
        self._open: dict[Path, StoredFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self.check_unchanged()
        finally:
            self.close()

    def read(self, name: str) -> np.ndarray:
        """The stored array, read-only, in its numpy or ml_dtypes dtype; threads may share this.

        Without `copy` it views the mapped file: pages are read as they are used, and a file that
        is truncated after this call kills the process. Convert it before the next read.

        Args:
            name: a key of `tensors`.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the file changed since its header was read, or could not be read.
        """
        tensor = self.tensors[name]
        with self._lock:
            file = self._open.get(tensor.path)
            if file is None:
                file = StoredFile(tensor.path, self._identities[tensor.path])
                self._open[tensor.path] = file
        if self._copy:
            array = np.empty(tensor.shape, tensor.numpy_dtype)
            file.read_into(tensor.start, memoryview(array.reshape(-1).view(np.uint8)))
            file.check_unchanged()
        else:
            stored = file.view(tensor.start, tensor.num_bytes)
            array = stored.view(tensor.numpy_dtype).reshape(tensor.shape)
            if not array.flags.aligned:  # legal in the format, refused by some C code
                array = array.copy()
        array.flags.writeable = False
        return array

    def drop_pages(self, name: str) -> None:
        """Gives the memory of a mapped tensor back to the system; it can still be read again."""
        tensor = self.tensors[name]
        if (file := self._open.get(tensor.path)) is not None:
            file.drop_pages(tensor.start, tensor.end)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file that was read from has been replaced or rewritten."""
        problems: list[str] = []
        for file in self._open.values():
            try:
                file.check_unchanged()
            except CheckpointError as error:
                problems += error.problems
        if problems:
            raise _refused(self.directory, problems)

    def close(self) -> None:
        """Closes all files. Arrays that still view a file keep its mapping alive."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def open_checkpoint(directory: str | Path, *, copy: bool = False) -> CheckpointFiles:
    """Opens a checkpoint directory after checking its index and all its headers.

    Args:
        directory: holds `model.safetensors`, or an index and its shards.
        copy: read tensors into memory instead of mapping the files: safe against files that another
            process truncates, and works where files cannot be mapped.

    Raises:
        CheckpointError: with the problems of every file, each naming its file and tensor.
    """
    directory = Path(directory)
    listing = _listing(directory)
    found = {name for name in listing if name.endswith(".safetensors")}
    index, problems = _index_of(directory, listing, found)
    weight_map = index.weight_map if index is not None else {}
    named = sorted(set(weight_map.values()))

    headers: dict[str, Header] = {}
    for name in named or sorted(found):  # without a usable index, still say what else is wrong
        try:
            _check_shard(directory, name, found)
            headers[name] = load_header(directory / name)
        except CheckpointError as error:
            problems += error.problems
    stored = {name: header.tensors.keys() for name, header in headers.items()}
    problems += stored_twice(stored)
    if index is not None:
        problems += disagreements(weight_map, stored)
        problems += [
            f"{plain(name)}: is in the directory but not in {INDEX_FILE}"
            for name in sorted(found.difference(named))
        ]
    if problems:
        raise _refused(directory, problems)

    warnings = index.warnings if index is not None else []
    files = CheckpointFiles(directory, headers.values(), warnings, copy)
    stored_size = sum(tensor.num_bytes for tensor in files.tensors.values())
    if index is not None and index.total_size not in (None, stored_size):
        warnings.append(
            f"{INDEX_FILE}: total_size is {index.total_size}, the tensors have {stored_size} bytes"
        )
    return files


def _refused(directory: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(f"checkpoint {directory} cannot be used", problems)


def _listing(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = f"{directory}: cannot be listed as a directory ({reason})"
        raise _refused(directory, [problem]) from error


def _index_of(directory: Path, listing: set[str], found: set[str]) -> tuple[ShardIndex | None, list[str]]:
    """The index if there is a usable one, and what is wrong with it or with its absence."""
    path = directory / INDEX_FILE
    try:
        if INDEX_FILE in listing:
            _check_link(directory, path)
            index = read_index(path)
            return index, list(index.problems)
    except CheckpointError as error:
        return None, list(error.problems)
    if SINGLE_FILE in found:
        return None, [
            f"{plain(name)}: is beside {SINGLE_FILE} without a {INDEX_FILE}"
            for name in sorted(found - {SINGLE_FILE})
        ]
    others = f" beside {len(found)} other .safetensors files" if found else ""
    hint = "the checkpoint is incomplete, download or save it again"
    if replaced := sorted(name for name in listing if name.startswith(REPLACED_PREFIX)):
        hint = f"a save was interrupted, the former files are in {replaced[-1]}"
    return None, [f"{INDEX_FILE}: is missing, and so is {SINGLE_FILE}{others}; {hint}"]


def _check_shard(directory: Path, name: str, found: set[str]) -> None:
    """Refuses a shard that is missing, has a path for a name, or is a link out of the directory."""
    if _SHARD_NAME.fullmatch(name) is None:
        problem = f"shard {shown(name)} is not a plain file name ending in .safetensors"
        raise refusal(directory / INDEX_FILE, problem)
    if name not in found:
        problem = f"is named in {INDEX_FILE} but missing; download it again"
        raise refusal(directory / name, problem)
    _check_link(directory, directory / name)


def _check_link(directory: Path, path: Path) -> None:
    """Links may stay in the directory, or lead to the blobs of the repository in a hub cache.

    That cache is models--org--name/{snapshots/<revision>/<links>, blobs/<files>}.
    """
    if not os.path.islink(path):
        return
    try:
        target, home = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle, before Python 3.13
        raise refusal(path, f"is a link that leads nowhere ({error})") from error
    roots = [home]
    repository = home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        roots.append(repository / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise refusal(path, f"is a link that leaves the directory, to {target}")
