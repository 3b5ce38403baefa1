"""The writer: files the public library reads, one tensor at a time, complete or not at all."""

import gc
import json
import os
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from dsv4_jax.checkpoint import staging, write
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.checkpoint.safetensors import load_header
from dsv4_jax.checkpoint.write import TensorPlan, write_sharded
from dsv4_jax.errors import CheckpointError
from tests.checkpoint.saved import INDEX, assert_holds, example, planned, save, snapshot

# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 200, 5e9])
def test_round_trip(tmp_path: Path, max_shard_bytes: float) -> None:
    paths = save(tmp_path / "new" / "deeper", max_shard_bytes=max_shard_bytes)
    directory = tmp_path / "new" / "deeper"
    assert_holds(directory, 0)
    assert {path.name for path in paths} == set(snapshot(directory))
    assert paths[-1].name == ("model.safetensors" if max_shard_bytes == 5e9 else INDEX)


def test_one_shard_is_the_single_file(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=5e9)
    assert set(snapshot(tmp_path)) == {"config.json", "model.safetensors"}


def test_shards_and_index(tmp_path: Path) -> None:
    save(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    arrays = example()
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in arrays.values())}
    assert list(index["weight_map"]) == sorted(arrays)
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    for shard in shards:
        size = sum(t.num_bytes for t in load_header(tmp_path / shard).tensors.values())
        # only a tensor that is itself too large goes over
        assert size <= 200 or len(load_header(tmp_path / shard).tensors) == 1


@pytest.mark.parametrize("max_shard_bytes", [200, 5e9])
def test_the_public_library_reads_every_byte(tmp_path: Path, max_shard_bytes: float) -> None:
    save(tmp_path, max_shard_bytes=max_shard_bytes)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (no mapping)
                found[name] = file.get_tensor(name)
    for name, array in example().items():
        tensor = found.pop(name)
        assert tuple(tensor.shape) == array.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    assert not found


def test_bytes_equal_those_of_the_public_library(tmp_path: Path) -> None:
    """Same header text and data, for tensors in the order that it chooses: dtype, then name."""
    arrays = {"b.w": example()["embed.weight"], "c.w": example()["embed.weight"] * 2}
    arrays = {"a.fn": example()["layers.0.fn"]} | arrays
    write_sharded(tmp_path, planned(arrays))
    tensors = {
        name: torch.from_numpy(array.view(np.uint8)).view(
            torch.float32 if array.dtype == np.float32 else torch.bfloat16
        )
        for name, array in arrays.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_alignment(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=5e9)
    header = load_header(tmp_path / "model.safetensors")
    assert header.data_start % 8 == 0
    for tensor in header.tensors.values():
        assert tensor.start % tensor.numpy_dtype.itemsize == 0


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "first")
    with open_checkpoint(tmp_path / "first") as files:
        plans = [
            (name, TensorPlan(info.dtype, info.shape), lambda name=name: files.read(name))
            for name, info in files.tensors.items()
        ]
        write_sharded(
            tmp_path / "second",
            plans,
            max_shard_bytes=200,
            extra_files={"config.json": b"0"},
        )
        # also in place: the source is renamed, not overwritten, while it is mapped
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")


def test_saving_onto_the_directory_that_is_being_read(tmp_path: Path) -> None:
    save(tmp_path)
    files = open_checkpoint(tmp_path)
    plans = [
        (name, TensorPlan(info.dtype, info.shape), lambda name=name: files.read(name))
        for name, info in files.tensors.items()
    ]
    write_sharded(tmp_path, plans, extra_files={"config.json": b"0"}, overwrite=True)
    files.close()
    assert_holds(tmp_path, 0)
    assert set(snapshot(tmp_path)) == {"config.json", "model.safetensors"}


def test_metadata(tmp_path: Path) -> None:
    save(tmp_path / "a", metadata={"format": "pt", "step": "3"})
    with open_checkpoint(tmp_path / "a") as files:
        assert files.metadata == {"format": "pt", "step": "3"}
    save(tmp_path / "b", metadata={})
    with open_checkpoint(tmp_path / "b") as files:
        assert files.metadata == {}


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_and_odd_strides(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(staging, "_WRITE_CHUNK_BYTES", 3)
    base = np.arange(120, dtype=np.float32).reshape(4, 5, 6)
    arrays = {
        "t": base.T,
        "s": base[::-2, 1:, ::3],
        "b": np.broadcast_to(np.float32(3), (3, 4)),
        "f": np.asfortranarray(base[0]).astype(ml_dtypes.bfloat16, order="F"),
    }
    write_sharded(tmp_path, planned(arrays))
    with open_checkpoint(tmp_path) as files:
        for name, array in arrays.items():
            np.testing.assert_array_equal(files.read(name), array)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
        save(tmp_path)
    assert_holds(tmp_path, 0)


def test_one_tensor_in_memory_and_progress(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    calls: list[tuple[str, int, int]] = []

    def producer(number: int) -> Callable[[], np.ndarray]:
        def produce() -> np.ndarray:
            gc.collect()
            assert [ref for ref in alive if ref() is not None] == []
            array = np.full((256, 1024), number, np.float32)
            alive.append(weakref.ref(array))
            return array

        return produce

    def progress(name: str, written: int, total: int) -> None:
        calls.append((name, written, total))

    size = 1 << 20
    plan = TensorPlan("F32", (256, 1024))
    tensors: Iterator[write.Planned] = ((f"t{i}", plan, producer(i)) for i in range(5))
    tracemalloc.start()
    try:
        write_sharded(tmp_path, tensors, max_shard_bytes=2 * size, progress=progress)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * size
    assert calls == [(f"t{i}", size * (i + 1), 5 * size) for i in range(5)]
    assert len(alive) == 5


# --- what is refused ---------------------------------------------------------------------------


def test_all_plan_problems_at_once(tmp_path: Path) -> None:
    bad = [
        ("../x", TensorPlan("F32", (2,))),
        ("a", TensorPlan("F33", (2,))),
        ("b", TensorPlan("F32", (2, 0))),
        ("c", TensorPlan("F32", (-1,))),
        ("d", TensorPlan("F32", (True,))),
        ("e", TensorPlan("F32", (2.0,))),
        ("f", TensorPlan("F32", (1,) * 9)),
        ("g", TensorPlan("F32", (1,))),
        ("g", TensorPlan("F32", (1,))),
    ]

    def produce() -> np.ndarray:
        raise AssertionError("nothing may be produced")

    with pytest.raises(CheckpointError) as caught:
        write_sharded(
            tmp_path / "x",
            [(name, plan, produce) for name, plan in bad],
            max_shard_bytes=0,
            extra_files={"../config.json": b"", "a.safetensors": b"", INDEX: b"", "ok.json": b""},
        )
    assert len(caught.value.problems) == 8 + 3 + 1
    assert not (tmp_path / "x").exists()


def test_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there are 0 tensors"):
        write_sharded(tmp_path / "x", [])


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 3), np.float64), np.zeros((3, 2), np.float32), np.zeros(6, np.float32)],
)
def test_produced_array_differs_from_its_plan(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'w': .* was produced for F32\[2, 3\]"):
        write_sharded(tmp_path / "x", [("w", TensorPlan("F32", (2, 3)), lambda: wrong)])
    assert not (tmp_path / "x").exists()


def test_non_empty_directory_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not empty \(\['notes.txt'\]\); overwrite=True"):
        save(tmp_path)
    assert snapshot(tmp_path) == before
    save(tmp_path, overwrite=True)
    assert_holds(tmp_path, 0)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("first", "second"), [(200, 5e9), (5e9, 200), (200, 100), (100, 100)])
def test_overwriting_leaves_only_the_new_checkpoint(tmp_path: Path, first: float, second: float) -> None:
    save(tmp_path, 1, max_shard_bytes=first)
    (tmp_path / "loss.png").write_bytes(b"png")
    save(tmp_path, 2, max_shard_bytes=second, overwrite=True)
    assert_holds(tmp_path, 2)
    save(tmp_path / "other", 2, max_shard_bytes=second)
    assert set(os.listdir(tmp_path)) == {"loss.png", "other", *os.listdir(tmp_path / "other")}


def test_foreign_tensor_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"precious")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="adapter.safetensors: is no file of a checkpoint"):
        save(tmp_path, overwrite=True)
    assert snapshot(tmp_path) == before


def test_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a directory"):
        save(tmp_path / "x", overwrite=True)
    assert (tmp_path / "x").read_text() == "mine"


def test_too_little_space_is_said_before_anything_is_produced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def produce() -> np.ndarray:
        raise AssertionError("nothing may be produced")

    plan = TensorPlan("F32", (2**50,))
    with pytest.raises(CheckpointError, match="no space: .* bytes are needed, .* are free"):
        write_sharded(tmp_path / "x", [("w", plan, produce)])
    assert not (tmp_path / "x").exists()


def test_two_writers_at_once(tmp_path: Path) -> None:
    def nested() -> np.ndarray:
        with pytest.raises(CheckpointError, match="another process is writing"):
            save(tmp_path / "x", 1)
        return np.zeros(1, np.float32)

    write_sharded(tmp_path / "x", [("w", TensorPlan("F32", (1,)), nested)])
    with open_checkpoint(tmp_path / "x") as files:
        assert list(files.tensors) == ["w"]
