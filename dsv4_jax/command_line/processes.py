"""Commands that run as several processes, one on each host: their options, and who prints."""

import dataclasses
from typing import Annotated

import tyro

from dsv4_jax.command_line import devices, standard_streams
from dsv4_jax.errors import ProblemsError


@dataclasses.dataclass(frozen=True)
class Processes:
    """one process a host, started with the same command everywhere"""

    coordinator: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="HOST:PORT",
            help="where process 0 listens for the others; auto asks the cluster: Cloud TPU, SLURM, Open MPI",
        ),
    ] = None
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="N", help="how many processes there are")] = (
        None
    )
    process_id: Annotated[
        int | None, tyro.conf.arg(metavar="I", help="of this one, 0 .. N-1; process 0 prints the results")
    ] = None


Group = Annotated[Processes, tyro.conf.arg(name="")]
"""The type of a command's parameter: options without a prefix, in a group of their own in its help."""

ALONE = Processes()


def join(given: Processes, mesh: str | None, request: dict[str, object]) -> None:
    """Joins the other processes, if there are any; comes before anything touches a device.

    From then on only process 0 prints results, and nothing but results reaches its standard output: the
    transport of JAX on CPUs writes there too. Notes go to standard error in every process.

    Args:
        given: the options.
        mesh: that the command was given.
        request: names and values that must be the same in every process.

    Raises:
        ProblemsError: for settings or options that cannot be, no mesh for several processes, processes that
            do not come together, and those that were given something else.
    """
    if problem := devices.settings_problem():
        raise ProblemsError("cannot compute", [problem])
    from sharding import agreement, processes

    if given.num_processes and not processes.option_problems(*dataclasses.astuple(given)):
        standard_streams.note(f"note: {processes.what_an_absence_does(given.coordinator)}")
    try:
        joined = processes.join(given.coordinator, given.num_processes, given.process_id)
    except processes.JoinError as refused:
        raise ProblemsError(refused.what, refused.problems) from refused
    if joined.num_processes == 1:
        return
    standard_streams.keep_for_results(joined.is_first)
    standard_streams.note(f"note: {processes.what_a_death_does(joined)}")
    if problem := devices.device_problem():
        raise ProblemsError("cannot compute", [problem])
    told = {name: repr(value) for name, value in ({"mesh": mesh} | request).items()}
    problems = agreement.differences(told)
    if not problems and mesh is None:
        problems = [f"{joined.num_processes} processes and no mesh: each would compute everything by itself"]
    if problems:
        raise ProblemsError("cannot go on together", problems)
