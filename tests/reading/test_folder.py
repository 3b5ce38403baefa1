"""One rule for every file of a checkpoint folder: regular, inside, size-capped and unchanged."""

import json
import os
from pathlib import Path

import pytest

from dsv4_jax.checkpoint.convert import convert_checkpoint
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.manifest import Options, open_manifest
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.config.io import read_config, read_config_file
from dsv4_jax.errors import CheckpointError, ConfigError
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.reading.folder import Folder
from tests.checkpoint import synthetic

FLOAT32 = Policy.of("float32")
SECRET = b'{"token": "secret"}'


@pytest.fixture
def base(tmp_path: Path) -> Path:
    synthetic.write_checkpoint(tmp_path / "base", synthetic.smallest_config())
    return tmp_path / "base"


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("target", ["private.json", "/proc/self/environ"])
def test_no_side_file_is_read_through_a_link_out_of_the_folder(base: Path, name: str, target: str) -> None:
    (base.parent / "private.json").write_bytes(SECRET)
    (base / name).symlink_to(base.parent / target)
    (problem,) = verify_checkpoint(base).problems
    assert problem.startswith(f"{name}: is a link that leaves the directory") and "allow_links=" in problem
    with pytest.raises(CheckpointError, match=f"{name}: is a link that leaves the directory"):
        load_checkpoint(base, FLOAT32)
    with pytest.raises(CheckpointError, match=f"{name}: is a link that leaves the directory"):
        convert_checkpoint(base, base.parent / "copy")
    assert not (base.parent / "copy").exists()


def test_config_through_a_link_out_of_the_folder_is_refused(base: Path) -> None:
    (base / "config.json").rename(base.parent / "other.json")
    (base / "config.json").symlink_to("../other.json")
    with pytest.raises(ConfigError, match="is a link that leaves the directory"):
        read_config(base)
    assert read_config(base / "config.json")  # named by the user: where it leads is the user's choice
    assert read_config(base, allow_links=base.parent)


def test_links_to_another_disk_can_be_allowed(base: Path) -> None:
    disk = base.parent / "disk"
    disk.mkdir()
    (base / "model.safetensors").rename(disk / "blob")
    (base / "model.safetensors").symlink_to(disk / "blob")
    with pytest.raises(CheckpointError, match=f"allow_links='{disk}' .--allow-links {disk}. accepts"):
        load_checkpoint(base, FLOAT32)
    assert load_checkpoint(base, FLOAT32, allow_links=disk).parameters
    assert verify_checkpoint(base, allow_links=disk).sound
    assert convert_checkpoint(base, base.parent / "copy", allow_links=disk) == []
    with pytest.raises(CheckpointError, match="is a link that leaves the directory"):
        load_checkpoint(base, FLOAT32, allow_links=base.parent / "base")
    with pytest.raises(CheckpointError, match="allow_links='.*nowhere' is no folder"):
        load_checkpoint(base, FLOAT32, allow_links=base.parent / "nowhere")


def test_every_file_of_a_hub_cache_may_be_a_link_to_its_blobs(base: Path) -> None:
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    repository = base.parent / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs"):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert set(load_checkpoint(snapshot, FLOAT32).side_files) == {"generation_config.json"}
    assert read_config(snapshot) == synthetic.smallest_config()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_named_pipe_is_refused_without_waiting(base: Path, name: str) -> None:
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    with pytest.raises(CheckpointError, match=f"{name}: is not a regular file"):
        load_checkpoint(base, FLOAT32)


def test_a_bare_config_file_goes_by_the_same_rule(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)
    for name, said in (("pipe", "regular file"), ("zero", "regular file"), ("huge", "at most 16777216")):
        with pytest.raises(ConfigError, match=said):
            read_config_file(tmp_path / f"{name}.json")


def test_a_byte_order_mark_is_accepted_everywhere(base: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (base / "config.json").write_bytes(mark + (base / "config.json").read_bytes())
    (base / "generation_config.json").write_bytes(mark + b'{"eos_token_id": null}')
    assert load_checkpoint(base, FLOAT32).side_files == {"generation_config.json": b'{"eos_token_id": null}'}


def replace_file(base: Path) -> None:
    text = (base / "config.json").read_text()
    (base / "new").write_text(text)
    os.replace(base / "new", base / "config.json")


def replace_folder(base: Path) -> None:
    base.rename(base.parent / "former")
    synthetic.write_checkpoint(base, synthetic.smallest_config(), seed=1)


def add_generation_config(base: Path) -> None:
    (base / "generation_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace_file, "config.json: was replaced"),
        (replace_folder, "was replaced by another folder"),
        (add_generation_config, "generation_config.json: appeared"),
    ],
)
def test_a_change_between_config_and_weights_is_noticed(base: Path, change, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        with open_manifest(base, Options()):
            change(base)


def test_the_folder_is_replaced_between_config_and_weights(base: Path, monkeypatch) -> None:
    """The other model has the same shapes, so that only its identity tells."""
    from dsv4_jax.checkpoint import manifest

    real = manifest.open_tensors

    def replaced_first(folder: Folder, **options: bool):
        replace_folder(base)
        return real(folder, **options)

    monkeypatch.setattr(manifest, "open_tensors", replaced_first)
    with pytest.raises(CheckpointError, match="was replaced by another folder while it was read"):
        load_checkpoint(base, FLOAT32)


def test_names_are_plain(base: Path) -> None:
    with Folder(base) as folder:
        for name in ("../base/config.json", "/etc/passwd", ".hidden", "a/b", ""):
            with pytest.raises(CheckpointError, match="is not a plain file name"):
                folder.read(name, 100)
        assert json.loads(folder.read("config.json", 10_000))["model_type"] == "deepseek_v4"
