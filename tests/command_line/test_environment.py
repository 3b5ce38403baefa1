"""What the surroundings of a command bring: settings of JAX, a home, descriptors, links, presets."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from dsv4_jax import config
from dsv4_jax.command_line import compilation_cache
from dsv4_jax.command_line import main as cli
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments: str, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess:
    line = ["bash", "-c", shell, "bash", sys.executable, "-m", "dsv4_jax", *arguments]
    given = {**os.environ, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(line, capture_output=True, text=True, env=given, timeout=120, cwd="/")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "base"
    LanguageModel.random(config.tiny(4), Policy.of("float32")).save(folder)
    return folder


@pytest.mark.parametrize("arguments", [["inspect", "flash"], ["generate", "x", "--ids", "1"], ["doctor"]])
def test_a_setting_that_jax_refuses(arguments, tmp_path):
    done = command(*arguments, JAX_ENABLE_X64="maybe", HOME=str(tmp_path))
    assert done.returncode == 2 and "JAX refuses its settings" in done.stderr and "maybe" in done.stderr
    assert "Traceback" not in done.stderr and "fault of this program" not in done.stderr
    assert bool(done.stdout) == (arguments == ["doctor"])


def test_a_platform_without_a_plugin_is_explained():
    import importlib.util

    if importlib.util.find_spec("jax_cuda12_plugin") or importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("this installation has CUDA")
    done = command("doctor", JAX_PLATFORMS="cuda")
    assert done.returncode == 2
    assert "this installation supports no such platform" in done.stderr
    assert "AssertionError" not in done.stderr


def test_a_home_that_is_no_absolute_path(monkeypatch):
    monkeypatch.setenv("HOME", "somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(compilation_cache.NoCache, match="'somewhere' is no absolute path"):
        compilation_cache.default_directory()


def test_doctor_says_when_programs_cannot_be_kept(monkeypatch, tmp_path):
    from dsv4_jax.command_line import doctor

    (tmp_path / "dsv4_jax").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = doctor.diagnose()
    assert any("programs are not kept" in line and "cannot be written" in line for line in found.lines())
    assert found.free_disk_bytes is None and not found.problems


def test_a_full_disk_is_named(base):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = command("verify", str(base), "--json", shell='"$@" > /dev/full', PYTHONUNBUFFERED="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "dsv4: cannot print: 1 problem",
        "  - standard output: No space left on device",
    ]


def test_files_never_take_the_numbers_of_closed_streams():
    """Libraries print to descriptor 2 whatever lies behind it, which must not become a checkpoint's file."""
    script = (
        "import os, sys\nfrom dsv4_jax.command_line import standard_streams\n"
        "with standard_streams.prepared():\n    print(os.open('/dev/zero', os.O_RDONLY) > 2)\n"
    )
    line = ["bash", "-c", '"$@" <&- 2>&-', "bash", sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n")


def test_a_path_named_like_a_released_model_goes_first(capsys, tmp_path, monkeypatch, base):
    shutil.copytree(base, tmp_path / "flash")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["inspect", "flash", "--json"]) == 0
    out, err = capsys.readouterr()
    assert '"hidden_size": 64' in out and "the path 'flash', not the released model" in err
    assert cli.run(["inspect", "pro", "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_links_to_another_disk_are_accepted_where_the_user_says_so(capsys, tmp_path, base):
    disk, folder = tmp_path / "disk", tmp_path / "linked"
    shutil.copytree(base, disk)
    folder.mkdir()
    for path in disk.iterdir():
        (folder / path.name).symlink_to(path)
    commands = [
        ["inspect", str(folder)],
        ["verify", str(folder)],
        ["convert", str(folder), str(tmp_path / "copy")],
        ["generate", str(folder), "--ids", "1", "--max-new-tokens", "0", "--no-compilation-cache"],
    ]
    for arguments in commands:
        assert cli.run(arguments) == 2
        assert "--allow-links" in capsys.readouterr().err
        assert cli.run([*arguments, "--allow-links", str(disk)]) == 0, capsys.readouterr().err
        capsys.readouterr()


def test_ids_need_no_tokenizer(capsys, tmp_path, base):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    request = ["--max-new-tokens", "0", "--no-compilation-cache"]
    assert cli.run(["generate", str(folder), "--ids", "1", *request]) == 0, capsys.readouterr().err
    assert cli.run(["generate", str(folder), "text", *request]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
