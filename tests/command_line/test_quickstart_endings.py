"""How a quickstart ends badly: targets refused before training, and a result that is never lost."""

import json
import os
import signal

import pytest

import dsv4_jax
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.checkpoint.write import target_problems
from dsv4_jax.command_line import quickstart as quickstart_module
from dsv4_jax.command_line.quickstart import RECORD_FILE, check_arguments
from dsv4_jax.errors import CheckpointError, ProblemsError
from tests.command_line.test_quickstart import SMALL, run


def dangling_link(folder):
    (folder / "out").symlink_to("nowhere")
    return folder / "out"


def below_a_dangling_link(folder):
    return dangling_link(folder) / "below"


def below_a_file(folder):
    (folder / "file").write_text("mine")
    return folder / "file" / "out"


def foreign_weights(folder):
    (folder / RECORD_FILE).write_text("{}")
    (folder / "foreign.safetensors").write_text("mine")
    return folder


def folder_as_weights(folder):
    (folder / RECORD_FILE).write_text("{}")
    (folder / "model.safetensors").mkdir()
    return folder


def with_a_nul(folder):
    return folder / "a\0b"


def with_a_long_name(folder):
    return folder / ("x" * 300)


def something_else(folder):
    (folder / "thesis.txt").write_text("mine")
    return folder


BAD_TARGETS = [
    dangling_link, below_a_dangling_link, below_a_file, foreign_weights, folder_as_weights, with_a_nul,
    with_a_long_name,
    something_else,
]  # fmt: skip


@pytest.mark.parametrize("make", BAD_TARGETS, ids=lambda make: make.__name__)
def test_the_early_check_refuses_what_the_save_would(tmp_path, make):
    out = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ProblemsError, match="cannot take the result"):
        check_arguments(1, out, 0, 0, None)
    model = dsv4_jax.LanguageModel.random(SMALL.config, SMALL.policy)
    with pytest.raises(CheckpointError):
        save_checkpoint(out, SMALL.config, model.parameters, overwrite=make is not something_else)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_file_system_is_noticed_early():
    """/proc takes no files, whoever asks."""
    with pytest.raises(ProblemsError, match="cannot be written"):
        check_arguments(1, quickstart_module.Path("/proc/quickstart"), 0, 0, None)


def test_leftovers_of_a_save_that_was_killed_are_no_obstacle(tmp_path):
    first, replaced = tmp_path / "first", tmp_path / "replaced"
    (first / ".incoming-0123abcd").mkdir(parents=True)
    (first / ".incoming-0123abcd" / "model.safetensors").write_bytes(b"half")
    (replaced / ".replaced-0123abcd").mkdir(parents=True)
    (replaced / ".replaced-0123abcd" / RECORD_FILE).write_text("{}")
    (replaced / "config.json").write_text("{}")
    for out in (first, replaced):
        check_arguments(1, out, 0, 0, None)
        run(out, steps=1, max_new_tokens=0)
        assert dsv4_jax.load(out, dtype="float32").config == SMALL.config
        assert json.loads((out / RECORD_FILE).read_text())["steps_done"] == 1


def test_the_record_appears_with_the_checkpoint(tmp_path, monkeypatch):
    """Killed just after the save: the folder is known as a quickstart's, and another may replace it."""

    def killed(*_):
        raise SystemExit(137)

    monkeypatch.setattr(quickstart_module, "_say_how_it_ended", killed)
    with pytest.raises(SystemExit):
        run(tmp_path / "out", steps=1)
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["steps_done"] == 1
    check_arguments(1, tmp_path / "out", 0, 0, None)


def test_a_result_that_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch):
    def full(place, *arguments, **options):
        if place == tmp_path / "out":
            raise CheckpointError("cannot save", ["no space left"])
        return save_checkpoint(place, *arguments, **options)

    monkeypatch.setattr(quickstart_module, "save_checkpoint", full)
    with pytest.raises(ProblemsError, match="no space left") as refused:
        run(tmp_path / "out", steps=1)
    (kept,) = tmp_path.glob("out-unsaved-*")
    assert str(kept) in str(refused.value)
    assert dsv4_jax.load(kept, dtype="float32").tokenizer is not None


def test_the_last_place_for_a_result_is_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(quickstart_module.tempfile, "tempdir", str(tmp_path / "temporary"))

    def full(place, *arguments, **options):
        if place.parent == tmp_path:
            raise CheckpointError("cannot save", [f"no space left for {place.name}"])
        return save_checkpoint(place, *arguments, **options)

    monkeypatch.setattr(quickstart_module, "save_checkpoint", full)
    with pytest.raises(ProblemsError, match="no space left for out"):
        run(tmp_path / "out", steps=1)
    (kept,) = (tmp_path / "temporary").glob("out-unsaved-*")
    assert dsv4_jax.load(kept, dtype="float32").config == SMALL.config


def test_a_file_size_limit_keeps_the_folder_clean(tmp_path):
    """A full disk by another name: every place refuses, and nothing half written is left."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = dsv4_jax.LanguageModel.random(SMALL.config, SMALL.policy)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(CheckpointError, match="File too large"):
            model.save(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "leaves"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_during_the_save_waits_for_its_end(tmp_path, monkeypatch, number, leaves):
    def interrupted(place, *arguments, **options):
        os.kill(os.getpid(), number)
        return save_checkpoint(place, *arguments, **options)

    monkeypatch.setattr(quickstart_module, "save_checkpoint", interrupted)
    with pytest.raises(leaves) as left:
        run(tmp_path / "out", steps=1)
    if leaves is SystemExit:
        assert left.value.code == 143
    assert dsv4_jax.load(tmp_path / "out", dtype="float32").config == SMALL.config


def test_sigterm_during_training_saves_and_leaves_with_143(tmp_path, monkeypatch):
    advance = quickstart_module.TrainingDisplay.advance
    asked = []

    def terminate(display, loss):
        advance(display, loss)
        if not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(quickstart_module.TrainingDisplay, "advance", terminate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "out", steps=5)
    assert left.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    # The signal comes with the numbers of step 1, when step 2 is running.
    assert (record["ending"], record["steps_done"], len(record["steps"])) == ("terminated", 2, 2)
    assert dsv4_jax.load(tmp_path / "out", dtype="float32").config == SMALL.config


def test_a_training_that_diverged_says_so_and_replaces_nothing(tmp_path, monkeypatch):
    run(tmp_path / "out", steps=1, max_new_tokens=0)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    train = quickstart_module.train

    def diverged(*arguments, **options):
        result = train(*arguments, **options)
        report = result.reports[-1]._replace(loss=float("nan"))
        return quickstart_module.dataclasses.replace(result, reports=(report,))

    monkeypatch.setattr(quickstart_module, "train", diverged)
    with pytest.raises(ProblemsError, match="diverged"):
        run(tmp_path / "out", steps=1)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_target_that_can_be_written_has_no_problems(tmp_path):
    assert target_problems(tmp_path, False) == []
    assert target_problems(tmp_path / "new" / "folder", False) == []
    assert list(tmp_path.iterdir()) == []
