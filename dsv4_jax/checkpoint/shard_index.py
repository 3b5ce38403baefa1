"""`model.safetensors.index.json`: which shard holds which tensor, and what else the shards hold."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from dsv4_jax.checkpoint.safetensors import MAX_TENSORS, is_tensor_name
from dsv4_jax.reading.folder import Folder
from dsv4_jax.reading.stored_file import refusal
from dsv4_jax.reading.strict_json import JsonError, parse_json, repeated_keys, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 200_000_000  # V4-Pro: 15 MB
MAX_SHARDS = 10_000
_SHOWN_COPIES = 3


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
