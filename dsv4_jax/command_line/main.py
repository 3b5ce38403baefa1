"""The `dsv4` command: which function each subcommand is, and what its end means to a shell."""

import sys
from collections.abc import Sequence

import tyro

from dsv4_jax.command_line import standard_streams
from dsv4_jax.command_line.checkpoint_commands import convert, doctor, inspect, verify
from dsv4_jax.command_line.evaluate import evaluate
from dsv4_jax.command_line.model_commands import bench, chat, generate
from dsv4_jax.command_line.plan import plan
from dsv4_jax.command_line.serve import serve
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.command_line.training_commands import quickstart, train
from dsv4_jax.errors import ProblemsError

DESCRIPTION = """\
DeepSeek-V4 in JAX: train a small model, run and check official checkpoints.

CHECKPOINT is a directory, or hf://org/name@revision; with HF_HUB_OFFLINE=1 such an address is
looked up in the hub's local cache.

examples:
  dsv4 quickstart
  dsv4 generate quickstart "def main("
  dsv4 chat quickstart
  dsv4 serve quickstart
  dsv4 train experiments/train_stdlib.py
  dsv4 inspect config.json
  dsv4 plan flash --slice v6e:4x8
"""


SUBCOMMANDS = {
    "quickstart": quickstart,
    "train": train,
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "inspect": inspect,
    "plan": plan,
    "verify": verify,
    "convert": convert,
    "serve": serve,
    "bench": bench,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0; 2 for a refusal, all its reasons on stderr; 130 for Ctrl-C; 141 when nobody
    reads the output; 1 for a fault of this program."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        with standard_streams.prepared():
            tyro.extras.subcommand_cli_from_dict(
                SUBCOMMANDS,
                prog="dsv4",
                description=DESCRIPTION,
                args=list(arguments),
                config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
            )
    except BrokenPipeError:  # `dsv4 ... | head`: nobody reads on
        standard_streams.settle()
        return 141
    except (ProblemsError, OSError) as refused:
        standard_streams.settle()
        note(f"dsv4: {refused}")
        return 2
    except MemoryError:
        note("dsv4: this machine has not enough memory for that")
        return 2
    except KeyboardInterrupt:
        note("dsv4: interrupted")
        return 130
    except Exception as fault:
        if sys.flags.dev_mode:
            raise
        name = type(fault).__name__
        note(f"dsv4: a fault of this program, {name}: {fault}\n`python -X dev -m dsv4_jax` shows where")
        return 1
    return 0


if __name__ == "__main__":
    main()
