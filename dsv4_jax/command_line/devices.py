"""Whether JAX starts at all, and has a device to run on."""

import os
from collections.abc import Callable

from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.errors import ProblemsError

NO_PLUGIN = "this installation supports no such platform"
"""What JAX means by an AssertionError without a word: a platform that it knows, and no plugin for it."""


def settings_problem() -> str | None:
    """Why JAX refuses the values of its environment variables, in one sentence; None if it takes them."""
    try:
        import jax  # noqa: F401 - the settings are read by the import
    except ValueError as failure:
        return f"JAX refuses its settings: {' '.join(str(failure).split())}"
    return None


def device_problem() -> str | None:
    """Why JAX cannot start a backend, in one sentence; None if it can."""
    if problem := settings_problem():
        return problem
    import jax

    try:
        jax.devices()
    except Exception as failure:  # a backend's plugin raises what it likes, AssertionError among it
        reason = " ".join(str(failure).split()) or NO_PLUGIN
        asked = os.environ.get("JAX_PLATFORMS")
        return f"JAX cannot use its devices{f' (JAX_PLATFORMS={asked})' if asked else ''}: {reason}"
    return None


def prepare(keep_programs: bool) -> None:
    """A device to compute on, and the place where compiled programs are kept."""
    require(device_problem)
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
