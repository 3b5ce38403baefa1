"""Tags in generated text: where they begin and end, whatever pieces the text arrives in.

A reader is fed text and gives it back as plain runs and tags. What may still become a tag is held back; that
is never more than `MAX_HEADER_CHARS` and a few. Every character is looked at a bounded number of times.
"""

import enum
import re
from typing import NamedTuple

from dsv4_jax.serving.chat import control

MAX_HEADER_CHARS = 1024
"""A tag whose attributes are longer is taken for text."""


class Kind(enum.Enum):
    """What a tag is."""

    THINK = enum.auto()
    END_THINK = enum.auto()
    END_OF_TURN = enum.auto()
    CALLS = enum.auto()  # the opening of a block of calls
    MISSPELT_CALLS = enum.auto()
    END_CALLS = enum.auto()
    INVOKE = enum.auto()
    END_INVOKE = enum.auto()
    PARAMETER = enum.auto()
    END_PARAMETER = enum.auto()
    BARE = enum.auto()  # the marker of tags, without a tag around it
    CUT = enum.auto()  # the text ended inside a tag


class Tag(NamedTuple):
    """One tag.

    Attributes:
        kind: what it is.
        raw: its text.
        name: of an INVOKE ("" if it has none) or a PARAMETER (None if it has none).
        is_string: of a PARAMETER; None if it does not say.
    """

    kind: Kind
    raw: str
    name: str | None = None
    is_string: bool | None = None


# Lone surrogates: no decoder of UTF-8 gives them, so they stand for tokens among the text of other tokens.
TOKENS = {
    chr(0xDC01): Tag(Kind.THINK, control.THINK),
    chr(0xDC02): Tag(Kind.END_THINK, control.END_THINK),
    chr(0xDC03): Tag(Kind.END_OF_TURN, control.EOS),
}
TOKEN_OF = {tag.raw: mark for mark, tag in TOKENS.items()}
"""What to feed to a reader by ids for a control token."""

_SURROGATE = re.compile(f"[{chr(0xD800)}-{chr(0xDFFF)}]")

_OPEN, _CLOSE = f"<{control.DSML}", f"</{control.DSML}"
_DSML_TAGS = {
    f"{_OPEN}tool_calls>": Kind.CALLS,
    f"{_OPEN}toolcalls>": Kind.MISSPELT_CALLS,
    f"{_OPEN}function_calls>": Kind.MISSPELT_CALLS,
    f"{_CLOSE}tool_calls>": Kind.END_CALLS,
    f"{_CLOSE}toolcalls>": Kind.END_CALLS,
    f"{_CLOSE}function_calls>": Kind.END_CALLS,
    f"{_CLOSE}invoke>": Kind.END_INVOKE,
    f"{_CLOSE}parameter>": Kind.END_PARAMETER,
}
_TEXT_TAGS = {
    control.THINK: Kind.THINK,
    control.END_THINK: Kind.END_THINK,
    control.EOS: Kind.END_OF_TURN,
}
_HEADS = {f"{_OPEN}invoke": Kind.INVOKE, f"{_OPEN}parameter": Kind.PARAMETER}
_LONGEST = max(map(len, [*_DSML_TAGS, *_TEXT_TAGS]))
_BEGINNING = re.compile(f"[<｜{''.join(TOKENS)}]")
_SECOND = "/t" + control.DSML[0]  # what may follow a `<`
_HEADER_END = re.compile("[<>]")


class TagReader:
    """Text in, runs and tags out.

    Args:
        by_ids: thinking and the end of a turn are marked by `TOKEN_OF`; the words `<think>` in the text are
            then only words. Otherwise the words are the tags.
    """

    def __init__(self, by_ids: bool) -> None:
        self._fixed = _DSML_TAGS if by_ids else _DSML_TAGS | _TEXT_TAGS
        self._by_ids = by_ids
        self._buffer = ""
        self._at = 0

    def feed(self, text: str) -> None:
        """Appends text. Halves of characters that stand for nothing become U+FFFD."""
        if _SURROGATE.search(text):
            text = _SURROGATE.sub(self._kept, text)
        self._buffer = self._buffer[self._at :] + text
        self._at = 0

    def read(self, final: bool) -> tuple[str, Tag | None]:
        """The next run of text and the tag after it; ("", None) if more text is needed to say more.

        Args:
            final: no more text comes.
        """
        searched = self._at
        while (found := _BEGINNING.search(self._buffer, searched)) is not None:
            place = found.start()
            tag, length, wait = self._tag_at(place, final)
            if wait:
                return self._take(place), None
            if tag is not None:
                text = self._take(place)
                self._at += length
                return text, tag
            searched = place + 1
        return self._take(len(self._buffer)), None

    def rest(self) -> str:
        """Everything that was fed and not read, as text."""
        rest = self._take(len(self._buffer))
        return "".join(TOKENS[each].raw if each in TOKENS else each for each in rest)

    def _kept(self, found: re.Match[str]) -> str:
        return found[0] if self._by_ids and found[0] in TOKENS else "\ufffd"

    def _take(self, end: int) -> str:
        text = self._buffer[self._at : end]
        self._at = end
        return text

    def _tag_at(self, place: int, final: bool) -> tuple[Tag | None, int, bool]:
        """(tag, characters of it, whether to wait for more) at a character that may begin one."""
        buffer = self._buffer
        first = buffer[place]
        if first in TOKENS:
            return TOKENS[first], 1, False
        if first == "<" and place + 1 < len(buffer) and buffer[place + 1] not in _SECOND:
            return None, 0, False
        rest = buffer[place : place + _LONGEST]
        if first != "<":
            candidates = {control.DSML: Kind.BARE}
        else:
            candidates = self._fixed
            for head, kind in _HEADS.items():
                if rest.startswith(head):
                    return self._headed(place, head, kind, final)
        for text, kind in candidates.items():
            if rest.startswith(text):
                return Tag(kind, text), len(text), False
        unfinished = len(rest) < _LONGEST and any(
            text.startswith(rest) for text in (*candidates, *(_HEADS if first == "<" else ()))
        )
        if not unfinished:
            return None, 0, False
        if not final:
            return None, 0, True
        return Tag(Kind.CUT, rest), len(rest), False

    def _headed(self, place: int, head: str, kind: Kind, final: bool) -> tuple[Tag | None, int, bool]:
        """A tag with attributes."""
        buffer, start = self._buffer, place + len(head)
        if start < len(buffer) and not (buffer[start].isspace() or buffer[start] == ">"):
            return None, 0, False
        found = _HEADER_END.search(buffer, start, start + MAX_HEADER_CHARS)
        if found is None:
            if len(buffer) - start >= MAX_HEADER_CHARS:
                return None, 0, False
            if not final:
                return None, 0, True
            return Tag(Kind.CUT, buffer[place:]), len(buffer) - place, False
        if found[0] == "<":
            return None, 0, False
        raw = buffer[place : found.end()]
        said = _attributes(buffer[start : found.start()])
        name, flag = said.get("name"), {"true": True, "false": False}.get(said.get("string"))
        if kind is Kind.INVOKE:
            return Tag(kind, raw, name or ""), len(raw), False
        return Tag(kind, raw, name, flag), len(raw), False


def _attributes(header: str) -> dict[str, str]:
    """The attributes `key="value"` of a tag; anything else in it is passed over."""
    parts = header.split('"')
    return {
        parts[i].strip().removesuffix("=").strip(): parts[i + 1]
        for i in range(0, len(parts) - 2, 2)
        if parts[i].rstrip().endswith("=")
    }
