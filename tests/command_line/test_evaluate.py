"""`dsv4 eval` on a small checkpoint."""

import json
import math

import pytest

from dsv4_jax.command_line import main as cli
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.evaluation import text_score
from dsv4_jax.training.tokenizer import train_tokenizer
from tests.models import compressed_kinds

CONFIG = compressed_kinds(bos_token_id=0, eos_token_id=1)
HAY = "hay and straw and a few stones "


@pytest.fixture(scope="module")
def model():
    model = LanguageModel.random(CONFIG, Policy.of("float32"), seed=1)
    model.tokenizer = train_tokenizer([HAY], 280)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    model.save(folder)
    return folder


def run(capsys, *arguments):
    code = cli.run(["eval", *map(str, arguments), "--dtype", "float32", "--no-compilation-cache"])
    return code, *capsys.readouterr()


def test_text_and_needles_as_json_and_as_a_table(capsys, checkpoint, model, tmp_path):
    for name, times in [("a.txt", 3), ("b.txt", 2), ("c.txt", 50)]:
        (tmp_path / name).write_text(HAY * times)
    arguments = [checkpoint, "--files", f"{tmp_path}/*.txt", "--seq-len", 24, "--batch-size", 2]
    arguments += ["--max-bytes", 6 * len(HAY), "--needles", 96, "--trials", 2]
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    text = result["text"]
    assert text["bytes"] == 5 * len(HAY) and text["seq_len"] == 24  # c.txt does not fit
    score = text_score(model.network, model.parameters, model.tokenizer, [HAY * 3, HAY * 2], 24, 2)
    assert text["tokens"] == score.tokens
    assert math.isclose(text["bits_per_byte"], score.bits_per_byte, rel_tol=1e-5)
    assert math.isclose(text["perplexity"], math.exp(text["nats_per_token"]), rel_tol=1e-6)
    assert [(cell["length"], cell["depth"]) for cell in result["needles"]] == [
        (96, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert all(
        cell["found"] == 0 and cell["nats"] > 1 for cell in result["needles"]
    )  # it never learnt to read
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert f"{text['bits_per_byte']:.3f} bits per byte" in out and "needles found" in out


def test_refusals_are_sentences(capsys, checkpoint, tmp_path):
    code, _, err = run(capsys, checkpoint, "--files", f"{tmp_path}/none.txt")
    assert code == 2 and "names no file" in err
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    code, _, err = run(capsys, checkpoint, "--files", f"{tmp_path}/bad.txt")
    assert code == 2 and "bad.txt: is not UTF-8" in err
    code, _, err = run(capsys, checkpoint, "--max-bytes", 5)
    assert code == 2 and "--max-bytes 5 holds no whole file" in err
    (checkpoint / "tokenizer.json").rename(tmp_path / "kept.json")
    try:
        code, _, err = run(capsys, checkpoint)
    finally:
        (tmp_path / "kept.json").rename(checkpoint / "tokenizer.json")
    assert code == 2 and "no tokenizer.json" in err
