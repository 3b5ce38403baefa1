"""Writes a checkpoint's tensors: safetensors shards and their index, streamed and atomic.

One shard is `model.safetensors` alone; several are `model-00001-of-00002.safetensors` and so on
with an index, as in the official checkpoints. Tensors are produced one at a time, in disk order.
"""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from dsv4_jax.checkpoint.files import INDEX_FILE, SINGLE_FILE, Progress
from dsv4_jax.checkpoint.safetensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    is_tensor_name,
    num_bytes,
)
from dsv4_jax.checkpoint.staging import INCOMING_PREFIX, StagedFiles, StagedOutput
from dsv4_jax.errors import CheckpointError
from dsv4_jax.reading.strict_json import plain, shown

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_EXTRA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class TensorPlan:
    """What will be stored for one tensor, known before its values are."""

    dtype: str  # safetensors name, a key of DTYPES
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


Produce = Callable[[], np.ndarray]
Planned = tuple[str, TensorPlan, Produce]


def write_sharded(
    directory: str | Path,
    tensors: Iterable[Planned],
    *,
    max_shard_bytes: float = 5e9,
    extra_files: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    last_check: Callable[[], None] | None = None,
) -> tuple[Path, ...]:
    """Writes a checkpoint directory that appears complete or not at all.

    Args:
        directory: made if missing; must be empty unless `overwrite`.
        tensors: (name, plan, function that returns the values). Each function is called once; its
            array is written and dropped before the next call. It must have exactly the planned
            dtype and shape: nothing is converted here.
        max_shard_bytes: most tensor bytes in a shard; a larger tensor gets a shard of its own.
        extra_files: further files by name, such as `config.json`.
        metadata: `__metadata__` of every shard; None writes {"format": "pt"}, which loaders expect.
        overwrite: replace the tensors and the `extra_files` of a directory; its other files stay.
        progress: called after each tensor with (name, bytes written, bytes of all tensors).
        last_check: called when all is written and nothing has appeared yet; what it raises stops that.

    Returns:
        The paths of all files, the index or single file last.

    Raises:
        CheckpointError: impossible plans, a directory that is not to be replaced, a produced array
            that differs from its plan, too little space, or a failure of the system. The directory
            is then as before; after a crash it is as before, or refused by `open_checkpoint`.
    """
    directory, planned = Path(directory), list(tensors)
    extra_files = dict(extra_files or {})
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    problems = list(plan_problems(planned, extra_files, max_shard_bytes))
    problems += target_problems(directory, overwrite)
    if problems:
        raise CheckpointError(f"checkpoint {directory} cannot be written", problems)

    shards = _shards(planned, max_shard_bytes)
    headers = {name: shard_header(shard, metadata) for name, shard in shards.items()}
    total = sum(plan.num_bytes for _, plan, _ in planned)
    index = index_of(shards, total) if len(shards) > 1 else b""
    marker = INDEX_FILE if index else SINGLE_FILE
    others = sum(map(len, headers.values())) + sum(map(len, extra_files.values())) + len(index)

    with StagedFiles(directory) as staged:
        if problems := target_problems(directory, overwrite):  # changed before it was locked
            raise CheckpointError(f"checkpoint {directory} cannot be written", problems)
        check_space(staged, total + others)
        written = 0
        for shard_name, shard in shards.items():
            with staged.create(shard_name) as output:
                output.write(headers[shard_name])
                for name, plan, produce in shard:
                    write_tensor(output, name, plan, produce)
                    written += plan.num_bytes
                    if progress is not None:
                        progress(name, written, total)
        for name, data in (extra_files | ({INDEX_FILE: index} if index else {})).items():
            with staged.create(name) as output:
                output.write(data)
        if last_check is not None:
            last_check()
        commit(staged, marker, extra_files)
    names = [*extra_files, *shards, *([INDEX_FILE] if index else [])]
    return tuple(directory / name for name in names)


def commit(staged: StagedFiles, marker: str, extra_files: Collection[str]) -> None:
    """Lets the staged files appear in the place of those of a former checkpoint."""
    present = staged.present()
    staged.commit(
        marker,
        former_markers=[name for name in (INDEX_FILE, SINGLE_FILE) if name in present],
        former_files=[name for name in present if _SHARD.fullmatch(name) or name in extra_files],
    )


def plan_problems(
    planned: list[Planned], extra_files: Mapping[str, bytes], max_shard_bytes: float
) -> Iterator[str]:
    """What is wrong with names, dtypes and shapes before a value is known."""
    if not 0 < len(planned) <= MAX_TENSORS:
        yield f"there are {len(planned)} tensors, expected 1 to {MAX_TENSORS}"
    if not max_shard_bytes > 0:
        yield f"max_shard_bytes is {max_shard_bytes}, expected more than 0"
    seen: set[str] = set()
    for name, plan, _ in planned:
        if not is_tensor_name(name):
            yield f"tensor {shown(name)}: not words of letters, digits, '_' and '-' joined by dots"
        if name in seen:
            yield f"tensor {shown(name)}: occurs twice"
        seen.add(name)
        if plan.dtype not in DTYPES:
            yield f"tensor {shown(name)}: dtype {shown(plan.dtype)} is unknown"
        if len(plan.shape) > MAX_RANK or any(type(n) is not int or n < 1 for n in plan.shape):
            yield (
                f"tensor {shown(name)}: shape {shown(plan.shape)} is not at most {MAX_RANK} "
                "integers of at least 1"
            )
    for name in extra_files:
        reserved = name.endswith(".safetensors") or name == INDEX_FILE
        if reserved or _EXTRA_NAME.fullmatch(name) is None:
            yield f"extra file {shown(name)}: not a plain name, or one that tensors take"


def target_problems(directory: str | Path, overwrite: bool) -> list[str]:
    """Why a checkpoint cannot be written to a directory; nothing if it can, as far as can be tried now.

    Whoever works for long before saving asks this first: it is what `write_sharded` itself refuses. Nothing
    stays behind, but a file is created and removed in the directory, or where it would be made.

    Args:
        directory: of the checkpoint, existing or not.
        overwrite: whether what is there may be replaced.
    """
    directory = Path(directory)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(directory)  # raises for names that cannot be, such as too long ones
        # The nearest part of the path that is there, be it a link that leads nowhere.
        place = next(part for part in (directory, *directory.absolute().parents) if os.path.lexists(part))
        if not place.exists():
            return [f"{place}: is a link that leads nowhere"]
        if not place.is_dir():
            return [f"{place}: is not a directory"]
        if place == directory and (problems := _present_problems(directory, overwrite)):
            return problems
        with tempfile.TemporaryFile(dir=place):  # permission bits do not tell all, least of all to root
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        return [f"{plain(str(directory))}: cannot be written ({getattr(error, 'strerror', None) or error})"]
    return []


def _present_problems(directory: Path, overwrite: bool) -> list[str]:
    """What in an existing directory is in the way."""
    present = sorted(name for name in os.listdir(directory) if not name.startswith(INCOMING_PREFIX))
    if present and not overwrite:
        return [f"{directory}: is not empty ({shown(present)}); overwrite=True replaces it"]
    problems = []
    for name in present:
        if not name.endswith((".safetensors", INDEX_FILE)):
            continue
        if name not in (SINGLE_FILE, INDEX_FILE) and not _SHARD.fullmatch(name):
            problems.append(
                f"{name}: is no file of a checkpoint written here and would make it ambiguous; move it"
            )
        elif not (directory / name).is_file():
            problems.append(f"{name}: would be replaced, but is not a file; move it")
    return problems


def _shards(planned: list[Planned], max_shard_bytes: float) -> dict[str, list[Planned]]:
    """Shards by file name."""
    return named_shards(grouped(planned, max_shard_bytes))


def grouped(planned: list[Planned], max_shard_bytes: float) -> list[list[Planned]]:
    """Fills shards in the given order; in a shard wide dtypes come first, so all are aligned."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for item in planned:
        if groups[-1] and size + item[1].num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item[1].num_bytes
    for group in groups:
        group.sort(key=lambda item: -DTYPES[item[1].dtype].itemsize)
    return groups


def named_shards(groups: list[list[Planned]]) -> dict[str, list[Planned]]:
    """Shards by file name: one file alone, or numbered ones."""
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def shard_header(shard: list[Planned], metadata: Mapping[str, str]) -> bytes:
    """Of one shard: length and JSON, padded with spaces so that the data starts at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, plan, _ in shard:
        end = begin + plan.num_bytes
        entries[name] = {"dtype": plan.dtype, "shape": plan.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        problem = f"a header of {len(text)} bytes is needed, at most {MAX_HEADER_BYTES} are read"
        raise CheckpointError("checkpoint cannot be written", [problem])
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Mapping[str, list[Planned]], total: int) -> bytes:
    """The index of shards by file name; `total` is the number of bytes of all tensors."""
    weight_map = {name: file for file, shard in shards.items() for name, _, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def check_space(staged: StagedFiles, needed: int) -> None:
    """Raises CheckpointError where the file system says that it has not so many bytes."""
    try:
        status = os.statvfs(staged.directory)
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < needed:  # file systems without blocks do not count space
        raise staged.refused(f"no space: {needed} bytes are needed, {free} are free")


def write_tensor(output: StagedOutput, name: str, plan: TensorPlan, produce: Produce) -> None:
    """Appends a tensor to its shard, or raises CheckpointError if it is not what was planned."""
    array = np.asarray(produce())
    if array.dtype != DTYPES[plan.dtype] or array.shape != tuple(plan.shape):
        found = f"{array.dtype}{list(array.shape)}"
        raise CheckpointError(
            "checkpoint could not be written",
            [f"tensor {shown(name)}: {found} was produced for {plan.dtype}{list(plan.shape)}"],
        )
    rows = array if array.ndim else array.reshape(1)
    step = max(1, _CHUNK_BYTES * len(rows) // plan.num_bytes)
    for first in range(0, len(rows), step):  # a copy, if one is needed, is of a chunk
        chunk = np.ascontiguousarray(rows[first : first + step])
        output.write(memoryview(chunk.reshape(-1).view(np.uint8)))
