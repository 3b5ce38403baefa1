"""Runs on disks that are really full or read-only: what is said, what is kept, and how they go on."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import struct
import tempfile
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from dsv4_jax.command_line import train
from dsv4_jax.errors import ProblemsError
from dsv4_jax.training.keeping import STATES_FOLDER
from dsv4_jax.training.metrics import EVENTS_FILE, METRICS_FILE, RecordFile, TensorBoard, read_lines
from dsv4_jax.training.run_config import Checkpoints
from dsv4_jax.training.saved_states import SavedStates
from dsv4_jax.training.step import TrainState
from tests.small_disk import files_of_at_most, fill, read_only, small_disk
from tests.training.test_run import (  # noqa: F401
    Watching,
    fresh,
    go,
    spoilt,
    stopping_at,
    trace,
    with_out,
)
from tests.training.tiny_run import config

pytestmark = [
    pytest.mark.usefixtures("spoilt"),
    # Threads of Orbax that find a save given up: "Event loop is closed".
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def whole(tmp_path):
    """A run that nobody disturbed."""
    run_config = config(tmp_path / "whole" / "out")
    return run_config, go(run_config)[0]


def on(disk, run_config):
    """The same run on another disk; a second folder, for beside `out` lies what it could not hold."""
    return dataclasses.replace(run_config, out=disk / "run" / "out")


def test_a_disk_that_fills_up_leaves_the_last_good_step(whole, tmp_path, monkeypatch):
    """ENOSPC by the system: told, tried again, the last state elsewhere; then the run goes on exactly."""
    wanted_config, wanted = whole
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with small_disk(tmp_path / "disk", 1024) as disk:
        run_config = on(disk, wanted_config)

        class Filling(Watching):
            def step(self, record, loads):
                super().step(record, loads)
                if record["step"] == 4:
                    limit = time.monotonic() + 60
                    while not (run_config.out / STATES_FOLDER / "3").exists() and time.monotonic() < limit:
                        time.sleep(0.01)  # it is written in the background
                    fill(disk)

        watching = Filling()
        with pytest.raises(ProblemsError, match="the state after step 12 is in") as moved:
            go(run_config, watching=watching)
        states = run_config.out / STATES_FOLDER
        said = "\n".join(moved.value.problems)
        assert "No space left on device" in said and str(run_config.out.parent) in said
        told = [line for line in watching.lines if "NOT SAVED" in line]
        assert told and all("No space left on device" in line for line in told), watching.lines
        assert all(f"{states}/6: " in line or f"{states}/9: " in line for line in told)
        assert sorted(path.name for path in states.iterdir()) == ["3"]  # nothing half written
        place = next((tmp_path / "elsewhere").glob("out-unsaved-*"))
        assert str(place) in str(moved.value)
        assert SavedStates(place / STATES_FOLDER, 1).restore(fresh()).about["step"] == 12
        (disk / "filler").unlink()
        result, _ = go(run_config, resume=True)
        assert result.step == 12 and trace(run_config) == trace(wanted_config)
        np.testing.assert_array_equal(result.state.trained["seen"], wanted.state.trained["seen"])


@pytest.mark.parametrize("last", [9, 12])
def test_a_disk_that_was_full_for_one_save_costs_that_save_alone(whole, tmp_path, last, monkeypatch):
    """It is found out in the background, when the next one begins; that one is not given up for it."""
    run_config, wanted = whole
    cut = with_out(run_config, tmp_path / "cut" / "out", checkpoints=Checkpoints(every=3, keep=9))
    start = SavedStates.save

    def save(self, state, about, beside):
        full = int(state.step) == last - 3
        with files_of_at_most(300) if full else contextlib.nullcontext():
            start(self, state, about, beside)
            limit = time.monotonic() + 30
            while full and self._manager.is_saving_in_progress() and time.monotonic() < limit:
                time.sleep(0.01)

    (cut.out).mkdir(parents=True)
    monkeypatch.setattr(SavedStates, "save", save)
    result, watching = go(cut)
    told = [line for line in watching.lines if "NOT SAVED" in line]
    assert SavedStates(cut.out / STATES_FOLDER, 9).steps() == [
        each for each in (3, 6, 9, 12) if each != last - 3
    ]
    assert len(told) <= 1 and all(f"/{last - 3}: " in line and "too large" in line for line in told), told
    assert trace(cut) == trace(run_config)
    np.testing.assert_array_equal(result.state.trained["seen"], wanted.state.trained["seen"])


def test_files_that_may_not_grow_leave_the_last_good_step(tmp_path):
    """EFBIG, met while TensorStore writes the arrays; every failure names the folder."""

    def state(step):
        wide = jnp.asarray(np.random.default_rng(step).standard_normal((400, 400)), jnp.float32)
        return TrainState({"wide": wide}, {}, (), jnp.int32(step))

    saved = SavedStates(tmp_path / "states", 2)
    saved.save(state(1), {})
    saved.wait()
    with files_of_at_most(50_000):
        for step in (2, 3):
            with pytest.raises(ProblemsError, match="File too large") as refused:
                saved.save(state(step), {})
                saved.wait()
            assert str(tmp_path / "states") in str(refused.value)
    assert saved.steps() == [1] and [path.name for path in (tmp_path / "states").iterdir()] == ["1"]
    saved.save(state(4), {})
    saved.wait()
    assert saved.steps() == [1, 4]
    np.testing.assert_array_equal(saved.restore(state(0)).state.trained["wide"], state(4).trained["wide"])


def test_a_full_disk_of_records_ends_no_run(tmp_path):
    """`/dev/full` refuses every byte, to root too."""
    run_config = config(tmp_path / "out")
    run_config.out.mkdir()
    for name in (METRICS_FILE, EVENTS_FILE):
        (run_config.out / name).symlink_to("/dev/full")
    result, watching = go(run_config)
    assert result.step == 12 and any(f"12 lines of {run_config.out}" in line for line in watching.lines)


def test_a_full_disk_refuses_a_start_and_a_restart(whole, tmp_path):
    run_config, _ = whole
    with small_disk(tmp_path / "disk", 512) as disk:
        cut = on(disk, run_config)
        go(cut, watching=stopping_at(4, signal.SIGTERM))
        (cut.out / train.RUN_FILE).write_text('{"seed": 0}')
        fill(disk)
        with pytest.raises(ProblemsError, match="cannot be written") as refused:
            train.train(cut, resume=True)
        assert str(refused.value).endswith(f"out={cut.out}: cannot be written (No space left on device)")
        assert json.loads((cut.out / train.RUN_FILE).read_text()) == {"seed": 0}
        before = (cut.out / METRICS_FILE).read_bytes()
        with pytest.raises(ProblemsError, match=f"{METRICS_FILE}: cannot be rewritten .No space left"):
            go(cut, resume=True)
        assert (cut.out / METRICS_FILE).read_bytes() == before
        (disk / "filler").unlink()
        assert go(cut, resume=True)[0].step == 12 and trace(cut) == trace(run_config)


def test_a_disk_that_became_read_only(whole, tmp_path):
    run_config, _ = whole
    with small_disk(tmp_path / "disk", 2048) as disk:
        cut = on(disk, run_config)
        go(cut, watching=stopping_at(4, signal.SIGTERM))
        (cut.out / train.RUN_FILE).write_text("{}")
        states = SavedStates(cut.out / STATES_FOLDER, 2)
        read_only(disk, True)
        with pytest.raises(ProblemsError) as refused:
            train.train(cut, resume=True)
        assert str(refused.value).endswith(f"out={cut.out}: cannot be written (Read-only file system)")
        with pytest.raises(ProblemsError, match="Read-only file system") as refused:
            states.save(fresh(), {})
            states.wait()
        assert str(cut.out / STATES_FOLDER) in str(refused.value)
        read_only(disk, False)
        assert go(cut, resume=True)[0].step == 12 and trace(cut) == trace(run_config)


def test_a_place_that_the_system_does_not_give(tmp_path):
    for out in ("/proc/dsv4/out", "/dev/null/out"):
        with pytest.raises(ProblemsError, match=f"out={out}: cannot be written"):
            train.prepare_folder(pathlib.Path(out), resume=False)
    with pytest.raises(ProblemsError, match="/dev/null/out/checkpoints"):
        SavedStates(pathlib.Path("/dev/null/out/checkpoints"), 1)


def events_of(path):
    """The events of a file as TensorBoard reads it, their checksums compared."""
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        head, body, tail = data[8:12], data[12 : 12 + size], data[12 + size : 16 + size]
        assert [struct.unpack("<I", each)[0] for each in (head, tail)] == [
            masked_crc32c(each) for each in (data[:8], body)
        ]
        found.append(Event.FromString(body))
        data = data[16 + size :]
    return found


def test_event_files_that_cannot_be_written_hold_nobody_up(tmp_path, monkeypatch):
    """The eleventh record would wait for ever for a thread that a full disk has ended."""
    board = TensorBoard(tmp_path / "board")
    record = {"step": 1} | {f"number {index}": 1.5 for index in range(40)}
    with files_of_at_most(1000):
        for _ in range(60):
            board.write(record)
    assert board.num_lost == 60
    monkeypatch.setattr(board, "_again", 0.0)
    board.write(record | {"step": 2})
    board.write_text("sample", "def f():", 3)
    board.close()
    assert board.num_lost == 60
    torn, whole = sorted((tmp_path / "board").iterdir(), key=lambda path: path.stat().st_size)
    assert torn.stat().st_size == 1000
    first, *numbers, text = events_of(whole)
    assert first.file_version == "brain.Event:2" and text.step == 3
    assert [(each.step, each.summary.value[0].simple_value) for each in numbers] == [(2, 1.5)] * 40


def test_a_torn_line_does_not_take_the_next_one_with_it(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    file = RecordFile(path)
    file.write({"step": 3})
    with files_of_at_most(path.stat().st_size + 5):
        file.write({"step": 4, "long": "x" * 100})
        file.write({"step": 5})
    assert file.num_lost == 2
    file.write({"step": 6})
    file.close()
    assert [record["step"] for record in read_lines(path)] == [1, 3, 6]
    assert os.path.getsize(path) > 0


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path):
    def look(step, parameters):
        raise OSError(28, "No space left on device", "plots/loss.png")

    result, watching = go(config(tmp_path / "out"), look=look)
    assert result.step == 12
    assert any("NOT DRAWN" in line and "plots/loss.png" in line for line in watching.lines)
