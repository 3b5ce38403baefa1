"""What the README promises exists: its commands, its paths, and what .ci/run takes from it."""

import pathlib
import re
import subprocess
import tomllib

import pytest

from dsv4_jax.command_line import main as cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_commands_are_the_ones_ci_runs():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    marked = re.findall(r"<!-- ci:(\w+) -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert [name for name, _ in marked] == ["quickstart", "tests", "mesh", "train", "serve", "curl"]
    assert [text for _, text in marked] == blocks
    for text in blocks[:2]:
        assert text.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
        assert "-c constraints.txt" in text
    script = (ROOT / ".ci" / "run").read_text()
    assert 'run quickstart " --minutes' in script and all(
        f"\nrun {name}\n" in script for name in ("mesh", "train", "tests")
    )


def test_ci_script_is_sound_bash():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_subcommand_is_listed():
    listed = set(re.findall(r"^\| `dsv4 (\w+)", README, re.MULTILINE))
    assert listed == set(cli.SUBCOMMANDS)


PATHS = re.findall(r"`((?:tests|dsv4_jax|experiments|pallas_kernels|sharding)/[\w./]*)`", README)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_path_exists(path):
    assert (ROOT / path).exists()


def test_constraints_pin_every_dependency():
    constraints = (ROOT / "constraints.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==[\w.]+$", constraints, re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert name.lower().replace("_", "-") in pinned, requirement
