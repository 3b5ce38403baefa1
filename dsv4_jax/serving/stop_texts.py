"""Stop texts that may begin in one token and end in another: text is held back while it could be one."""

from collections.abc import Sequence


class StopTexts:
    """Finds the first of some texts in a stream of pieces; the work is linear in the stream.

    Args:
        texts: none empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """(text that is certain to be shown, whether a stop text was found; nothing follows then).

        Of several texts that end in one piece, the one that begins first counts.
        """
        if not self._texts:
            return piece, False
        text = self._held + piece
        found = [at for stop in self._texts if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = self._could_begin(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """What was held back and is no stop text after all."""
        rest, self._held = self._held, ""
        return rest

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = min(max(map(len, self._texts)) - 1, len(text))
        for size in range(longest, 0, -1):
            end = text[len(text) - size :]
            if any(stop.startswith(end) for stop in self._texts):
                return size
        return 0
