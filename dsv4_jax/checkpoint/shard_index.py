"""`model.safetensors.index.json`: which shard holds which tensor, and whether the shards agree."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from dsv4_jax.checkpoint.safetensors import MAX_TENSORS, is_tensor_name
from dsv4_jax.checkpoint.stored_file import StoredFile, refusal
from dsv4_jax.strict_json import JsonError, parse_json, repeated_keys, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 200_000_000  # V4-Pro: 15 MB
MAX_SHARDS = 10_000


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The usable part of an index, with what is wrong with the rest of it."""

    weight_map: dict[str, str]  # tensor name -> shard file name
    total_size: int | None  # bytes of all tensors, None if the index does not say
    problems: list[str]
    warnings: list[str]


def read_index(path: Path) -> ShardIndex:
    """Reads an index file.

    Raises:
        CheckpointError: nothing of it can be used (unreadable, not JSON, no weight_map).
    """
    with StoredFile(path) as file:
        if file.identity.size > MAX_INDEX_BYTES:
            problem = f"has {file.identity.size} bytes; at most {MAX_INDEX_BYTES} are accepted"
            raise refusal(path, problem)
        document = file.read(0, file.identity.size)
    if document.startswith(b"version https://git-lfs"):
        raise refusal(path, "is a git-LFS pointer, not the data; download the real files")
    try:
        index = parse_json(document, max_depth=8, max_items=2 * MAX_TENSORS)
    except JsonError as error:
        raise refusal(path, str(error)) from None
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        value = index.get("weight_map") if isinstance(index, dict) else index
        raise refusal(path, f"has {shown(value)} where the object weight_map is expected")

    listed, metadata = index["weight_map"], index.get("metadata", {})
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


def disagreements(weight_map: Mapping[str, str], stored: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Where an index and its shards contradict each other.

    Args:
        weight_map: tensor name -> shard file name, from the index.
        stored: shard file name -> names of its tensors, for the shards that could be read.
    """
    owners = {name: shard for shard, names in stored.items() for name in names}
    for name, shard in weight_map.items():
        if shard in stored and name not in stored[shard]:
            where = f"; it is in {owners[name]}" if name in owners else ""
            yield f"{shard}: tensor {shown(name)} is listed in {INDEX_FILE} but not stored{where}"
    for name, shard in owners.items():
        if name not in weight_map:
            yield f"{shard}: tensor {shown(name)} is stored but not listed in {INDEX_FILE}"


def stored_twice(stored: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Tensors that occur in several files; arguments as in `disagreements`."""
    owners: dict[str, list[str]] = {}
    for shard, names in stored.items():
        for name in names:
            owners.setdefault(name, []).append(shard)
    for name, shards in owners.items():
        if len(shards) > 1:
            yield f"{shards[0]}: tensor {shown(name)} is also stored in {', '.join(shards[1:])}"
