"""The commands that train: functions for `main.SUBCOMMANDS`, no logic of their own."""

import pathlib
from typing import Annotated

import tyro

from dsv4_jax.command_line import devices, processes
from dsv4_jax.command_line.start import CompilationCache, Mesh, prepare, require


def train(
    run: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="RUN", help="run file, or stdlib, smallest, flash, sft, lora"),
    ],
    steps: int | None = None,
    out: pathlib.Path | None = None,
    resume: bool = False,
    mesh: Mesh = None,
    seed: int | None = None,
    base: pathlib.Path | None = None,
    chats: tuple[str, ...] = (),
    lora_rank: int | None = None,
    plot: bool = False,
    tensorboard: bool = False,
    profile_steps: Annotated[
        tuple[int, int] | None, tyro.conf.arg(metavar="FIRST LAST", help="record them with jax.profiler")
    ] = None,
    dry_run: bool = False,
    hosts: processes.Group = processes.ALONE,
    compilation_cache: CompilationCache = True,
) -> None:
    """Train a model as a run file says, with saved states from which it goes on after an end of any kind.

    A run file is a Python file with a function run() that returns a RunConfig; it is executed. Ctrl-C saves
    the state and stops (130), SIGTERM too (143); a run that hangs ends with a dump of its stacks (75).

    examples:
      dsv4 train smallest --out first_run
      dsv4 train experiments/train_stdlib.py --dry-run
      dsv4 train experiments/train_stdlib.py --steps 400 --plot
      dsv4 train experiments/train_stdlib.py --resume
      dsv4 train lora --base quickstart --chats chats.jsonl --out answers
      dsv4 train flash --mesh fsdp=32,expert=8 --dry-run

    Args:
        steps: train so many instead of what the run says; its stages are cut, or the last one made longer.
        out: folder for everything that the run writes, instead of the run's own.
        resume: go on with the newest saved state in that folder.
        seed: instead of the run's.
        base: checkpoint folder to start from, instead of the run's model.
        chats: train on these files instead of the run's text: a line is {"messages": [...]}, each of them
            with "role" and "content", and the loss is of what the assistant says.
        lora_rank: train matrices of this rank beside those of the model, which stays as it is (LoRA), and
            merge them in the end.
        plot: draw loss, rates, gradient norms, expert loads and mHC gains at validations and at the end.
        tensorboard: write event files too.
        dry_run: show model, mesh, parameters by optimizer group, memory, stages and data; train nothing.
    """
    require(devices.settings_problem)
    from dsv4_jax.command_line import terminal
    from dsv4_jax.command_line import train as training

    changes = {"mesh": mesh, "seed": seed, "out": out, "steps": steps}
    changes |= {"model": base, "chats": chats, "lora_rank": lora_rank}
    looks = {"plot": plot, "tensorboard": tensorboard, "profile_steps": profile_steps}
    config = training.configured(run, **changes, **looks)
    if dry_run:
        training.show(config, terminal.Tables())
        return
    processes.join(hosts, config.mesh, {"run": config, "resume": resume})
    prepare(compilation_cache)
    training.train(config, resume=resume)


def quickstart(
    minutes: float = 5.5,
    out: pathlib.Path = pathlib.Path("quickstart"),
    seed: int = 0,
    prompt: str = "def ",
    compilation_cache: CompilationCache = True,
) -> None:
    """Train a small, complete V4 on Python's own sources, save it, load it, and let it write.

    Needs no download. Ctrl-C ends the training early and keeps what was trained.

    examples:
      dsv4 quickstart --minutes 1 --out first_model

    Args:
        minutes: time for everything, on two CPU cores.
        out: directory of the checkpoint and the loss curve.
        seed: of parameters, data order and sampling.
        prompt: what the trained model continues.
    """
    prepare(compilation_cache)
    from dsv4_jax.command_line import quickstart as first_run

    first_run.quickstart(minutes=minutes, out=out, seed=seed, prompt=prompt)
