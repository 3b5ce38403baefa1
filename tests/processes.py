"""Several processes of one program on this machine, four CPU devices each, which never outlive their test."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
COUNT = 2
DEVICES = 4
"""Of each process."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is left of a process."""

    returncode: int
    out: str
    err: str
    seconds: float
    """From the start of all of them to its end."""


def free_port() -> int:
    """A port that nobody listens on. Somebody else may take it before it is used: then the test fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(module: str, *arguments: str, timeout: float, folder: pathlib.Path) -> list[Ended]:
    """Runs `python -m module PORT ID ARGUMENTS` for each ID in 0 .. COUNT - 1, until all have ended.

    Args:
        module: reads its port and its number from the command line.
        arguments: further ones.
        timeout: seconds after which those that still run are killed, and the test fails.
        folder: for what they print.
    """
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    start = time.monotonic()
    running: list[subprocess.Popen] = []
    ended: dict[int, float] = {}
    try:
        for number in range(COUNT):
            with open(folder / f"out{number}", "wb") as out, open(folder / f"err{number}", "wb") as err:
                line = [sys.executable, "-m", module, str(port), str(number), *arguments]
                running.append(subprocess.Popen(line, stdout=out, stderr=err, env=environment, cwd=ROOT))
        while len(ended) < COUNT and time.monotonic() < start + timeout:
            time.sleep(0.05)
            for number, process in enumerate(running):
                if number not in ended and process.poll() is not None:
                    ended[number] = time.monotonic() - start
    finally:
        for process in running:
            process.kill()  # nothing happens to one that has ended
            process.wait()
    texts = [
        [(folder / f"{name}{n}").read_text("utf8", "replace") for name in ("out", "err")]
        for n in range(COUNT)
    ]
    if len(ended) < COUNT:
        raise AssertionError(f"after {timeout} s only {sorted(ended)} had ended: {texts}")
    return [Ended(running[n].returncode, *texts[n], ended[n]) for n in range(COUNT)]
