"""What XLA compiles in this process: how often, for how long, and what it is doing now."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import jax

BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"

Watcher = Callable[[str, float | None], None]
"""Called with (name of a program, None) when its compilation begins, and (name, seconds) when it ends."""


class Compiles:
    """Counts compilations; those that the cache of compiled programs answers count with the time that took.

    Attributes:
        count: programs so far. seconds: that they took together.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._watchers: list[Watcher] = []
        self._changing = threading.Lock()
        jax.monitoring.register_scalar_listener(self._on_start)
        jax.monitoring.register_event_duration_secs_listener(self._on_end)

    @contextlib.contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Tells a watcher while the block runs, in the thread that compiles."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def _on_start(self, event: str, value: float, **more: str | int) -> None:
        if event == BACKEND_COMPILE:
            self._tell(more, None)

    def _on_end(self, event: str, seconds: float, **more: str | int) -> None:
        if event == BACKEND_COMPILE:
            with self._changing:
                self.count += 1
                self.seconds += seconds
            self._tell(more, seconds)

    def _tell(self, more: dict[str, str | int], seconds: float | None) -> None:
        name = str(more.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        for watcher in tuple(self._watchers):
            watcher(name, seconds)


@functools.cache
def compiles() -> Compiles:
    """That of this process; it counts from its first use on."""
    return Compiles()
