"""Compiled programs kept between runs: the second start of a command does not compile again."""

import pathlib

CACHE_HOME = pathlib.Path(".cache") / "dsv4_jax" / "compiled"
"""Under the user's home directory."""

MIN_COMPILE_SECONDS = 0.2
"""Programs that compile faster are not worth a file."""


def default_directory() -> pathlib.Path:
    """Where programs are kept unless told otherwise."""
    return pathlib.Path.home() / CACHE_HOME


def enable(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Makes this process read and write compiled programs in `directory`; call before compiling.

    JAX keys each program by its code, its options, the devices and the versions of jaxlib, so a
    stale entry is never used. Failing to read or write only costs the time to compile.

    Returns:
        The directory.
    """
    import jax

    directory = directory or default_directory()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return directory
