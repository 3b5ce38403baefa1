"""Whether JAX has a device to run on."""

import os


def device_problem() -> str | None:
    """Why JAX cannot start a backend, in one sentence; None if it can."""
    import jax

    try:
        jax.devices()
    except Exception as failure:  # a backend's plugin raises what it likes, AssertionError among it
        reason = " ".join(str(failure).split()) or type(failure).__name__
        asked = os.environ.get("JAX_PLATFORMS")
        return f"JAX cannot use its devices{f' (JAX_PLATFORMS={asked})' if asked else ''}: {reason}"
    return None
