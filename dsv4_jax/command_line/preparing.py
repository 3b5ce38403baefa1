"""What a subcommand asks of the machine before it imports JAX."""

from collections.abc import Callable

from dsv4_jax.command_line import devices
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.errors import ProblemsError


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
