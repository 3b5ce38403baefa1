"""A checkpoint directory: which file holds each tensor, and its bytes as arrays.

Either `model.safetensors` alone, or `model.safetensors.index.json` with its shards. Everything that
the index and the headers say is checked, over all shards, before one byte of weights is read.
"""

import dataclasses
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dsv4_jax.checkpoint.safetensors import MAX_TENSORS, Header, TensorInfo, header_of, is_tensor_name
from dsv4_jax.checkpoint.staging import REPLACED_PREFIX
from dsv4_jax.errors import CheckpointError
from dsv4_jax.reading.folder import Folder
from dsv4_jax.reading.stored_file import StoredFile, refusal
from dsv4_jax.reading.strict_json import JsonError, parse_json, plain, repeated_keys, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 200_000_000  # V4-Pro: 15 MB
MAX_SHARDS = 10_000
_SHOWN_COPIES = 3

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the bytes done, and the bytes of all tensors."""


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The usable part of an index, with what is wrong with the rest of it."""

    weight_map: dict[str, str]  # tensor name -> shard file name
    total_size: int | None  # bytes of all tensors, None if the index does not say
    problems: list[str]
    warnings: list[str]


def read_index(folder: Folder) -> ShardIndex:
    """Reads the index file of a folder.

    Raises:
        CheckpointError: nothing of it can be used (unreadable, not JSON, no weight_map).
    """
    document, path = folder.read(INDEX_FILE, MAX_INDEX_BYTES), folder.directory / INDEX_FILE
    try:
        index = parse_json(document, max_depth=8, max_items=2 * MAX_TENSORS)
    except JsonError as error:
        raise refusal(path, str(error)) from None
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        value = index.get("weight_map") if isinstance(index, dict) else index
        raise refusal(path, f"has {shown(value)} where the object weight_map is expected")

    listed, metadata = index["weight_map"], index.get("metadata")
    metadata = {} if metadata is None else metadata
    if not 0 < len(listed) <= MAX_TENSORS:
        raise refusal(path, f"lists {len(listed)} tensors, expected 1 to {MAX_TENSORS}")
    problems = [
        f"{path.name}: key {shown(key)} occurs twice"
        for level in (index, listed, metadata)
        for key in repeated_keys(level)
    ]
    weight_map = {}
    for name, shard in listed.items():
        if not is_tensor_name(name):
            problems.append(f"{path.name}: {shown(name)} is not a tensor name")
        elif not isinstance(shard, str):
            problems.append(f"{path.name}: tensor {shown(name)}: shard {shown(shard)} is no string")
        else:
            weight_map[name] = shard
    if len(shards := set(weight_map.values())) > MAX_SHARDS:
        raise refusal(path, f"names {len(shards)} shards; at most {MAX_SHARDS} are accepted")

    warnings = []
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict):
        problems.append(f"{path.name}: metadata is {shown(metadata)}, expected an object")
    elif type(total_size) is not int:  # a bool is an int
        warnings.append(f"{path.name}: total_size is {shown(total_size)}, expected an integer")
        total_size = None
    return ShardIndex(weight_map, total_size, problems, warnings)


def not_stored(weight_map: Mapping[str, str], stored: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Where an index names a tensor in a shard that lacks it.

    Args:
        weight_map: tensor name -> shard file name, from the index.
        stored: shard file name -> names of its tensors, for the shards that could be read.
    """
    owners = {name: shard for shard, names in stored.items() for name in names}
    for name, shard in weight_map.items():
        if shard in stored and name not in stored[shard]:
            where = f"; it is in {owners[name]}" if name in owners else ""
            yield f"{shard}: tensor {shown(name)} is listed in {INDEX_FILE} but not stored{where}"


def shadowed(weight_map: Mapping[str, str], stored: Mapping[str, Collection[str]]) -> list[str]:
    """One warning about the stored tensors that the index does not name, or names in another shard.

    A derived model may ship so: new tensors in a shard of their own, and the base model's shards with
    the stale copies still in them. Arguments as in `not_stored`.
    """
    copies = [
        f"{name} in {shard}"
        for shard, names in stored.items()
        for name in names
        if weight_map.get(name) != shard
    ]
    if not copies:
        return []
    more = f" and {len(copies) - _SHOWN_COPIES} more" if len(copies) > _SHOWN_COPIES else ""
    what = "1 stored tensor is" if len(copies) == 1 else f"{len(copies)} stored tensors are"
    listed = ", ".join(copies[:_SHOWN_COPIES])
    return [f"{what} not used, {INDEX_FILE} names another shard for it or none: {listed}{more}"]


_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


class CheckpointFiles:
    """The tensors of an opened checkpoint directory; made by `open_tensors`, a context manager.

    Leaving the context without an error runs `check_unchanged` once more, then closes the files.

    Attributes:
        folder: the open directory, of which other files may be read meanwhile.
        tensors: every tensor by name; with an index, the tensors that it names.
        metadata: `__metadata__` of the shards, merged; the first shard wins.
        warnings: what is odd but harmless, one sentence each.
    """

    def __init__(
        self,
        folder: Folder,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        warnings: list[str],
        copy: bool,
    ) -> None:
        self.folder = folder
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata))
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
                file = self.folder.open(tensor.path.name)
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
        """Raises CheckpointError if the folder or a file that was read from was replaced or rewritten."""
        self.folder.check_unchanged()

    def close(self) -> None:
        """Closes all files. Arrays that still view a file keep its mapping alive."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self.folder.close()


def open_checkpoint(
    directory: str | Path, *, copy: bool = False, allow_links: str | Path | None = None
) -> CheckpointFiles:
    """Opens a checkpoint directory after checking its index and all its headers.

    Args:
        directory: holds `model.safetensors`, or an index and its shards.
        copy: read tensors into memory instead of mapping the files: safe against files that another
            process truncates, and works where files cannot be mapped.
        allow_links: a folder that links may lead into, see `Folder`.

    Raises:
        CheckpointError: with the problems of every file, each naming its file and tensor.
    """
    folder = Folder(directory, allow_links)
    try:
        return open_tensors(folder, copy=copy)
    except BaseException:
        folder.close()
        raise


def open_tensors(folder: Folder, *, copy: bool = False) -> CheckpointFiles:
    """As `open_checkpoint`, of an open folder, which the result closes."""
    found = {name for name in folder.names if name.endswith(".safetensors")}
    index, problems = _index_of(folder, found)
    weight_map = index.weight_map if index is not None else {}
    named = sorted(set(weight_map.values()))

    headers: dict[str, Header] = {}
    for name in named or sorted(found):  # without a usable index, still say what else is wrong
        try:
            _check_shard(folder, name, found)
            with folder.open(name) as file:
                headers[name] = header_of(file)
        except CheckpointError as error:
            problems += error.problems
    stored = {name: header.tensors for name, header in headers.items()}
    problems += not_stored(weight_map, stored)
    if problems:
        raise folder.refused(problems)

    metadata: dict[str, str] = {}
    for header in headers.values():
        metadata = header.metadata | metadata
    if index is None:
        return CheckpointFiles(folder, stored[SINGLE_FILE], metadata, [], copy)
    tensors = {
        name: tensor
        for shard, held in stored.items()  # in the order of their bytes
        for name, tensor in held.items()
        if weight_map.get(name) == shard
    }
    warnings = [*index.warnings, *shadowed(weight_map, stored)]
    if unnamed := sorted(map(plain, found.difference(named))):
        warnings.append(f"{', '.join(unnamed)}: in the directory but not in {INDEX_FILE}, not used")
    used = sum(tensor.num_bytes for tensor in tensors.values())
    everything = sum(tensor.num_bytes for held in stored.values() for tensor in held.values())
    if index.total_size not in (None, used, everything):
        warnings.append(f"{INDEX_FILE}: total_size is {index.total_size}, the tensors have {used} bytes")
    return CheckpointFiles(folder, tensors, metadata, warnings, copy)


def _index_of(folder: Folder, found: set[str]) -> tuple[ShardIndex | None, list[str]]:
    """The index if there is a usable one, and what is wrong with it or with its absence."""
    if INDEX_FILE in folder.names:
        try:
            index = read_index(folder)
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
    if replaced := sorted(name for name in folder.names if name.startswith(REPLACED_PREFIX)):
        hint = f"a save was interrupted, the former files are in {replaced[-1]}"
    return None, [f"{INDEX_FILE}: is missing, and so is {SINGLE_FILE}{others}; {hint}"]


def _check_shard(folder: Folder, name: str, found: set[str]) -> None:
    """Refuses a shard that is missing, or has something else than a shard's name."""
    if _SHARD_NAME.fullmatch(name) is None:
        problem = f"shard {shown(name)} is not a plain file name ending in .safetensors"
        raise refusal(folder.directory / INDEX_FILE, problem)
    if name not in found:
        problem = f"is named in {INDEX_FILE} but missing; download it again"
        raise refusal(folder.directory / name, problem)
