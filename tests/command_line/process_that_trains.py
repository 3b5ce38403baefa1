"""One of two processes that train together: a run of one process goes on, and one begins."""

import pathlib
import sys

from dsv4_jax.command_line import train
from dsv4_jax.command_line.main import run

if __name__ == "__main__":
    port, number, folder = sys.argv[1:]
    hosts = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", number]
    path = str(pathlib.Path(folder, "resumed", "tiny.py"))
    code = run(["train", path, "--resume", "--no-compilation-cache", *hosts])
    train.train(train.configured(str(pathlib.Path(folder, "begun", "tiny.py"))))  # they have joined
    sys.exit(code)
