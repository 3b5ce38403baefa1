"""Several processes, one on each host, that run the same program on the devices of all of them.

Every process calls `join` before anything else touches a device, and then runs the same calls with the same
arguments in the same order. After it `jax.devices()` are the devices of all processes, and a mesh
(`sharding.mesh`) takes them all. How values of the host go in and come out is told in `sharding.host_values`.

When a process dies, the others cannot go on, and no exception of Python can say so: they wait inside a
collective. JAX itself ends them (SIGABRT, exit code 134) once heartbeats have been missing for
`HEARTBEAT_SECONDS`, with a message of its own on standard error that names the processes that are gone;
`what_a_death_does` says beforehand what will happen. Whatever started the processes starts all of them again.
(`jax_enable_recoverability` is no way out: the survivors then hang and ignore SIGTERM.)

On CPUs the processes must come to each program's first collective within 30 seconds of one another, which JAX
does not let anybody change: a machine that compiles so much slower than another raises an error there.
"""

import dataclasses
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence

import jax

HEARTBEAT_SECONDS = 10
"""After so long without a sign of life from a process the others are ended."""

SHUTDOWN_SECONDS = 30
"""How long a process that is done waits for the others to be done too."""

START_SECONDS = 300
"""How long a process waits for the others to appear; images and disks of other hosts may take minutes."""

CONNECT_SECONDS = 5
CONNECT_PAUSE_SECONDS = 0.2
"""How long one try to reach the coordinator takes at most, and the pause before the next."""

AUTOMATIC = "auto"
"""In place of a coordinator: ask the cluster, as JAX knows to (Cloud TPU, SLURM, Open MPI)."""

HOST_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
"""Environment variables in which a TPU pod on Kubernetes names its hosts, with commas between them."""

EXIT_OF_THE_OTHERS = 134
"""As a shell shows it: 128 + SIGABRT."""

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


class JoinError(ValueError):
    """Processes that cannot be joined.

    Args:
        what: one sentence saying what was refused.
        problems: every broken rule with the offending value.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.what, self.problems = what, tuple(problems)
        super().__init__(f"{what}: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Joined:
    """This process among the others.

    Attributes:
        process_id: in 0 .. num_processes - 1.
        num_processes: all of them.
    """

    process_id: int
    num_processes: int

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.process_id == 0


ALONE = Joined(0, 1)


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: int = START_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    shutdown_seconds: int = SHUTDOWN_SECONDS,
) -> Joined:
    """Makes this process one of several, and waits until all are there. At most once, before any device is
    used.

    Args:
        coordinator: host:port on which process 0 listens and which every process can reach; "auto" leaves
            all three to the cluster (`jax.distributed.initialize` knows Cloud TPU, SLURM and Open MPI). None:
            this process is alone, unless it runs on a TPU pod of several hosts that names them
            (`HOST_LISTS`); a TPU VM without Kubernetes does not, there say "auto".
        num_processes: how many there are, at least 1; with an address only.
        process_id: of this one, in 0 .. num_processes - 1; with an address only.
        start_seconds: to wait for the others to appear.
        heartbeat_seconds: without a sign of life of a process before the others are ended.
        shutdown_seconds: to wait for the others at the end.

    Returns:
        This process's place; `ALONE` where there is nothing to join.

    Raises:
        JoinError: for options that are half given or no address, numbers out of range (all problems at
            once), a device that is in use already, or a coordinator that nobody answers at in time. When the
            others of a coordinator that does listen stay away, JAX raises nothing: it aborts this process,
            as `what_an_absence_does` says.
    """
    if problems := option_problems(coordinator, num_processes, process_id):
        raise JoinError("cannot join the processes", problems)
    if coordinator is None and not on_a_pod(os.environ):
        return ALONE
    address = None if coordinator == AUTOMATIC else coordinator
    if address is not None and process_id:
        _wait_until_somebody_listens(address, start_seconds)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=shutdown_seconds,
        )
    except (RuntimeError, ValueError, OSError) as failure:  # JAX's own errors are RuntimeErrors
        reason = " ".join(str(failure).split()) or type(failure).__name__
        if address is None:
            problem = (
                f"JAX finds no cluster that names the others, so coordinator must be host:port: {reason}"
            )
        else:
            problem = f"process {process_id} of {num_processes}, coordinator {address}: {reason}"
        raise JoinError("cannot join the processes", [problem]) from failure
    return Joined(jax.process_index(), jax.process_count())


def option_problems(coordinator: str | None, num_processes: int | None, process_id: int | None) -> list[str]:
    """What is wrong with the three options of `join`; nothing of it needs another process."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    problems = []
    if coordinator == AUTOMATIC:
        problems += [
            f"{name}={value}: coordinator={AUTOMATIC!r} asks the cluster for it"
            for name, value in given.items()
            if name != "coordinator" and value is not None
        ]
    else:
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            there = ", ".join(name for name in given if name not in missing)
            problems.append(f"{there} without {' and '.join(missing)}: the three go together")
        if coordinator is not None and not _is_address(coordinator):
            problems.append(f"coordinator={coordinator!r} is not host:port with a port in 1..65535")
    if num_processes is not None and num_processes < 1:
        problems.append(f"num_processes={num_processes} must be at least 1")
    if process_id is not None and process_id < 0:
        problems.append(f"process_id={process_id} must be at least 0")
    elif process_id is not None and num_processes is not None and process_id >= num_processes >= 1:
        problems.append(f"process_id={process_id} must be in 0..{num_processes - 1}")
    return problems


def on_a_pod(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one host of a TPU pod with several, and TPUs are what JAX is to use.

    Args:
        environment: names and values, such as `os.environ`.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    return any("," in environment.get(name, "") for name in HOST_LISTS)


def what_an_absence_does(coordinator: str | None, start_seconds: int = START_SECONDS) -> str:
    """A sentence for the log of each process, said before it joins the others."""
    return (
        f"waiting for the other processes at {coordinator or AUTOMATIC}; after {start_seconds} seconds"
        f" without one of them JAX aborts this one (exit code {EXIT_OF_THE_OTHERS})"
    )


def what_a_death_does(joined: Joined, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> str:
    """A sentence for the log of each process, said when it has joined: afterwards nobody can."""
    return (
        f"process {joined.process_id} of {joined.num_processes} has joined; if another one dies, JAX aborts"
        f" this one some {heartbeat_seconds} seconds later (exit code {EXIT_OF_THE_OTHERS}), naming the dead"
        " one: start all of them again"
    )


def _wait_until_somebody_listens(address: str, seconds: float) -> None:
    """Returns when a connection to the address can be made; what is behind it is found out by JAX."""
    host, _, port = address.rpartition(":")
    last = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
                return
        except OSError as failure:  # no such name yet, nobody there yet
            if time.monotonic() > last:
                reason = failure.strerror or str(failure)
                problem = (
                    f"nobody has answered at {address} for {seconds} seconds ({reason}): is process 0 up?"
                )
                raise JoinError("cannot join the processes", [problem]) from failure
        time.sleep(CONNECT_PAUSE_SECONDS)


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and 1 <= int(found[2]) <= 65535
