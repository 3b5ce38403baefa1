"""One of two processes of a command that was started with other options in each."""

import sys

from dsv4_jax.command_line.main import run

if __name__ == "__main__":
    port, number, *rest = sys.argv[1:]
    hosts = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", number]
    own = ["--seed", number, "--top-p", f"0.{5 + int(number)}"] if rest == ["different"] else []
    sys.exit(run(["generate", "nowhere", "--ids", "1", "--no-compilation-cache", *own, *hosts]))
