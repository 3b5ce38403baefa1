"""Ends a run that shows no sign of life, and says where every thread of it stood."""

import faulthandler
import os
import pathlib
import sys
import threading
import time
from types import TracebackType
from typing import Self

EXIT_CODE = 75
"""Of a process that hung: "temporary failure", start it again (sysexits.h)."""


class Watchdog:
    """While its `with` block runs, `beat` must be called at least every `seconds`.

    When it is not, all stacks go to standard error and to a file, and the process ends with `EXIT_CODE`,
    without any cleaning up: whatever hangs would hang that too. A second alarm without Python, for an
    interpreter that does not come to run any more, follows half as much later (exit code 1).

    Args:
        seconds: None: nothing is watched.
        stacks: file for the stacks.
    """

    def __init__(self, seconds: float | None, stacks: pathlib.Path) -> None:
        self._seconds, self._stacks = seconds, stacks
        self._last = time.monotonic()
        self._doing = "starting"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """A sign of life; `doing` says what comes next."""
        self._last, self._doing = time.monotonic(), doing
        if self._seconds is not None:
            faulthandler.dump_traceback_later(1.5 * self._seconds + 5.0, exit=True, file=sys.__stderr__)

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self.beat(self._doing)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._done.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        said = (
            f"dsv4: no sign of life for {silent:.0f} seconds ({self._doing}); the stacks follow and are in"
            f" {self._stacks}; exit code {EXIT_CODE}\n"
        )
        os.write(2, said.encode())
        faulthandler.dump_traceback(file=2)
        try:
            with open(self._stacks, "w") as file:
                file.write(said)
                file.flush()
                faulthandler.dump_traceback(file=file)
        except OSError as failure:
            os.write(2, f"dsv4: {self._stacks}: {failure.strerror}\n".encode())
        os._exit(EXIT_CODE)
