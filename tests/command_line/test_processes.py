"""Commands of several processes: refusals before they join, and after."""

import os
import subprocess
import sys

import pytest

from dsv4_jax.command_line.main import run
from tests import processes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--coordinator", "host", "--process-id", "-3"],
            ["without num_processes", "not host:port", "at least 0"],
        ),
        (["--coordinator", "auto", "--num-processes", "2"], ["asks the cluster for it"]),
        (["--num-processes", "2"], ["num_processes without coordinator and process_id"]),
    ],
)
def test_options_are_refused_before_anything_is_loaded(options, said, capsys):
    assert run(["generate", "nowhere", "--ids", "1", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dsv4: cannot join the processes: ")
    for part in said:
        assert part in captured.err


def test_no_cluster_to_ask():
    line = [sys.executable, "-m", "dsv4_jax", "generate", "nowhere", "--ids", "1", "--coordinator", "auto"]
    clusters = ("SLURM_", "OMPI_", "TPU_", "JAX_COORDINATOR")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=60, cwd=processes.ROOT, env=environment
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "JAX finds no cluster that names the others, so coordinator must be host:port" in done.stderr


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("different", ["sampling: process 1 has Sampling(", "top_p=0.6, seed=1", "top_p=0.5, seed=0"]),
        ("same", ["2 processes and no mesh: each would compute everything by itself"]),
    ],
)
def test_processes_that_cannot_go_on_together(case, said, tmp_path):
    for ended in processes.run("tests.command_line.process_with_options", case, timeout=90, folder=tmp_path):
        assert ended.returncode == 2 and ended.out == "", ended.err
        assert "note: waiting for the other processes at 127.0.0.1:" in ended.err
        assert "dsv4: cannot go on together: 1 problem" in ended.err
        for part in said:
            assert part in ended.err
