"""What commands share: the types of their options, and what comes before they compute.

Nothing here imports JAX when it is loaded.
"""

import pathlib
from collections.abc import Callable
from typing import Annotated

import tyro

from dsv4_jax.command_line import devices
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.errors import ProblemsError

Checkpoint = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="CHECKPOINT", help="directory, or hf://org/name@revision"),
]
Destination = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="DESTINATION")]
Prompt = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]")]
CompilationCache = Annotated[
    bool, tyro.conf.arg(help="keep compiled programs under ~/.cache/dsv4_jax/compiled")
]
AllowLinks = Annotated[
    pathlib.Path | None,
    tyro.conf.arg(metavar="DIR", help="accept links of CHECKPOINT that lead into this directory"),
]
Mesh = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="AXIS=SIZE,...", help="devices to spread the model over, such as expert=8,tensor=2"
    ),
]
Json = Annotated[bool, tyro.conf.arg(name="json", help="print one JSON object")]


def prepare(keep_programs: bool) -> None:
    """A device to compute on, and the place where compiled programs are kept."""
    require(devices.device_problem)
    if not keep_programs:
        return
    from dsv4_jax.command_line import compilation_cache

    try:
        compilation_cache.enable()
    except compilation_cache.NoCache as why:
        note(f"note: compiled programs are not kept: {why}")


def require(check: Callable[[], str | None]) -> None:
    """Comes before the imports of modules that import JAX, so that its refusal is a sentence."""
    if problem := check():
        raise ProblemsError("cannot compute", [problem])
