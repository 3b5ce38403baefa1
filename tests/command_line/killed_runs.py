"""`dsv4 train` in processes of its own, which are killed and started again."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, NamedTuple

from dsv4_jax.training.metrics import METRICS_FILE, read_lines

ROOT = pathlib.Path(__file__).parents[2]
RUN_FILE = """
import pathlib
from dsv4_jax.training.run_config import Checkpoints, Stage
from tests.training.tiny_run import config

def run():
    stages, kept = (Stage({steps} - 4, 16, 2), Stage(4, 24, 2)), Checkpoints(every=2, keep=2)
    return config(pathlib.Path(__file__).parent / "out", stages=stages, checkpoints=kept)
"""


class Command(NamedTuple):
    """A process, and the files in which it prints."""

    process: subprocess.Popen
    out: IO[bytes]
    err: IO[bytes]


def run_file(folder: pathlib.Path, steps: int) -> pathlib.Path:
    """A run of so many steps, saved after every second one."""
    path = folder / "tiny.py"
    path.write_text(RUN_FILE.format(steps=steps))
    return path


def command(*arguments: str, cache: pathlib.Path) -> Command:
    """A `dsv4` command; compiled programs are shared below `cache`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    line = [sys.executable, "-m", "dsv4_jax", *arguments]
    printed = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    process = subprocess.Popen(line, env=environment, cwd=ROOT, stdout=printed[0], stderr=printed[1])
    return Command(process, *printed)


def ended(running: Command, seconds: float = 1500) -> tuple[int, str, str]:
    """(code, standard output, standard error) of a process; killed if it takes too long."""
    try:
        running.process.wait(timeout=seconds)
    finally:
        running.process.kill()
        running.process.wait()
        texts = []
        for file in (running.out, running.err):
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
    return running.process.returncode, *texts


def wait_for_steps(running: Command, out: pathlib.Path, more_than: int, seconds: float = 900) -> None:
    """Returns when the run has told of another step, or has ended; before that it notices no signal.

    Raises:
        AssertionError: it has done neither for so long, on a machine that is busy.
    """
    limit = time.monotonic() + seconds
    while running.process.poll() is None and time.monotonic() < limit:
        records = read_lines(out / METRICS_FILE)
        if records and records[-1].get("step", 0) > more_than:
            return
        time.sleep(0.01)
    assert running.process.poll() is not None, f"no step after {more_than} in {seconds} seconds"


def kill(running: Command, out: pathlib.Path, chance: random.Random) -> str:
    """Kills a run that has begun to train, at a random moment or as soon as a state is being written."""
    if chance.random() < 0.5:
        limit = time.monotonic() + 3
        while running.process.poll() is None and time.monotonic() < limit:
            if list((out / "checkpoints").glob("*tmp*")):
                time.sleep(chance.uniform(0, 0.05))
                break
        when = "while a state was being written"
    else:
        time.sleep(chance.uniform(0, 1.5))
        when = "at a random moment"
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGKILL)
    ended(running)
    return when


def trace(out: pathlib.Path) -> list[dict]:
    """The numbers of every step, without times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_lines(out / METRICS_FILE)]
