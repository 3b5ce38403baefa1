"""`dsv4 train` as a program: killed, stopped, refused, and what it leaves behind."""

import os
import random
import shutil
import signal

import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.checkpoint.files import open_checkpoint
from tests.command_line.killed_runs import command, ended, kill, run_file, trace, wait_for_steps

STEPS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """(the run file, the folder, what was printed) of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = run_file(folder, STEPS)
    code, out, err = ended(command("train", str(path), cache=cache))
    assert code == 0, err
    return path, folder / "out", out, err


def test_a_run_leaves_a_model_that_anybody_can_load(whole):
    path, out, printed, err = whole
    assert printed == f'dsv4 generate {out / "model"} "def "\n'
    assert f"step {STEPS}/{STEPS}" in err and "finished" in err and "% of the time" in err
    assert [record["step"] for record in trace(out)] == list(range(1, STEPS + 1))
    model = dsv4_jax.load(out / "model", dtype="float32")
    assert model.tokenizer is not None and model.num_params > 1000
    assert np.isfinite(model.logits(np.array([[1, 2, 3]], np.int32))).all()
    assert sorted(name for name in os.listdir(out) if not name.startswith(".")) == [
        "checkpoints", "events.jsonl", "goodput.jsonl", "metrics.jsonl", "model", "run.json"
    ] or not (out / "events.jsonl").exists()  # fmt: skip


def kills(whole, cache, folder, count, seed):
    """Kills a run so many times, ends it by SIGTERM once, and compares what it becomes with the whole one."""
    path, wanted, *_ = whole
    path = shutil.copy(path, folder / path.name)
    out, chance, told = folder / "out", random.Random(seed), []

    def started(*options):
        running = command("train", str(path), *options, cache=cache)
        records = trace(out)
        wait_for_steps(running, out, records[-1]["step"] if records else 0)
        return running

    for number in range(count):
        told.append(kill(started(*(["--resume"] if number else [])), out, chance))
    running = started("--resume")
    running.process.send_signal(signal.SIGTERM)
    code, _, err = ended(running)
    assert code == 143 and "saving the state and stopping" in err and "--resume goes on" in err, err
    assert not (out / "model").exists()
    code, _, err = ended(command("train", str(path), "--resume", cache=cache))
    assert code == 0, err
    assert trace(out) == trace(wanted)
    with open_checkpoint(out / "model") as got, open_checkpoint(wanted / "model") as want:
        assert set(got.tensors) == set(want.tensors)
        for name in want.tensors:
            assert got.read(name).tobytes() == want.read(name).tobytes(), name
    return told


def test_a_killed_and_stopped_run_goes_on_as_if_nothing_had_happened(whole, cache, tmp_path):
    assert len(kills(whole, cache, tmp_path, 3, seed=1)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_that_is_killed_ten_times(whole, cache, tmp_path, seed):
    told = kills(whole, cache, tmp_path, 10, seed)
    assert len(set(told)) == 2
