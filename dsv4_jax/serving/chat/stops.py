"""Stop strings over text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Holds back what may become a stop string, and says when one is there.

    The stop that is complete first ends the text, before its own beginning. The result does not depend on how
    the text is cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """(text that can be shown, the stop string that has ended it or None)."""
        if not self._stops:
            return text, None
        window = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := window.find(stop)) >= 0]
        if found:
            self._held = ""
            _, at, stop = min(found)
            return window[:at], stop
        kept = len(window) - self._length_of_beginning(window)
        self._held = window[kept:]
        return window[:kept], None

    def flush(self) -> str:
        """What was held back, because no stop string can come of it any more."""
        held, self._held = self._held, ""
        return held

    def _length_of_beginning(self, window: str) -> int:
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            ending = window[-length:]
            if any(stop.startswith(ending) for stop in self._stops if len(stop) > length):
                return length
        return 0
