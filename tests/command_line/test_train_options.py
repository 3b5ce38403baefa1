"""Run files, presets, what the command line changes, dry runs, and refusals before any work."""

import dataclasses
import json
import pathlib

import jax
import pytest

from dsv4_jax.command_line import main as cli
from dsv4_jax.command_line import train
from dsv4_jax.command_line.dry_run import described
from dsv4_jax.config import v4_flash
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inspection.training_cost import flops_per_token, training_bytes
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import parameters
from dsv4_jax.training import presets
from dsv4_jax.training.documents import Reading
from dsv4_jax.training.keeping import AnotherRunError
from dsv4_jax.training.lora import Lora, lora_parameters
from dsv4_jax.training.run_config import Checkpoints, RunConfig
from dsv4_jax.training.saved_states import as_plain
from dsv4_jax.training.sources import ChatFiles, StandardLibrary, TextFiles
from tests.training.tiny_run import CONFIG, config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("what", [*train.PRESETS, str(ROOT / "experiments" / "train_stdlib.py")])
def test_every_preset_and_the_example_are_runs(what):
    run = train.configured(what)
    assert isinstance(run, RunConfig) and run.num_steps >= 12


def test_the_command_line_changes_a_run():
    run = train.configured(
        "stdlib", steps=7, out=pathlib.Path("x"), mesh="fsdp=2", seed=4, plot=True, tensorboard=False,
        profile_steps=(2, 3),
    )  # fmt: skip
    assert (run.num_steps, run.out, run.mesh, run.seed) == (7, pathlib.Path("x"), "fsdp=2", 4)
    assert run.logging.plot and not run.logging.tensorboard and run.logging.profile_steps == (2, 3)
    assert train.configured("stdlib", steps=None, seed=None, plot=False) == train.PRESETS["stdlib"]()


BAD_FILES = {
    "run = 3": "no function run()",
    "def run(): return 3": "returned int, not a RunConfig",
    "def run(x): return x": "run(): TypeError: run() missing 1 required positional argument",
    "def run(): return 1 / 0": "run(): ZeroDivisionError: division by zero",
    "1 / 0": "ZeroDivisionError",
    "def run(": "SyntaxError",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_file_that_is_no_run_is_refused(tmp_path, text, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert cli.run(["train", str(path), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert BAD_FILES[text] in said and str(path) in said


def test_what_is_neither_a_file_nor_a_preset_is_refused(tmp_path, capsys):
    for what in ("nothing", str(tmp_path / "none.py"), str(tmp_path)):
        assert cli.run(["train", what]) == 2
        assert "presets stdlib, smallest, flash, sft, lora" in capsys.readouterr().err
    assert cli.run(["train", "stdlib", "--steps", "0"]) == 2
    assert "steps=0" in capsys.readouterr().err
    assert cli.run(["train", "stdlib", "--mesh", "foo=2", "--dry-run"]) == 2
    assert "no axis 'foo'" in capsys.readouterr().err


def test_a_file_of_the_name_of_a_preset_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("smallest").mkdir()
    assert train.configured("smallest") == train.PRESETS["smallest"]()


def test_a_dry_run_shows_all_of_a_run(capsys):
    assert cli.run(["train", "flash", "--mesh", "fsdp=32,expert=8", "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "284.33B parameters, 13.27B active", "mesh: fsdp=32,expert=8; 31.", "rule, no gradient",
        "Muon, decayed", "moments",
        "together, at least", "16,384", "dense", "2000 steps up to 0.00027",
        "cosine decay to 2.7e-05", "MTP 0.3, from step", "every 1000 steps, 3 are kept", "StandardLibrary",
    ):  # fmt: skip
        assert part in shown, part


def test_a_base_chats_and_lora_from_the_command_line():
    changes = {"model": pathlib.Path("base"), "chats": ("a.jsonl", "b.jsonl"), "lora_rank": 3}
    run = train.configured("sft", **changes)
    assert run.model == pathlib.Path("base") and run.source == ChatFiles(("a.jsonl", "b.jsonl"))
    assert run.lora == Lora(3, 6.0, presets.LORA_TARGETS) and run.losses.bias_speed == 0
    assert train.configured("sft").lora is None and train.configured("sft").losses.bias_speed == 0
    assert train.configured("lora", lora_rank=2).lora.scale == train.configured("lora").lora.scale
    with pytest.raises(ProblemsError, match="rank=0"):
        train.configured("sft", lora_rank=0)


def test_a_dry_run_of_lora_tells_what_trains_and_what_is_frozen(tmp_path, capsys):
    """The numbers that it tells are those of the arrays that a run makes."""
    base = tmp_path / "base"
    LanguageModel.random(CONFIG, Policy.of("float32")).save(base)
    assert cli.run(["train", "lora", "--base", str(base), "--lora-rank", "3", "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    small = jax.tree.leaves(lora_parameters(CONFIG, Lora(3, 6.0, presets.LORA_TARGETS), 0))
    frozen = sum(parameter.size for parameter in parameters(CONFIG).values())
    assert f"trained: {sum(leaf.size for leaf in small):,} numbers" in shown
    assert f"frozen: the model itself, {frozen:,} numbers" in shown
    for part in ("LoRA of rank 3, times 2", "attn/wq_a", "ffn/experts/down", "bias speed 0", "chats.jsonl"):
        assert part in shown, part


def test_a_source_is_told_by_its_files_and_unusual_settings():
    assert described(StandardLibrary()) == "StandardLibrary"
    assert described(ChatFiles(("a.jsonl", "b.jsonl"))) == "ChatFiles: a.jsonl, b.jsonl"
    skipping = TextFiles(("*.txt",), Reading(bad_records="skip"))
    assert described(skipping) == "TextFiles: *.txt; reading Reading: bad_records skip"


def test_a_dry_run_trains_nothing_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "smallest", "--dry-run"]) == 0
    assert "AdamW, decayed" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_folders_that_cannot_take_a_run_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "ours" / "checkpoints").mkdir(parents=True)
    (tmp_path / "ours" / "run.json").write_text("{}")
    for out, said in {
        "file": "cannot be written",
        "file/below": "cannot be written",
        "a\0b": "cannot be written",
        "full": "is not empty and holds no run",
        "ours": "holds a run; --resume goes on with it",
    }.items():
        with pytest.raises(ProblemsError, match=said):
            train.prepare_folder(tmp_path / out, resume=False)
    train.prepare_folder(tmp_path / "ours", resume=True)
    train.prepare_folder(tmp_path / "new" / "er", resume=True)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_is_a_refusal(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    assert cli.run(["train", "smallest", "--out", str(out), "--no-compilation-cache"]) == 2
    assert f"out={out}: cannot be written" in capsys.readouterr().err


def test_data_that_is_not_there_is_said_before_a_model_is_made(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    missing = [str(tmp_path / "empty" / "*.jsonl"), str(tmp_path / "none.jsonl")]
    line = ["train", "smallest", "--chats", *missing, "--out", str(tmp_path / "out")]
    assert cli.run([*line, "--dry-run"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for each in missing:
        assert "".join(f"NOT THERE YET: {each!r} names no file".split()) in shown
    assert cli.run([*line, "--no-compilation-cache"]) == 2
    assert capsys.readouterr().err == (
        "dsv4: cannot read the training data: 2 problems\n"
        f"  - {missing[0]!r} names no file\n  - {missing[1]!r} names no file\n"
    )


def test_what_changed_since_the_last_session_is_told_and_a_refused_one_leaves_no_trace(
    tmp_path, capsys, monkeypatch
):
    before = config(tmp_path / "out")
    before.out.mkdir()
    (before.out / "run.json").write_text(json.dumps(as_plain(before)))
    after = dataclasses.replace(before, seed=3, checkpoints=Checkpoints(every=7, keep=2))

    def refusing(*given, **options):
        assert json.loads((after.out / "run.json").read_text()) == as_plain(after)
        raise AnotherRunError("the saved state belongs to another run", ["seed is 3 now, and was 0"])

    monkeypatch.setattr(train, "run", refusing)
    with pytest.raises(ProblemsError, match="another run"):
        train.train(after, resume=True)
    said = capsys.readouterr().err
    assert "changed since the last session: seed is 3 now, and was 0\n" in said
    assert "changed since the last session: checkpoints.every is 7 now, and was 3\n" in said
    assert said.count("changed since the last session: ") == 2
    assert json.loads((after.out / "run.json").read_text()) == as_plain(before)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    run = config(tmp_path / "out")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ProblemsError, match="bad.json"):
        train.tokenizer_of(dataclasses.replace(run, tokenizer=bad), 300)
    with pytest.raises(ProblemsError, match="none.json"):
        train.tokenizer_of(dataclasses.replace(run, tokenizer=tmp_path / "none.json"), 300)


def test_flops_of_the_released_model():
    """6 FLOPs for each of 13B active parameters, and attention that hardly grows with the length."""
    short, long = (flops_per_token(v4_flash(), length) for length in (4096, 1048576))
    assert 6 * 13.2e9 < short < 6 * 13.2e9 * 1.4
    assert short < long < 4 * short
    assert flops_per_token(v4_flash(), 65536, dense=True) > flops_per_token(v4_flash(), 65536)


def test_bytes_count_every_parameter():
    elements = sum(parameter.size for parameter in parameters(CONFIG).values())
    one = training_bytes(CONFIG, Policy.of("float32"), 2.0, "data=1", 8, 16)
    spread = training_bytes(CONFIG, Policy.of("float32"), 2.0, "fsdp=8", 8, 16)
    assert one.parameters == 4 * elements
    assert one.moments == 2 * one.parameters and one.total > 4 * one.parameters
    assert spread.parameters < one.parameters / 3 and spread.streams == one.streams / 8
