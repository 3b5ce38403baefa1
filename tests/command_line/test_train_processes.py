"""`dsv4 train` goes on with other processes than it began with: from one to two, and from two to one."""

import shutil

import jax
import numpy as np
import pytest

from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.command_line import train
from dsv4_jax.training.keeping import STATES_FOLDER
from dsv4_jax.training.metrics import EVENTS_FILE, METRICS_FILE, read_lines
from tests import processes

RUN_FILE = """
import pathlib
from dsv4_jax.training.run_config import Checkpoints, Stage
from tests.training.tiny_run import config

def run():
    out, kept = pathlib.Path(__file__).parent / "out", Checkpoints(every=3)
    return config(out, stages=(Stage(6, 16, 8),), checkpoints=kept, mesh="fsdp=4,expert=2")
"""


def losses(out):
    """Of each step, and which steps these are."""
    found = [
        (record["step"], record["loss"], record["grad_norm"]) for record in read_lines(out / METRICS_FILE)
    ]
    assert [step for step, *_ in found] == [1, 2, 3, 4, 5, 6]
    return np.array([numbers for _, *numbers in found])


def cut(out):
    """As if the run had ended after its third step."""
    shutil.rmtree(out / STATES_FOLDER / "6")
    shutil.rmtree(out / train.MODEL_FOLDER)


def assert_same_shapes(out, other):
    """Numbers may differ by more than rounding: AdamW makes whole steps of gradients that cancel to it."""
    with open_checkpoint(out / "model") as got, open_checkpoint(other / "model") as want:
        found, wanted = (
            {name: (info.dtype, info.shape) for name, info in files.tensors.items()} for files in (got, want)
        )
        assert found == wanted


def words(out):
    """What was told. A state that came back otherwise than it was saved, by its checksums, would be there."""
    found = [event["words"] for event in read_lines(out / EVENTS_FILE)]
    assert not any("UNREADABLE" in each for each in found)
    return found


@pytest.mark.slow
def test_from_one_process_to_two_and_back(tmp_path):
    """Both have the mesh of eight devices; what differs is which process holds which of them."""
    assert jax.device_count() == processes.COUNT * processes.DEVICES
    paths = {name: tmp_path / name / "tiny.py" for name in ("whole", "resumed", "begun")}
    for path in paths.values():
        path.parent.mkdir()
        path.write_text(RUN_FILE)
    outs = {name: path.parent / "out" for name, path in paths.items()}
    train.train(train.configured(str(paths["whole"])))
    wanted = losses(outs["whole"])
    shutil.copytree(outs["whole"], outs["resumed"])
    for name in ("resumed", "begun"):
        shutil.copy(tmp_path / "whole" / "tokenizer.json", tmp_path / name)
    cut(outs["resumed"])
    for ended in processes.run(
        "tests.command_line.process_that_trains", str(tmp_path), timeout=1500, folder=tmp_path
    ):
        assert ended.returncode == 0, ended.err
    assert "going on after step 3 of 6" in words(outs["resumed"])
    np.testing.assert_array_equal(losses(outs["resumed"])[:3], wanted[:3])
    np.testing.assert_allclose(losses(outs["resumed"]), wanted, rtol=2e-5)
    np.testing.assert_allclose(losses(outs["begun"]), wanted, rtol=2e-5)
    assert_same_shapes(outs["resumed"], outs["whole"])
    together = losses(outs["begun"])
    cut(outs["begun"])
    train.train(train.configured(str(paths["begun"])), resume=True)
    np.testing.assert_array_equal(losses(outs["begun"])[:3], together[:3])
    np.testing.assert_allclose(losses(outs["begun"]), wanted, rtol=2e-5)
    assert "going on after step 3 of 6" in words(outs["begun"])
    assert_same_shapes(outs["begun"], outs["whole"])
