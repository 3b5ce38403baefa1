"""The writer: files the public library reads, one tensor at a time, complete or not at all."""

import errno
import gc
import json
import os
import subprocess
import sys
import textwrap
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
from dsv4_jax.checkpoint.safetensors import DTYPES, load_header
from dsv4_jax.checkpoint.write import TensorPlan, write_sharded
from dsv4_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def example(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "embed.weight": random.normal(size=(7, 5)).astype(ml_dtypes.bfloat16),
        "layers.0.w.weight": random.integers(0, 255, (3, 5), np.uint8).view(
            ml_dtypes.float8_e4m3fn
        ),
        "layers.0.w.scale": random.integers(1, 254, (1, 1), np.uint8).view(
            ml_dtypes.float8_e8m0fnu
        ),
        "layers.0.fn": random.normal(size=(24, 3)).astype(np.float32),
        "layers.0.tid2eid": random.integers(0, 9, (7, 2)),
        "layers.0.experts": random.integers(-128, 127, (3, 3), np.int8),
        "hc_scale": random.normal(size=1).astype(np.float32),
        "scalar": np.float32(seed + 0.5).reshape(()),
    }


def planned(arrays: dict[str, np.ndarray]) -> list[write.Planned]:
    return [
        (name, TensorPlan(NAMES[array.dtype], array.shape), lambda array=array: array)
        for name, array in arrays.items()
    ]


def save(directory: Path, seed: int = 0, **options: object) -> tuple[Path, ...]:
    options = {"max_shard_bytes": 200, "extra_files": {"config.json": f"{seed}".encode()}} | options
    return write_sharded(directory, planned(example(seed)), **options)


def assert_holds(directory: Path, seed: int) -> None:
    expected = example(seed)
    with open_checkpoint(directory) as files:
        assert set(files.tensors) == set(expected)
        assert files.warnings == []
        for name, array in expected.items():
            found = files.read(name)
            assert found.dtype == array.dtype and found.shape == array.shape
            assert found.tobytes() == array.tobytes(), name
    assert (directory / "config.json").read_bytes() == f"{seed}".encode()


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files below a directory, hidden ones too."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"<dir>"
        for path in sorted(directory.rglob("*"))
    }


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
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
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
def test_chunks_and_odd_strides(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            array = np.full((3, 4), number, np.float32)
            alive.append(weakref.ref(array))
            return array

        return produce

    def progress(name: str, written: int, total: int) -> None:
        calls.append((name, written, total))

    plan = TensorPlan("F32", (3, 4))
    tensors: Iterator[write.Planned] = ((f"t{i}", plan, producer(i)) for i in range(5))
    write_sharded(tmp_path, tensors, max_shard_bytes=100, progress=progress)
    assert calls == [(f"t{i}", 48 * (i + 1), 240) for i in range(5)]
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
def test_overwriting_leaves_only_the_new_checkpoint(
    tmp_path: Path, first: float, second: float
) -> None:
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
    with pytest.raises(CheckpointError, match="Not a directory"):
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


# --- faults ------------------------------------------------------------------------------------


class Fault:
    """Lets the nth call of os.<function> by the package itself raise."""

    def __init__(self, patch: pytest.MonkeyPatch, function: str, nth: int, error: BaseException):
        real, self.calls, self.struck = getattr(os, function), 0, False

        def call(*args: object, **options: object) -> object:
            # Not those of shutil.rmtree: cleaning up may fail, and has its own test.
            self.calls += sys._getframe(1).f_globals["__name__"].startswith("dsv4_jax.")
            if self.calls == nth and not self.struck:
                self.struck = True
                raise error
            return real(*args, **options)

        patch.setattr(os, function, call)


ERRORS = {
    "write": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "fsync": OSError(errno.EIO, os.strerror(errno.EIO)),
    "rename": OSError(errno.EACCES, os.strerror(errno.EACCES)),
    "open": OSError(errno.EROFS, os.strerror(errno.EROFS)),
    "mkdir": OSError(errno.EROFS, os.strerror(errno.EROFS)),
}


@pytest.mark.parametrize("interrupt", [False, True])
@pytest.mark.parametrize("function", ERRORS)
@pytest.mark.parametrize("former", [None, 200, 5e9])
def test_any_failing_call_leaves_the_former_state(
    tmp_path: Path,
    former: float | None,
    function: str,
    interrupt: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "x"
    if former is not None:
        save(directory, 1, max_shard_bytes=former)
        (directory / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    nth = 0
    while True:
        nth += 1
        error = KeyboardInterrupt() if interrupt else ERRORS[function]
        with monkeypatch.context() as patch:
            fault = Fault(patch, function, nth, error)
            try:
                save(directory, 2, overwrite=True)
            except (CheckpointError, KeyboardInterrupt) as caught:
                if not interrupt:
                    assert isinstance(caught, CheckpointError)
                    assert error.strerror in str(caught)
                    assert str(directory) in str(caught)
            else:
                assert not fault.struck  # no failure is swallowed
                break
        assert snapshot(tmp_path) == before, f"call {nth} of os.{function}"
    assert nth > 2
    assert_holds(directory, 2)


def test_an_error_of_a_producer_passes_and_cleans_up(tmp_path: Path) -> None:
    save(tmp_path / "x", 1)
    before = snapshot(tmp_path)

    def fail() -> np.ndarray:
        raise ZeroDivisionError("mine")

    tensors = [*planned(example(2)), ("z", TensorPlan("I8", (1,)), fail)]
    with pytest.raises(ZeroDivisionError, match="mine"):
        write_sharded(tmp_path / "x", tensors, overwrite=True)
    assert snapshot(tmp_path) == before
    with pytest.raises(ZeroDivisionError, match="mine"):
        write_sharded(tmp_path / "y", tensors)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_failing_to_remove_the_former_files_is_no_failure_to_write(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        try:
            save(tmp_path, 2, overwrite=True)
        except KeyboardInterrupt:
            assert isinstance(error, KeyboardInterrupt)
    assert_holds(tmp_path, 2)
    save(tmp_path, 3, overwrite=True)
    assert_holds(tmp_path, 3)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(tmp_path / "file" / "x")


def test_undo_that_fails_too_is_refused_and_keeps_the_former_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    former = snapshot(tmp_path)
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) > 3:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(tmp_path, 2, overwrite=True)
    with pytest.raises(CheckpointError, match="the former files are in .replaced-"):
        open_checkpoint(tmp_path)
    kept = {Path(name).name: data for name, data in snapshot(tmp_path).items() if data != b"<dir>"}
    assert kept == former
    save(tmp_path, 2, overwrite=True)
    assert_holds(tmp_path, 2)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_order_of_writes_syncs_and_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power loss needs: data synced before names, the old marker's removal before new names,
    and all names before the new marker."""
    save(tmp_path, 1)
    events: list[tuple[str, str]] = []
    for function in ("write", "fsync"):
        real = getattr(os, function)

        def by_descriptor(descriptor: int, *rest: object, real=real, function=function) -> object:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            events.append((function, "." if path == str(tmp_path) else Path(path).name))
            return real(descriptor, *rest)

        monkeypatch.setattr(os, function, by_descriptor)
    rename = os.rename

    def by_path(source: Path, target: Path) -> None:
        events.append(("in" if target.parent == tmp_path else "out", target.name))
        rename(source, target)

    monkeypatch.setattr(os, "rename", by_path)
    save(tmp_path, 2, overwrite=True, max_shard_bytes=300)
    renames = [number for number, (kind, _) in enumerate(events) if kind in ("in", "out")]
    for kind, name in events[: renames[0]]:
        last_write = max(i for i, event in enumerate(events) if event == ("write", name))
        assert last_write < events.index(("fsync", name)) < renames[0], (kind, name)
    assert events[renames[0]] == ("out", INDEX)
    assert events[renames[0] + 1] == ("fsync", ".")
    first_in = next(i for i in renames if events[i][0] == "in")
    assert all(kind == "out" for kind, _ in events[renames[0] + 2 : first_in])
    assert events[-3:] == [("fsync", "."), ("in", INDEX), ("fsync", ".")]


KILLER = """
    import os, resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    import numpy as np
    from dsv4_jax.checkpoint.write import TensorPlan, write_sharded

    def save(directory, seed, max_shard_bytes):
        tensors = [
            (f"t{{i}}", TensorPlan("F32", (3, 4)), lambda i=i: np.full((3, 4), 10 * seed + i, "f4"))
            for i in range(4)
        ]
        write_sharded(directory, tensors, max_shard_bytes=max_shard_bytes, overwrite=True,
                      extra_files={{"config.json": str(seed).encode()}})

    def killed(directory, nth, max_shard_bytes):
        # In a forked child: die at the nth call of any function that touches the disk.
        calls = 0
        def wrap(name):
            real = getattr(os, name)
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == nth and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])  # half of it arrives
                if calls == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)
            setattr(os, name, call)
        for name in ("write", "fsync", "rename", "mkdir", "open", "rmdir", "unlink"):
            wrap(name)
        save(directory, 2, max_shard_bytes)
        os._exit(0)

    os.fsync = lambda descriptor: None  # a killed process loses nothing; only a machine does
    root = Path({directory!r})
    for former, size in ((0, 100), (0, 5e9), (100, 100), (100, 5e9), (5e9, 100)):
        nth = 0
        while True:
            nth += 1
            directory = root / f"{{former:g}}-{{size:g}}-{{nth}}"
            if former:
                save(directory, 1, former)
            child = os.fork()
            if child == 0:
                killed(directory, nth, size)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
    # A real refusal of the kernel: files may not grow beyond 100 bytes.
    directory = root / "limit"
    save(directory, 1, 100)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        save(directory, 2, 100)
    except ValueError as error:
        assert "File too large" in str(error), error
    else:
        raise AssertionError("the limit did not bite")
"""


def test_kill_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each system call: the directory holds the former, the new, or is refused."""
    root = Path(__file__).parents[2]
    script = textwrap.dedent(KILLER).format(root=str(root), directory=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr

    def content(directory: Path) -> int | None:
        try:
            with open_checkpoint(directory) as files:
                values = {name: files.read(name).copy() for name in files.tensors}
        except CheckpointError as error:
            assert "missing" in str(error) or "No such file" in str(error)
            return None
        seed = int((directory / "config.json").read_bytes())
        assert values.keys() == {f"t{i}" for i in range(4)}
        for number in range(4):
            np.testing.assert_array_equal(
                values[f"t{number}"], np.full((3, 4), 10 * seed + number, np.float32)
            )
        return seed

    assert content(tmp_path / "limit") == 1
    outcomes: dict[str, dict[int, int | None]] = {}
    for directory in tmp_path.glob("*-*-*"):
        case, nth = directory.name.rsplit("-", 1)
        outcomes.setdefault(case, {})[int(nth)] = content(directory)
    assert len(outcomes) == 5
    for case, by_step in outcomes.items():
        seen = [by_step[nth] for nth in sorted(by_step)]
        first, refused, last = seen.count(1), seen.count(None), seen.count(2)
        assert last >= 1 and len(seen) > 15
        if case.startswith("0-"):
            assert seen == [None] * refused + [2] * last
        else:
            assert seen == [1] * first + [None] * refused + [2] * last
            assert 0 < refused < first

    # whatever is left, the next save repairs it and removes the leavings
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for directory in tmp_path.iterdir():
        save(directory, 3, overwrite=True)
        assert_holds(directory, 3)
        assert not [name for name in os.listdir(directory) if name.startswith(".")]


def test_a_crash_before_the_commit_does_not_need_overwrite(tmp_path: Path) -> None:
    leavings = tmp_path / ".incoming-0123"
    leavings.mkdir()
    (leavings / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 1)
    assert_holds(tmp_path, 1)
    assert not leavings.exists()
