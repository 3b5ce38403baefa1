"""Tables on stdout, and progress on stderr, so that stdout stays clean for results."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LEAST_COLUMNS = 60
"""A terminal that says it is narrower gets tables of the usual 80 columns: a letter a line helps nobody."""


class Tables(Console):
    """Standard output for tables."""

    def __init__(self) -> None:
        super().__init__()
        if self.width < LEAST_COLUMNS:
            self.width = 80

    def on_broken_pipe(self) -> None:
        """The command decides what follows when nobody reads on; rich would leave with code 1."""
        raise BrokenPipeError


@contextlib.contextmanager
def byte_progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar while the block runs; gives a callback (tensor name, bytes done, all bytes)."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=None)

        def update(name: str, done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield update
