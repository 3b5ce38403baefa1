"""Side files are read once, before the weights, and written from memory."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from dsv4_jax import load
from dsv4_jax.checkpoint import load as loading
from dsv4_jax.checkpoint.convert import convert_checkpoint
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.config.io import read_config
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic

FLOAT32 = Policy.of("float32")
GENERATION = b'{"eos_token_id": [1, 17], "temperature": 0.5, "top_k": null}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7847602\n"


def words(*known: str) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(("?", *known))}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="?"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    synthetic.write_checkpoint(directory, synthetic.smallest_config())
    (directory / "generation_config.json").write_bytes(GENERATION)
    (directory / "tokenizer_config.json").write_bytes(b'{"bos_token": null}')
    # no spelling that the library writes itself
    (directory / "tokenizer.json").write_bytes(json.dumps(json.loads(words("a", "b").to_str())).encode())
    return directory


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "stored_parameters", lambda *_, **__: pytest.fail("weights were read"))


SIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


def side_files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in SIDE if (directory / name).exists()}


def test_what_was_loaded_is_written_from_anywhere(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = side_files(base)
    monkeypatch.chdir(base.parent)
    model = load("base", dtype="float32")
    (base.parent / "elsewhere").mkdir()
    monkeypatch.chdir(base.parent / "elsewhere")
    model.save("copy")
    assert side_files(Path("copy")) == before
    shutil.rmtree(base)
    model.save("after")
    assert side_files(Path("after")) == before


def test_the_tokenizer_in_memory_is_the_one_written(base: Path) -> None:
    model = load(base, dtype="float32")
    model.tokenizer.add_tokens(["c"])  # the loaded object, changed in place
    model.save(base.parent / "changed")
    assert Tokenizer.from_file(str(base.parent / "changed/tokenizer.json")).token_to_id("c") == 3
    model.tokenizer = words("x")
    model.save(base.parent / "replaced")
    assert load(base.parent / "replaced").tokenizer.get_vocab() == {"?": 0, "x": 1}
    model.tokenizer = None
    model.save(base.parent / "none")
    assert side_files(base.parent / "none") == {"generation_config.json": GENERATION}


def test_default_stops_are_the_union_of_both_configs(base: Path) -> None:
    assert load(base).stop_token_ids == (1, 17)
    fields = json.loads((base / "config.json").read_text())
    for eos, expected in (([3, 1], (3, 1, 17)), (None, (1, 17)), (5, (5, 1, 17))):
        (base / "config.json").write_text(json.dumps(fields | {"eos_token_id": eos}))
        model = load(base)
        assert model.stop_token_ids == model._stops(None) == expected
        assert model._stops([2]) == (2,) and model._stops(()) == ()
        model.save(base.parent / "copy", overwrite=True)
        assert json.loads((base.parent / "copy/config.json").read_text())["eos_token_id"] == eos
        assert load(base.parent / "copy").stop_token_ids == expected
    (base / "generation_config.json").unlink()
    (base / "config.json").write_text(json.dumps(fields | {"eos_token_id": None}))
    assert read_config(base).eos_token_id is None and load(base).stop_token_ids == ()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", POINTER, "is a git-LFS pointer"),
        ("tokenizer.json", b'{"version": "1.0", "model": {', "is no tokenizer that can be read"),
        ("tokenizer.json", b"", "is no tokenizer that can be read"),
        ("tokenizer_config.json", POINTER, "is a git-LFS pointer"),
        ("tokenizer_config.json", b"[]", "holds a JSON list, not an object"),
        ("generation_config.json", b'{"eos_token_id": ', "unbalanced brackets"),
        ("generation_config.json", b'{"eos_token_id": [1, 24]}', r"eos_token_id=\(1, 24\) must lie"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id='</s>' must be a token id"),
        ("generation_config.json", b'{"eos_token_id": [1, true]}', "eos_token_id=.1, True. must be"),
        ("generation_config.json", b'{"a": 1, "a": 2}', "'a' appears twice"),
    ],
)
def test_a_bad_side_file_is_refused_before_weights_are_read(
    base: Path, no_weights: None, name: str, content: bytes, said: str
) -> None:
    (base / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
        load_checkpoint(base, FLOAT32)
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
        convert_checkpoint(base, base.parent / "copy")
    found = verify_checkpoint(base)
    assert not found.sound and [problem.partition(":")[0] for problem in found.problems] == [name]


def test_side_files_that_are_too_large(base: Path, no_weights: None) -> None:
    for name, limit in (("tokenizer.json", 2**28), ("generation_config.json", 2**24)):
        with open(base / name, "r+b") as file:
            file.truncate(limit + 1)
        assert f"{name}: has {limit + 1} bytes" in "\n".join(verify_checkpoint(base).problems)


def test_ids_need_no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_bytes(POINTER)
    model = load(base, tokenizer="ignore")
    assert model.tokenizer is None and model.stop_token_ids == (1, 17)
    model.save(base.parent / "copy")
    assert side_files(base.parent / "copy") == {"generation_config.json": GENERATION}
