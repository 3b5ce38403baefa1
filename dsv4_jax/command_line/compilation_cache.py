"""Compiled programs kept between runs: the second start of a command does not compile again."""

import os
import pathlib
import tempfile

CACHE_NAME = pathlib.Path("dsv4_jax") / "compiled"
"""Under the user's cache directory: $XDG_CACHE_HOME, or ~/.cache."""

MIN_COMPILE_SECONDS = 0.2
"""Programs that compile faster are not worth a file."""


class NoCache(Exception):
    """There is nowhere to keep compiled programs; the message says why. Commands go on without."""


def default_directory() -> pathlib.Path:
    """Where programs are kept unless told otherwise.

    Raises:
        NoCache: the user has no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification of that variable: others are to be ignored
        return pathlib.Path(given) / CACHE_NAME
    try:
        home = pathlib.Path.home()
    except RuntimeError as failure:
        raise NoCache("there is no home directory") from failure
    if not home.is_absolute():  # another folder for each working directory
        raise NoCache(f"the home directory {str(home)!r} is no absolute path")
    return home / ".cache" / CACHE_NAME


def writable(directory: pathlib.Path) -> pathlib.Path:
    """`directory`, made if it is missing.

    Raises:
        NoCache: it cannot be made, or no file can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):  # permission bits do not tell, for root least of all
            pass
    except OSError as failure:
        raise NoCache(f"{directory} cannot be written ({failure.strerror})") from failure
    return directory


def enable(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Makes this process read and write compiled programs in `directory`; call before compiling.

    JAX keys each program by its code, its options, the devices and the versions of jaxlib, so a stale entry
    is never used. An entry that cannot be read is compiled again, with a warning. Several processes may share
    the directory.

    Returns:
        The directory.

    Raises:
        NoCache: there is no such place, or it cannot be written.
    """
    import jax

    directory = writable(directory or default_directory())
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return directory
