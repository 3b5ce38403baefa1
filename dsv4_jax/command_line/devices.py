"""Whether JAX starts at all, and has a device to run on."""

import os

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
