"""Checkpoint directories: an index against its shards, links, and nothing but names."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.checkpoint import files as checkpoint_files
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.errors import CheckpointError
from tests.checkpoint.shards import (
    FIRST,
    INDEX,
    SECOND,
    SHARDS,
    THIRD,
    TOTAL,
    WEIGHT_MAP,
    save_index,
    save_shard,
    save_sharded,
    tensor,
)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_sharded(tmp_path / "checkpoint")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_shard(directory / "model.safetensors", SHARDS[THIRD])
    return directory


def warned(directory: Path) -> list[str]:
    with open_checkpoint(directory) as files:
        return files.warnings


def refused(directory: Path, *words: str) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert str(directory) in message
    for word in words:
        assert word in message, (word, message)
    return caught.value.problems


@pytest.mark.parametrize("copy", [False, True])
def test_reads_every_tensor_of_every_shard(sharded: Path, copy: bool) -> None:
    with open_checkpoint(sharded, copy=copy) as files:
        assert set(files.tensors) == set(WEIGHT_MAP)
        assert files.warnings == []
        for file, tensors in SHARDS.items():
            for name, expected in tensors.items():
                array = files.read(name)
                np.testing.assert_array_equal(array, expected)
                assert files.tensors[name].path.name == file
                with pytest.raises(ValueError, match="read-only"):
                    array[0, 0] = 1
        with pytest.raises(KeyError):
            files.read("g.w")


def test_single_file_and_other_files_beside_it(single: Path) -> None:
    (single / "config.json").write_text("{}")
    (single / "modeling.py").write_text("raise SystemExit('executed')")
    (single / "inference").mkdir()
    save_shard(single / "inference" / "other.safetensors", SHARDS[FIRST])
    with open_checkpoint(single) as files:
        assert set(files.tensors) == {"d.w", "e.w", "f.w"}


def test_an_index_may_name_the_single_file(single: Path) -> None:
    save_index(single, {name: "model.safetensors" for name in SHARDS[THIRD]}, 72)
    with open_checkpoint(single) as files:
        assert len(files.tensors) == 3 and not files.warnings


@pytest.mark.parametrize("total", [TOTAL + 1, 0, -5, None, "144", True, 144.0, [1]])
def test_wrong_total_size_is_a_warning(sharded: Path, total: object) -> None:
    save_index(sharded, WEIGHT_MAP, total)
    with open_checkpoint(sharded) as files:
        assert len(files.warnings) == 1
        assert "total_size" in files.warnings[0]


def test_missing_metadata_is_a_warning(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    with open_checkpoint(sharded) as files:
        assert "total_size is None" in files.warnings[0]


INDEX_TEXTS = {
    "empty": ("", ["not JSON"]),
    "not JSON": ("{weight_map}", ["not JSON"]),
    "cut": (json.dumps({"weight_map": WEIGHT_MAP})[:-5], ["brackets"]),
    "a list": (json.dumps([WEIGHT_MAP]), ["weight_map is expected"]),
    "null": ("null", ["weight_map is expected"]),
    "no weight_map": (json.dumps({"metadata": {"total_size": TOTAL}}), ["has None"]),
    "weight_map is a list": (json.dumps({"weight_map": list(WEIGHT_MAP)}), ["weight_map"]),
    "weight_map is a string": (json.dumps({"weight_map": FIRST}), [FIRST]),
    "weight_map is empty": (json.dumps({"weight_map": {}}), ["lists 0 tensors"]),
    "metadata is a list": (
        json.dumps({"metadata": [], "weight_map": WEIGHT_MAP}),
        ["metadata is []"],
    ),
    "deep": ('{"weight_map":' + "[" * 100_000, ["deeper than 8"]),
    "nested": ('{"weight_map": {"a.w": ["x"]}}', ["shard ['x'] is no string"]),
    "NaN": ('{"weight_map": {"a.w": NaN}}', ["NaN"]),
    "tensor twice": (
        json.dumps({"weight_map": WEIGHT_MAP})[:-2] + f', "c.w": "{FIRST}"}}}}',
        ["'c.w' occurs twice"],
    ),
    "weight_map twice": (
        json.dumps({"weight_map": WEIGHT_MAP})[:-1] + ', "weight_map": {"a.w": "x"}}',
        ["'weight_map' occurs twice"],
    ),
    "shard is a number": (
        json.dumps({"weight_map": WEIGHT_MAP | {"a.w": 3}}),
        ["tensor 'a.w': shard 3 is no string"],
    ),
    "shard is null": (json.dumps({"weight_map": WEIGHT_MAP | {"a.w": None}}), ["'a.w'", "None"]),
    "tensor name is a path": (
        json.dumps({"weight_map": WEIGHT_MAP | {"../x": FIRST}}),
        ["'../x' is not a tensor name"],
    ),
    "git-LFS pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0", ["git-LFS"]),
}


@pytest.mark.parametrize("case", INDEX_TEXTS)
def test_malformed_index(sharded: Path, case: str) -> None:
    text, words = INDEX_TEXTS[case]
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX, *words)


def test_index_is_not_utf8(sharded: Path) -> None:
    (sharded / INDEX).write_bytes(b'{"weight_map": {"\xff": "x"}}')
    refused(sharded, INDEX, "not UTF-8")


def test_index_caps(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "MAX_SHARDS", 2)
    refused(sharded, "names 3 shards; at most 2")
    monkeypatch.setattr(checkpoint_files, "MAX_TENSORS", 5)
    refused(sharded, "lists 6 tensors")
    monkeypatch.setattr(checkpoint_files, "MAX_INDEX_BYTES", 100)
    refused(sharded, "at most 100 are accepted")


def test_index_is_a_directory_or_cannot_be_read(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / INDEX).mkdir()
    refused(sharded, INDEX, "is a directory")


def test_a_broken_index_does_not_hide_broken_shards(sharded: Path) -> None:
    (sharded / INDEX).write_text("{")
    (sharded / SECOND).write_bytes(b"")
    problems = refused(sharded, INDEX, f"{SECOND}: is empty")
    assert len(problems) == 2


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "/etc/passwd.safetensors",
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/inside.safetensors",
        "./" + FIRST,
        "..",
        ".",
        "",
        ".hidden.safetensors",
        "pytorch_model.bin",
        FIRST + "\0",
        FIRST + "\n",
        "C:\\x.safetensors",
        " " + FIRST,
        FIRST.upper(),
    ],
)
def test_shard_names_that_are_not_plain(sharded: Path, shard: str) -> None:
    save_shard(sharded.parent / "outside.safetensors", {"a.w": tensor(0)})
    (sharded / "sub").mkdir()
    save_shard(sharded / "sub" / "inside.safetensors", {"a.w": tensor(0)})
    save_index(sharded, WEIGHT_MAP | {"a.w": shard})
    problems = refused(sharded, "is not a plain file name ending in .safetensors")
    # nothing of the outside was opened: the only other problem is the tensor that nobody lists
    assert len([problem for problem in problems if "outside" in problem]) <= 1


def test_links(sharded: Path) -> None:
    inside = sharded / "stored"
    inside.mkdir()
    shutil.move(sharded / SECOND, inside / "blob")
    (sharded / SECOND).symlink_to("stored/blob")
    with open_checkpoint(sharded) as files:
        np.testing.assert_array_equal(files.read("c.w"), tensor(20))

    outside = sharded.parent / "outside.safetensors"
    shutil.move(inside / "blob", outside)
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("../outside.safetensors")
    refused(sharded, f"{SECOND}: is a link that leaves the directory")
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(outside)
    refused(sharded, f"{SECOND}: is a link that leaves the directory")
    neighbour = sharded.parent / f"{sharded.name}-b"  # begins with the same characters
    neighbour.mkdir()
    shutil.copy(outside, neighbour / "blob")
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(neighbour / "blob")
    refused(sharded, f"{SECOND}: is a link that leaves the directory")
    # two steps: a link inside to a link inside that leaves
    (inside / "step").symlink_to(outside)
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("stored/step")
    refused(sharded, f"{SECOND}: is a link that leaves the directory")
    outside.unlink()
    refused(sharded, f"{SECOND}: is a link that leads nowhere")
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(SECOND)
    refused(sharded, f"{SECOND}: is a link that leads nowhere")

    # a directory reached through a link is fine, and links within it are judged at their real place
    (sharded / SECOND).unlink()
    save_shard(sharded / SECOND, SHARDS[SECOND])
    alias = sharded.parent / "alias"
    alias.symlink_to(sharded)
    with open_checkpoint(alias) as files:
        assert len(files.tensors) == 6


def test_index_link_that_leaves(sharded: Path) -> None:
    shutil.move(sharded / INDEX, sharded.parent / "index")
    (sharded / INDEX).symlink_to("../index")
    refused(sharded, f"{INDEX}: is a link that leaves the directory")


@pytest.mark.parametrize(
    ("place", "blobs", "fine"),
    [
        ("models--org--name/snapshots", "blobs", True),
        ("models--org--name/snapshots", "refs", False),
        ("models--org--name/snapshots", "../models--b/blobs", False),
        ("models--org--name/other", "blobs", False),
        ("my-models/snapshots", "blobs", False),
    ],
)
def test_hub_cache_links_lead_to_the_blobs_of_their_repository(
    sharded: Path, place: str, blobs: str, fine: bool
) -> None:
    snapshot = sharded.parent / "hub" / place / "0123abc"
    repository = snapshot.parent.parent
    snapshot.mkdir(parents=True)
    (repository / blobs).mkdir(parents=True)
    for path in sharded.iterdir():
        shutil.move(path, repository / blobs / f"{path.name}.blob")
        target = os.path.relpath(repository / blobs / f"{path.name}.blob", snapshot)
        (snapshot / path.name).symlink_to(target)
    if fine:
        with open_checkpoint(snapshot) as files:
            assert len(files.tensors) == 6
    else:
        refused(snapshot, "is a link that leaves the directory")


def test_missing_shard_is_one_problem_not_one_a_tensor(sharded: Path) -> None:
    (sharded / THIRD).unlink()
    problems = refused(sharded, f"{THIRD}: is named in {INDEX} but missing; download it again")
    assert len(problems) == 1


def test_extra_shard(sharded: Path) -> None:
    save_shard(sharded / "extra.safetensors", {"x.w": tensor(0)})
    assert warned(sharded) == [f"extra.safetensors: in the directory but not in {INDEX}, not used"]


def test_file_names_that_cannot_be_printed(sharded: Path) -> None:
    (sharded / os.fsdecode(b"\xff\xfe.safetensors")).write_bytes(b"")
    (warning,) = warned(sharded)
    assert "in the directory but not in" in warning and warning.isascii()
    (sharded / INDEX).unlink()
    problems = refused(sharded, "is not a plain file name")
    assert all(problem.isascii() for problem in problems)


def test_tensor_listed_but_absent(sharded: Path) -> None:
    save_index(sharded, WEIGHT_MAP | {"g.w": SECOND})
    assert len(refused(sharded, SECOND, "'g.w' is listed", "but not stored")) == 1


def test_tensor_stored_but_not_listed(sharded: Path) -> None:
    save_index(sharded, {name: file for name, file in WEIGHT_MAP.items() if name != "e.w"})
    with open_checkpoint(sharded) as files:
        assert set(files.tensors) == set(WEIGHT_MAP) - {"e.w"}
    assert warned(sharded) == [
        f"1 stored tensor is not used, {INDEX} names another shard for it or none: e.w in {THIRD}"
    ]


def test_wrong_shard_named(sharded: Path) -> None:
    save_index(sharded, WEIGHT_MAP | {"a.w": SECOND})
    assert len(refused(sharded, SECOND, "'a.w' is listed", f"it is in {FIRST}")) == 1


def test_tensor_in_two_shards(sharded: Path) -> None:
    stale = {name: tensor(70 + i) for i, name in enumerate(WEIGHT_MAP) if name not in SHARDS[SECOND]}
    save_shard(sharded / SECOND, stale | SHARDS[SECOND])
    with open_checkpoint(sharded) as files:  # the index decides, wherever else a name occurs
        for tensors in SHARDS.values():
            for name, expected in tensors.items():
                np.testing.assert_array_equal(files.read(name), expected)
    copies = ", ".join(f"{name} in {SECOND}" for name in list(stale)[:3])
    what = f"5 stored tensors are not used, {INDEX} names another shard for it or none"
    assert warned(sharded) == [f"{what}: {copies} and 2 more"]


def test_all_problems_over_all_shards(sharded: Path) -> None:
    save_shard(sharded / FIRST, {"a.w": tensor(0)})  # b.w absent
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-1])
    content = (sharded / THIRD).read_bytes()
    (sharded / THIRD).write_bytes(content.replace(b"F32", b"F33"))
    save_shard(sharded / "zzz.safetensors", {"x.w": tensor(0)})
    problems = refused(sharded, "'b.w' is listed", f"{SECOND}: is truncated", "'d.w'", "'e.w'", "'f.w'")
    assert len(problems) == 5


def test_missing_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert len(refused(sharded, f"{INDEX}: is missing", "3 other .safetensors files")) == 1
    (sharded / ".replaced-0123").mkdir()
    refused(sharded, "a save was interrupted, the former files are in .replaced-0123")


def test_missing_index_is_said_with_the_shards_problems(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / FIRST).write_bytes(b"")
    assert len(refused(sharded, f"{INDEX}: is missing", f"{FIRST}: is empty")) == 2


def test_single_file_beside_shards_without_index(single: Path) -> None:
    save_shard(single / FIRST, SHARDS[FIRST])
    refused(single, f"{FIRST}: is beside model.safetensors without a {INDEX}")


def test_not_a_checkpoint_directory(tmp_path: Path) -> None:
    refused(tmp_path, f"{INDEX}: is missing, and so is model.safetensors; ")
    refused(tmp_path / "none", "No such file or directory")
    file = tmp_path / "file.safetensors"
    save_shard(file, SHARDS[FIRST])
    refused(file, "cannot be listed as a directory", "Not a directory")
    with pytest.raises(CheckpointError, match="null byte"):
        open_checkpoint("x\0y")
