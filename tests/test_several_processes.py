"""A model over two processes is the model in one: text, tokens, a training step; each reads its own part."""

import json

import numpy as np
import pytest

from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.command_line import main as command_line
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from tests import model_process, processes
from tests.models import all_kinds

# One layer, because every process compiles all for itself; CSA has every kind of cache.
CONFIG = all_kinds(vocab_size=64, attention_kinds=("csa",), router_kinds=("learned",))


@pytest.fixture(scope="module")
def one():
    return LanguageModel.random(CONFIG, Policy.of("float32"), seed=5)


@pytest.fixture(scope="module")
def checkpoint(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "one"
    one.save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def ended(checkpoint, folder):
    arguments = (str(checkpoint), str(folder))
    ended = processes.run("tests.model_process", *arguments, timeout=240, folder=folder)
    for each in ended:
        assert each.returncode == 0, each.err
    return ended


@pytest.fixture(scope="module")
def found(ended, folder):
    return [json.loads((folder / f"found{number}.json").read_text()) for number in range(2)]


def test_the_first_process_prints_what_one_would(ended, found, checkpoint, capsys):
    assert [each["code"] for each in found] == [0, 0]
    assert (
        command_line.run(["generate", str(checkpoint), *model_process.COMMAND, "--no-compilation-cache"]) == 0
    )
    alone = json.loads(capsys.readouterr().out)
    together = json.loads(ended[0].out)
    assert together["ids"] == alone["ids"] and len(together["ids"]) == 4
    assert ended[1].out == ""
    for number, each in enumerate(ended):
        assert f"process {number} of 2 has joined" in each.err


def test_tokens_of_many_rows(found, one):
    wanted = model_process.generated(one)
    for each in found:
        np.testing.assert_array_equal(each["tokens"], wanted)


def test_each_process_reads_its_own_part(found, checkpoint):
    """Every element that a process read is marked: those of split parameters have one mark, others two."""
    with open_checkpoint(checkpoint) as files:
        marks = [{name: np.zeros(t.shape, bool) for name, t in files.tensors.items()} for _ in found]
    for mine, each in zip(marks, found, strict=True):
        for name, box in each["boxes"]:
            mine[name][tuple(slice(*part) for part in box)] = True
    split = [name for name in marks[0] if not (marks[0][name] & marks[1][name]).any()]
    read = [sum(mark.sum() for mark in mine.values()) for mine in marks]
    total = sum(mark.size for mark in marks[0].values())
    assert all((marks[0][name] | marks[1][name]).all() for name in marks[0])
    assert {name for name in marks[0] if ".ffn.experts." in name} <= set(split)
    whole = [name for name in marks[0] if name not in split]
    assert all(mine[name].all() for name in whole for mine in marks)
    assert max(read) < 0.6 * total, (read, total, split)


def test_what_one_refuses_all_refuse(found):
    for each in found:
        assert each["refused"] == ["ProblemsError", "process 1: no such file"]


def test_a_training_step(ended, folder, one):
    report, parameters = model_process.trained(one)
    wanted = model_process.named(parameters) | report
    for number in range(2):
        with np.load(folder / f"trained{number}.npz") as got:
            assert set(got) == set(wanted)
            for name, value in wanted.items():
                np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
