"""The commands on a real small checkpoint, from the weights on disk to the text on stdout."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from dsv4_jax import loading
from dsv4_jax.checkpoint import storage
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.command_line import main as cli
from dsv4_jax.config import io as config_io
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.blocks import Mxfp4
from pallas_kernels.formats.entries import Fp8Entries
from pallas_kernels.formats.index_keys import Fp8Keys
from tests.checkpoint import synthetic
from tests.models import all_kinds

CONFIG = all_kinds(vocab_size=256 + 2, bos_token_id=256, eos_token_id=257)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<bos>", "<eos>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """Random weights in the official layout, with a tokenizer."""
    model = LanguageModel.random(CONFIG, Policy.of("float32"), seed=1)
    model.tokenizer = tokenizer
    directory = tmp_path_factory.mktemp("model") / "checkpoint"
    model.save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def quantised_checkpoint(tmp_path_factory, tokenizer):
    """The same architecture as a release stores it: FP4 experts, FP8 linears."""
    directory = tmp_path_factory.mktemp("quantised")
    synthetic.write_checkpoint(directory, CONFIG, storage.PREVIEW)
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def run(capsys, *arguments):
    code = cli.run(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def generate(capsys, checkpoint, *arguments):
    fixed = ("--dtype", "float32", "--no-compilation-cache", "--max-new-tokens", "5")
    return run(capsys, "generate", checkpoint, *arguments, *fixed)


def test_a_seed_gives_the_same_ids_again_and_another_seed_others(capsys, checkpoint):
    ids = ("--ids", "256", "7", "8", "9")
    first = generate(capsys, checkpoint, *ids, "--seed", "3")
    assert 1 <= len(first.split()) <= 5 and all(0 <= int(i) < 258 for i in first.split())
    assert generate(capsys, checkpoint, *ids, "--seed", "3") == first
    others = {generate(capsys, checkpoint, *ids, "--seed", str(seed)) for seed in range(4)}
    assert len(others) > 1


def test_streamed_text_is_the_text_of_the_record(capsys, checkpoint):
    text = generate(capsys, checkpoint, "héllo", "--temperature", "0")
    record = json.loads(generate(capsys, checkpoint, "héllo", "--temperature", "0", "--json"))
    assert record["text"] + "\n" == text and record["text"]


@pytest.mark.parametrize(
    "stored", [pytest.param("checkpoint", marks=pytest.mark.slow), "quantised_checkpoint"]
)
@pytest.mark.parametrize(
    "cache", [*(pytest.param(c, marks=pytest.mark.slow) for c in CACHE_FORMATS[:-1]), CACHE_FORMATS[-1]]
)
def test_every_cache_format_generates_text(capsys, monkeypatch, request, stored, cache):
    """From plain and from quantised weights; past a whole CSA block, so that entries and keys are read."""
    made = []
    new_cache = LanguageModel.new_cache
    monkeypatch.setattr(LanguageModel, "new_cache", lambda *sizes: made.append(new_cache(*sizes)) or made[-1])
    directory = request.getfixturevalue(stored)
    greedy = ("--temperature", "0", "--cache", cache, "--json")
    record = json.loads(generate(capsys, directory, "import os, sys", *greedy))
    assert record["text"] and record["prompt"] == "import os, sys"
    csa = made[0].layers[1][0]
    assert isinstance(csa.compressor.entries, Fp8Entries) == (cache != "plain")
    keys = {"plain": jax.Array, "fp8+fp8": Fp8Keys, "fp8+mxfp4": Mxfp4}[cache]
    assert isinstance(csa.indexer.entries, keys)


def test_drafts_change_nothing_but_the_number_of_steps(capsys, checkpoint):
    greedy = ("--ids", "7", "8", "7", "8", "--temperature", "0")
    plain = generate(capsys, checkpoint, *greedy)
    fixed = ("--dtype", "float32", "--no-compilation-cache", "--max-new-tokens", "5")
    assert cli.run(["generate", checkpoint, *greedy, *fixed, "--draft", "mtp", "--json"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert " ".join(map(str, record["ids"])) + "\n" == plain
    assert len(record["accepted"]) == len(record["drafted"]) and set(record["drafted"]) <= {0, 1}
    assert "tokens a step; by position: " in shown.err and record["sampling"]["draft"] == "mtp"
    assert cli.run(["generate", checkpoint, *greedy, *fixed, "--draft", "dspark"]) == 2
    assert "this model has no DSpark draft head" in capsys.readouterr().err


def test_a_cache_that_contradicts_the_numerics_is_refused(capsys, checkpoint):
    arguments = ("--numerics", "qat", "--cache", "fp8+fp8", "--no-compilation-cache")
    assert cli.run(["generate", checkpoint, "text", *arguments]) == 2
    assert "cache='fp8+fp8' keeps FP8 keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [("--ids", "999"), ("text", "--top-p", "0"), ("--ids", "1", "--temperature", "-1")]
)
def test_bad_prompts_and_sampling_are_refused(capsys, checkpoint, wrong):
    assert cli.run(["generate", checkpoint, *wrong, "--no-compilation-cache"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dsv4: cannot generate")


def test_inspect_verify_convert(capsys, checkpoint, tmp_path):
    counts = json.loads(run(capsys, "inspect", checkpoint, "--json"))["parameters"]
    assert counts["total_with_mtp"] > counts["total"] > counts["active"]
    assert "sound: " in run(capsys, "verify", checkpoint)
    target = tmp_path / "native"
    run(capsys, "convert", checkpoint, str(target), "--layout", "transformers")
    assert config_io.read_config(target).attention_kinds == CONFIG.attention_kinds
    assert json.loads(run(capsys, "verify", str(target), "--json"))["layout"] == "transformers"
    ids = ("--ids", "256", "7", "--temperature", "0")
    assert generate(capsys, str(target), *ids) == generate(capsys, checkpoint, *ids)


def test_verify_on_a_mesh(capsys, quantised_checkpoint):
    """All is read as four devices would hold it, and what they would hold is what the model of `load` has."""
    whole = json.loads(run(capsys, "verify", quantised_checkpoint, "--json"))
    spread = json.loads(run(capsys, "verify", quantised_checkpoint, "--mesh", "expert=2,tensor=2", "--json"))
    held = spread.pop("bytes_a_device")
    assert spread == whole
    lm = loading.load(quantised_checkpoint, mesh="expert=2,tensor=2")
    first = [shard for leaf in jax.tree.leaves(lm.parameters) for shard in leaf.addressable_shards[:1]]
    assert held == sum(shard.data.nbytes for shard in first)
    assert f"{held:,} bytes" in run(capsys, "verify", quantised_checkpoint, "--mesh", "expert=2,tensor=2")


def test_verify_on_a_mesh_looks_at_every_value(capsys, tmp_path, checkpoint):
    """A NaN in one expert of one device."""
    directory = shutil.copytree(checkpoint, tmp_path / "bad")
    (weights,) = directory.glob("*.safetensors")
    with open_checkpoint(directory) as files:
        name = next(name for name in files.tensors if "experts.3.w2" in name)
        info = files.tensors[name]
    with open(weights, "r+b") as file:
        file.seek(info.start + info.num_bytes // 2)
        file.write(np.float32(np.nan).tobytes())
    code = cli.run(["verify", str(directory), "--mesh", "expert=4,tensor=2"])
    assert code == 2 and f"{name}: 1 of" in capsys.readouterr().err
    assert cli.run(["verify", checkpoint, "--mesh", "expert=3"]) == 2
    assert "E = 8 cannot be split 3 ways" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--to", "bfloat16"), ("--layout", "transformers")])
def test_convert_on_a_mesh_writes_the_same_files(capsys, tmp_path, quantised_checkpoint, options):
    run(capsys, "convert", quantised_checkpoint, str(tmp_path / "one"), *options)
    run(capsys, "convert", quantised_checkpoint, str(tmp_path / "spread"), *options, "--mesh", "expert=4")
    one, spread = (
        {file.name: file.read_bytes() for file in (tmp_path / each).iterdir()} for each in ("one", "spread")
    )
    assert one == spread and len(one) >= 3


def test_convert_on_a_mesh_refuses_before_it_reads(capsys, tmp_path, checkpoint):
    (tmp_path / "taken").touch()
    code = cli.run(["convert", checkpoint, str(tmp_path), "--mesh", "expert=4"])
    assert code == 2 and "cannot convert to" in capsys.readouterr().err
    where = str(tmp_path / "none")
    code = cli.run(["convert", checkpoint, where, "--to", "fp8", "--layout", "hybrid", "--mesh", "expert=4"])
    assert code == 2 and "cannot hold fp8 weights" in capsys.readouterr().err
