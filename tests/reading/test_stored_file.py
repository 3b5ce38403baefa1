"""Reading: files that change, failing systems, views and copies, threads."""

import gc
import mmap
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.errors import CheckpointError
from tests.checkpoint.shards import (
    FIRST,
    SHARDS,
    THIRD,
    save_shard,
    save_sharded,
    tensor,
)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_sharded(tmp_path / "checkpoint")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def replace(path: Path) -> None:
    status = path.stat()
    copy = path.with_suffix(".new")
    shutil.copy(path, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(copy, path)


def rewrite(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES = [truncate, replace, rewrite, Path.unlink]
EXPECTED = {Path.unlink: "vanished while it was read"}


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_change_between_header_and_first_read(
    sharded: Path, change: Callable[[Path], None], copy: bool
) -> None:
    with pytest.raises(CheckpointError, match=THIRD):  # at the end, once more
        with open_checkpoint(sharded, copy=copy) as files:
            change(sharded / THIRD)
            np.testing.assert_array_equal(files.read("a.w"), tensor(0))
            with pytest.raises(CheckpointError, match=THIRD):
                files.read("d.w")


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_change_between_two_reads(sharded: Path, change: Callable[[Path], None], copy: bool) -> None:
    expected = EXPECTED.get(change, "was replaced, rewritten or truncated while it was read")
    with pytest.raises(CheckpointError, match=f"{THIRD}: {expected}"):
        with open_checkpoint(sharded, copy=copy) as files:
            files.read("d.w")
            change(sharded / THIRD)
            files.read("e.w")


@pytest.mark.parametrize("change", CHANGES)
def test_change_after_the_last_read_is_seen_at_the_end(sharded: Path, change: Callable[[Path], None]) -> None:
    with pytest.raises(CheckpointError, match=THIRD):
        with open_checkpoint(sharded) as files:
            files.read("a.w")
            files.read("d.w")
            change(sharded / THIRD)


def test_an_error_inside_is_not_hidden_by_the_final_check(sharded: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        with open_checkpoint(sharded) as files:
            files.read("d.w")
            truncate(sharded / THIRD)
            raise RuntimeError("mine")


def test_change_while_the_file_is_being_mapped(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mmap.mmap

    def map_then_truncate(*arguments: object, **options: object) -> mmap.mmap:
        mapping = real(*arguments, **options)
        truncate(sharded / THIRD)
        return mapping

    with pytest.raises(CheckpointError, match=f"{THIRD}: was replaced, rewritten or truncated"):
        with open_checkpoint(sharded) as files, monkeypatch.context() as patch:
            patch.setattr(mmap, "mmap", map_then_truncate)
            files.read("d.w")


def test_mapping_or_reading_fails(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    with open_checkpoint(sharded) as files, monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", fail)
        with pytest.raises(CheckpointError, match="cannot be mapped .No such device.; copy=True"):
            files.read("a.w")
    with open_checkpoint(sharded, copy=True) as files, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=f"{FIRST}: reading byte .* failed"):
            files.read("a.w")


def test_short_reads_are_continued_and_an_early_end_is_an_error(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def a_byte(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:1]], offset)

    with open_checkpoint(sharded, copy=True) as files, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", a_byte)
        np.testing.assert_array_equal(files.read("e.w"), tensor(40))
        patch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(CheckpointError, match="24 bytes more; download it again"):
            files.read("e.w")


def test_views_outlive_the_files(sharded: Path) -> None:
    with open_checkpoint(sharded) as files:
        array = files.read("d.w")
    gc.collect()
    np.testing.assert_array_equal(array, tensor(30))


def test_mapped_reads_copy_nothing_and_pages_can_be_dropped(tmp_path: Path) -> None:
    big = np.arange(1 << 20, dtype=np.float32)
    save_shard(tmp_path / "model.safetensors", {"head.w": tensor(0), "big.w": big})
    with open_checkpoint(tmp_path) as files:
        files.drop_pages("big.w")  # nothing is mapped yet
        first, second = files.read("big.w"), files.read("big.w")
        assert np.shares_memory(first, second)
        np.testing.assert_array_equal(first, big)
        files.drop_pages("big.w")
        files.drop_pages("head.w")  # smaller than a page: keeps its neighbours
        np.testing.assert_array_equal(first, big)
        np.testing.assert_array_equal(files.read("head.w"), tensor(0))
    with open_checkpoint(tmp_path, copy=True) as files:
        assert not np.shares_memory(files.read("big.w"), files.read("big.w"))


def test_threads_share_a_checkpoint(sharded: Path) -> None:
    failures = []

    def read_all() -> None:
        for _ in range(20):
            for tensors in SHARDS.values():
                for name, expected in tensors.items():
                    if not np.array_equal(files.read(name), expected):
                        failures.append(name)

    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(sharded) as files:
        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(os.listdir("/proc/self/fd")) <= before + 1 + 2 * len(SHARDS)  # the directory and its files
    assert not failures
    assert len(os.listdir("/proc/self/fd")) == before
