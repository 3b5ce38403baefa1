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
    chr(0xDC04): Tag(Kind.BARE, control.DSML),
}
TOKEN_OF = {tag.raw: mark for mark, tag in TOKENS.items()}
"""What to feed to a reader by ids for a control token."""

_SURROGATE = re.compile(f"[{chr(0xD800)}-{chr(0xDFFF)}]")

_CALL_TAGS = {
    "<{}tool_calls>": Kind.CALLS,
    "<{}toolcalls>": Kind.MISSPELT_CALLS,
    "<{}function_calls>": Kind.MISSPELT_CALLS,
    "</{}tool_calls>": Kind.END_CALLS,
    "</{}toolcalls>": Kind.END_CALLS,
    "</{}function_calls>": Kind.END_CALLS,
    "</{}invoke>": Kind.END_INVOKE,
    "</{}parameter>": Kind.END_PARAMETER,
}
_TEXT_TAGS = {
    control.THINK: Kind.THINK,
    control.END_THINK: Kind.END_THINK,
    control.EOS: Kind.END_OF_TURN,
}
_HEADS = {"<{}invoke": Kind.INVOKE, "<{}parameter": Kind.PARAMETER}
_HEADER_END = re.compile(f"[<>{TOKEN_OF[control.THINK]}{TOKEN_OF[control.END_THINK]}]")


class TagReader:
    """Text in, runs and tags out.

    Args:
        by_ids: thinking and the end of a turn are marked by `TOKEN_OF`; the words `<think>` in the text are
            then only words. Otherwise the words are the tags.
        calls_by_ids: the same of the marker in the tags of calls.

    Attributes:
        marked: the control strings that must come as marks.
    """

    def __init__(self, by_ids: bool, calls_by_ids: bool = False) -> None:
        self._marker = TOKEN_OF[control.DSML] if calls_by_ids else control.DSML
        self._fixed = {text.format(self._marker): kind for text, kind in _CALL_TAGS.items()}
        if not by_ids:
            self._fixed |= _TEXT_TAGS
        self._heads = {text.format(self._marker): kind for text, kind in _HEADS.items()}
        self._longest = max(map(len, (*self._fixed, *self._heads)))
        self._second = "/t" + self._marker[0]  # what may follow a `<`
        self.marked = frozenset((*_TEXT_TAGS,) * by_ids + (control.DSML,) * calls_by_ids)
        self._marks = {TOKEN_OF[text] for text in self.marked}
        self._beginning = re.compile(f"[<{self._marker[0]}{''.join(self._marks)}]")
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
        while (found := self._beginning.search(self._buffer, searched)) is not None:
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
        return _spelt(self._take(len(self._buffer)))

    def _kept(self, found: re.Match[str]) -> str:
        return found[0] if found[0] in self._marks else "\ufffd"

    def _take(self, end: int) -> str:
        text = self._buffer[self._at : end]
        self._at = end
        return text

    def _tag_at(self, place: int, final: bool) -> tuple[Tag | None, int, bool]:
        """(tag, characters of it, whether to wait for more) at a character that may begin one."""
        buffer = self._buffer
        first = buffer[place]
        if first in self._marks:
            return TOKENS[first], 1, False
        if first == "<" and place + 1 < len(buffer) and buffer[place + 1] not in self._second:
            return None, 0, False
        rest = buffer[place : place + self._longest]
        if first != "<":
            candidates = {control.DSML: Kind.BARE}
        else:
            candidates = self._fixed
            for head, kind in self._heads.items():
                if rest.startswith(head):
                    return self._headed(place, head, kind, final)
        for text, kind in candidates.items():
            if rest.startswith(text):
                return Tag(kind, _spelt(text)), len(text), False
        unfinished = len(rest) < self._longest and any(
            text.startswith(rest) for text in (*candidates, *(self._heads if first == "<" else ()))
        )
        if not unfinished:
            return None, 0, False
        if not final:
            return None, 0, True
        return Tag(Kind.CUT, _spelt(rest)), len(rest), False

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
            return Tag(Kind.CUT, _spelt(buffer[place:])), len(buffer) - place, False
        if found[0] != ">":
            return None, 0, False
        length, raw = found.end() - place, _spelt(buffer[place : found.end()])
        said = _attributes(_spelt(buffer[start : found.start()]))
        name, flag = said.get("name"), {"true": True, "false": False}.get(said.get("string"))
        if kind is Kind.INVOKE:
            return Tag(kind, raw, name or ""), length, False
        return Tag(kind, raw, name, flag), length, False


def _spelt(text: str) -> str:
    """Text with the words of the tokens that are marked in it."""
    return _SURROGATE.sub(lambda found: TOKENS[found[0]].raw, text) if _SURROGATE.search(text) else text


def _attributes(header: str) -> dict[str, str]:
    """The attributes `key="value"` of a tag; anything else in it is passed over."""
    parts = header.split('"')
    return {
        parts[i].strip().removesuffix("=").strip(): parts[i + 1]
        for i in range(0, len(parts) - 2, 2)
        if parts[i].rstrip().endswith("=")
    }
