"""A model over two processes is the model in one: text, tokens, a training step; each reads its own part."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.checkpoint.convert import convert_checkpoint
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
def checkpoint(tmp_path_factory):
    """In bfloat16, and read as float32: saving it again narrows what it read."""
    folder = tmp_path_factory.mktemp("saved") / "one"
    LanguageModel.random(CONFIG, Policy.of("bfloat16"), seed=5).save(folder)
    return folder


@pytest.fixture(scope="module")
def one(checkpoint):
    return dsv4_jax.load(checkpoint, dtype="float32")


LAST_EXPERT = f"layers.0.ffn.experts.{CONFIG.n_routed_experts - 1}.w2.weight"
"""Of a device of process 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(checkpoint, folder / "bad")
    with open_checkpoint(folder / "bad") as files:
        info = files.tensors[LAST_EXPERT]
    with open(info.path, "r+b") as file:
        file.seek(info.start)
        file.write(np.array(np.nan, ml_dtypes.bfloat16).tobytes())
    (folder / "taken").mkdir()
    (folder / "taken" / "something").touch()
    return folder


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


def test_what_one_refuses_all_refuse(found, folder):
    for each in found:
        refused, unread, taken, full = each["refused"]
        assert refused == ["ProblemsError", "process 1: no such file"]
        assert len(unread) == 2 and unread[1].startswith("process 1: ") and "nowhere" in unread[1]
        assert len(taken) == 2 and "process 0: " in taken[1] and "is not empty" in taken[1]
        assert len(full) == 2 and full[1].startswith("process 0: ") and full[1].endswith("no space left")
    assert [path.name for path in (folder / "taken").iterdir()] == ["something"]
    assert not (folder / "full").exists()


def test_saved_together_is_saved_by_one(found, folder, one, tmp_path):
    """Experts lie in one process each, the embedding in parts in both; both wrote about half."""
    one.save(tmp_path / "alone")
    with open_checkpoint(tmp_path / "alone") as wanted, open_checkpoint(folder / "saved") as got:
        assert list(wanted.tensors) and set(got.tensors) == set(wanted.tensors)
        assert got.warnings == []
        assert {got.read(name).dtype.name for name in got.tensors} == {"bfloat16", "float32"}
        for name in wanted.tensors:
            assert got.read(name).dtype == wanted.read(name).dtype, name
            assert got.read(name).tobytes() == wanted.read(name).tobytes(), name
    for path in (tmp_path / "alone").iterdir():
        if path.suffix == ".json":
            assert (folder / "saved" / path.name).read_bytes() == path.read_bytes()
    own = [{name for name in each["created"] if name.endswith(".safetensors")} for each in found]
    there = {path.name for path in (folder / "saved").iterdir()}
    assert not own[0] & own[1] and own[0] | own[1] == {
        name for name in there if ".safetensors" in name and "index" not in name
    }
    assert [name for name in found[1]["created"] if name not in own[1]] == []
    sizes = [sum((folder / "saved" / name).stat().st_size for name in names) for names in own]
    assert min(len(names) for names in own) > 1 and max(sizes) < 1.3 * min(sizes)
    assert there == set(found[0]["created"]) | own[1]


def test_verified_and_converted_together(found, folder, checkpoint, tmp_path):
    """What one process finds in its part, both say; and the numbers of the files are those of one process."""
    for each in found:
        sound, (problem,) = each["verified"]
        assert sound == [] and f"{LAST_EXPERT}: 1 of" in problem
    convert_checkpoint(checkpoint, tmp_path / "alone", to="float32")
    with open_checkpoint(tmp_path / "alone") as wanted, open_checkpoint(folder / "converted") as got:
        assert set(got.tensors) == set(wanted.tensors)
        for name in wanted.tensors:
            assert got.read(name).dtype == wanted.read(name).dtype, name
            assert got.read(name).tobytes() == wanted.read(name).tobytes(), name


def test_a_training_step(ended, folder, one, checkpoint):
    """Adam's first step is the learning rate times the gradient's sign: compared where that is no chance."""
    before = model_process.named(one.parameters)
    wanted = model_process.trained(dsv4_jax.load(checkpoint, dtype="float32"))
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
