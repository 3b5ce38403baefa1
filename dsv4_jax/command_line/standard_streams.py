"""Standard output and error of a command: what they cannot print is replaced, and failures are said once."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator

from dsv4_jax.errors import ProblemsError


def note(message: str) -> None:
    """One line for the user, beside the results: on standard error."""
    print(message, file=sys.stderr)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Standard streams fit for a command while the block runs; what was printed is flushed at its end.

    A character that the encoding of a stream lacks is replaced instead of ending the program in mid-text.
    Warnings of libraries become one line each, without the source line that raised them.

    Raises:
        ProblemsError: there is no standard output, or it took not all that was printed (a full disk).
        BrokenPipeError: nobody reads on.
    """
    _occupy()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    if sys.stdout is None:
        raise ProblemsError("cannot print", ["standard output is closed"])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
        yield
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as failure:
        raise ProblemsError("cannot print", [f"standard output: {failure.strerror}"]) from failure


def keep_for_results(shown: bool) -> None:
    """From now on standard output gets what Python prints, or nothing; what libraries write to its descriptor
    goes to standard error.

    Args:
        shown: whether this process is the one whose results are wanted.
    """
    sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):  # a stream without a file behind it
        number = sys.stdout.fileno()
        results = os.dup(number) if shown else os.open(os.devnull, os.O_WRONLY)
        os.dup2(2, number)
        sys.stdout = open(results, "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115
        return
    if not shown:
        sys.stdout = io.StringIO()


def _occupy() -> None:
    """Fills closed standard descriptors, or a file that is opened later would get what libraries print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def settle() -> None:
    """After a failure: prints what is still to be printed, or throws away what standard output does not take.

    Otherwise Python tries again at exit, and complains.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stream without a file behind it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
