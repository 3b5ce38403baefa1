"""Failing calls, interrupts and kills while writing: the former files, the new ones, or refused."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.checkpoint.write import TensorPlan, write_sharded
from dsv4_jax.errors import CheckpointError
from tests.checkpoint.saved import INDEX, assert_holds, example, planned, save, snapshot


class Fault:
    """Lets the nth call of os.<function> by the package itself raise."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        function: str,
        nth: int,
        error: BaseException,
        late: bool = False,
    ) -> None:
        real, self.calls, self.struck = getattr(os, function), 0, False

        def call(*args: object, **options: object) -> object:
            # Not those of shutil.rmtree: cleaning up may fail, and has its own test.
            self.calls += sys._getframe(1).f_globals["__name__"].startswith("dsv4_jax.")
            if self.calls == nth and not self.struck:
                self.struck = True
                if late and function in ("rename", "write", "fsync"):
                    real(*args, **options)  # a signal handler runs after the call
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


@pytest.mark.parametrize("kind", ["error", "interrupt before", "interrupt after"])
@pytest.mark.parametrize("function", ERRORS)
@pytest.mark.parametrize("former", [None, 200, 5e9])
def test_any_failing_call_leaves_the_former_state(
    tmp_path: Path,
    former: float | None,
    function: str,
    kind: str,
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
        error = ERRORS[function] if kind == "error" else KeyboardInterrupt()
        with monkeypatch.context() as patch:
            fault = Fault(patch, function, nth, error, late=kind == "interrupt after")
            try:
                save(directory, 2, overwrite=True)
            except (CheckpointError, KeyboardInterrupt) as caught:
                if kind == "error":
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
    with pytest.raises(CheckpointError, match="is not a directory"):
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
