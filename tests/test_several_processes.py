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
CONFIG = all_kinds(
    vocab_size=64, attention_kinds=("csa",), router_kinds=("learned",), num_nextn_predict_layers=0
)


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
    """Elements are counted: a process reads none twice, and those of split parameters one process only."""
    with open_checkpoint(checkpoint) as files:
        sizes = {name: tensor.shape for name, tensor in files.tensors.items()}
    counts = [{name: np.zeros(size, int) for name, size in sizes.items()} for _ in found]
    for mine, each in zip(counts, found, strict=True):
        for name, dims, box in each["boxes"]:
            mine[name].reshape(dims)[tuple(slice(*part) for part in box)] += 1
    read = [sum(count.sum() for count in mine.values()) for mine in counts]
    split = {name for name in sizes if (counts[0][name] + counts[1][name] == 1).all()}
    assert all((mine[name] == 1).all() for name in sizes if name not in split for mine in counts)
    assert {name for name in sizes if ".ffn.experts." in name} | {"embed.weight", "head.weight"} <= split
    assert read[0] == read[1] < 0.7 * sum(np.prod(size) for size in sizes.values())


def test_what_one_refuses_all_refuse(found):
    for each in found:
        assert each["refused"] == ["ProblemsError", "process 1: no such file"]


def test_a_training_step(ended, folder, one):
    """Adam's first step is the learning rate times the gradient's sign: compared where that is no chance."""
    wanted = model_process.trained(one)
    before = model_process.named(one.parameters)
    for number in range(2):
        with np.load(folder / f"trained{number}.npz") as got:
            assert set(got) == set(wanted)
            for name in ("loss", "main", "balance", "grad_norm"):
                np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, err_msg=name)
            for name, gradient in wanted.items():
                if name.startswith("gradient"):
                    size = np.abs(gradient).max()
                    np.testing.assert_allclose(got[name], gradient, rtol=0, atol=1e-5 * size + 1e-9)
                    name = name.removeprefix("gradient")
                    clear = np.abs(gradient) > 1e-4 * size + 1e-8
                    np.testing.assert_allclose(
                        got[name][clear], wanted[name][clear], rtol=0, atol=1e-8 + 1e-6
                    )
                    if size > 1e-6:
                        assert np.abs(got[name] - before[name]).max() > model_process.RATE / 2, name
