"""Generated text to an answer, while it arrives: reasoning, content, tool calls.

The parser reads tags (`tags`) and is a machine of few states. Its result does not depend on how the text is
cut into pieces, its time is linear in the text, and it never raises: whatever a model writes becomes some
answer, in which the arguments of a call are always JSON and content never holds the markup of calls.
`recoveries` counts what was mended.
"""

import collections
import enum
from collections.abc import Callable, Collection, Sequence

from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.answer import (
    ContentDelta,
    Event,
    Finish,
    FinishReason,
    ReasoningDelta,
)
from dsv4_jax.serving.chat.messages import Tool
from dsv4_jax.serving.chat.open_call import OpenCall, call_id
from dsv4_jax.serving.chat.stops import StopStrings
from dsv4_jax.serving.chat.tags import Kind, Tag, TagReader

MAX_CALLS = 128
JOINER = 2
"""Newlines between the content and the calls after it; they belong to neither."""


class State(enum.Enum):
    """Where in a turn the text is."""

    REASONING = enum.auto()
    CONTENT = enum.auto()
    BEFORE_CALLS = enum.auto()  # a block of calls was opened
    ARGUMENTS = enum.auto()  # in a call, between parameters
    VALUE = enum.auto()
    BETWEEN_CALLS = enum.auto()
    AFTER_CALLS = enum.auto()
    END = enum.auto()
    BROKEN = enum.auto()  # a fault of the parser itself: all further text is content


_BROKEN_MARKER = control.DSML[:-1] + " "
_PROSE = (State.REASONING, State.CONTENT)
_IN_CALL = (State.ARGUMENTS, State.VALUE)


class AnswerParser:
    """Reads one turn of one choice; each has a parser of its own.

    Args:
        reasoning: the prompt ended with `<think>` (`render.starts_reasoning`).
        tools: that may be called.
        stops: strings that end the turn, outside of reasoning and calls.
        by_ids, calls_by_ids: whether marks of `TOKEN_OF` come with the text (see `tags.TagReader`).
        stream_arguments: give string values out while they are written, instead of a call at its end. A call
            that is cut is then there, with incomplete JSON, and the turn finishes with "length".
        max_calls: calls of a turn that are given out; more are dropped.
        new_id: makes the ids of calls.

    Attributes:
        recoveries: kind of deviation -> how often it was mended.
        stop: the stop string that ended the turn, if one did.
    """

    def __init__(
        self,
        *,
        reasoning: bool,
        tools: Sequence[Tool] = (),
        stops: Sequence[str] = (),
        by_ids: bool = False,
        calls_by_ids: bool = False,
        stream_arguments: bool = False,
        max_calls: int = MAX_CALLS,
        new_id: Callable[[], str] = call_id,
    ) -> None:
        self.recoveries: collections.Counter[str] = collections.Counter()
        self.stop: str | None = None
        self._tools = {tool.name: tool for tool in tools}
        self._stops = StopStrings(stops)
        self._max_calls, self._new_id = max_calls, new_id
        self._reader = TagReader(by_ids, calls_by_ids)
        self._state = State.REASONING if reasoning else State.CONTENT
        self._events: list[Event] = []
        self._now = ""  # the text that is being read
        self._newlines = 0  # held back at the end of the reasoning or the content so far
        self._said = False  # something of the reasoning or the content, whichever is being written
        self._tail = ""  # of the content
        self._num_calls = 0
        self._swallowed = False  # a block without calls stood after the newlines that are held back
        self._stream_arguments = stream_arguments
        self._call: OpenCall | None = None
        self._gave_calls = False
        # A block that may turn out to be prose: where it began, its text, its text without tags.
        self._doubt: State | None = None
        self._held: list[str] = []
        self._held_words: list[str] = []

    @property
    def marks(self) -> Collection[str]:
        """The control strings that must come as their marks (`TOKEN_OF`); others may come as they are."""
        return self._reader.marked

    @property
    def in_reasoning(self) -> bool:
        """Whether a grammar of the answer has not begun yet."""
        return self._state is State.REASONING or (self._doubt is State.REASONING)

    @property
    def ended(self) -> bool:
        """Whether the turn is over, by its end or a stop string; what is fed then is ignored."""
        return self._state is State.END

    def feed(self, text: str) -> list[Event]:
        """Reads more text and returns what it settles."""
        try:
            self._read(text, final=False)
        except Exception:  # a fault of this module must not cost the text
            self._break()
        return self._given()

    def finish(self, reason: FinishReason = "stop") -> list[Event]:
        """The text is over, because of `reason`. Returns the rest of the events, with `Finish` the last."""
        try:
            self._read("", final=True)
            self._close(reason)
        except Exception:  # as in `feed`
            self._break()
            self._close(reason)
        return self._given()

    def _given(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _break(self) -> None:
        """After a fault: what was read and not given out becomes content, and so does all that follows."""
        self.recoveries["parser_error"] += 1
        lost = "".join(self._held_words) if self._doubt else self._call.texts() if self._call else ""
        self._doubt, self._state = None, State.BROKEN
        self._say_content("\n" * self._newlines + lost + self._now + self._reader.rest())
        self._newlines = 0

    def _read(self, text: str, final: bool) -> None:
        if self._state is State.END:
            return
        self._reader.feed(text)
        if self._state is State.BROKEN:
            self._say_content(self._reader.rest())
        while self._state not in (State.END, State.BROKEN):
            text, tag = self._reader.read(final)
            if not text and tag is None:
                return
            self._now = text
            if text:
                self._on_text(text)
            self._now = ""
            if tag is not None and self._state is not State.END:
                self._on_tag(tag)

    # ---- text --------------------------------------------------------------------------------------

    def _on_text(self, text: str) -> None:
        state = self._state
        if state in _PROSE:
            self._prose(text)
        elif state is State.VALUE:
            self._hold(text, text)
            self._give(self._call.more(text))
        elif self._doubt is not None:
            self._hold(text, text)
            if text.strip(" \t\r\n>" if state is State.BEFORE_CALLS else None):
                self._was_prose()
        elif state is State.BEFORE_CALLS:
            if words := text.lstrip(" \t\r\n>"):
                self._leave_calls("block_without_calls")
                self._on_text(words)
        elif not text.strip():
            return
        elif state is State.BETWEEN_CALLS and not self._num_calls:
            self._leave_calls("block_without_calls")
            self._on_text(text.lstrip())
        else:  # once a kind: how often would depend on how the text is cut
            kind = "text_in_call" if state is State.ARGUMENTS else "text_after_calls"
            self.recoveries[kind] = 1

    def _prose(self, text: str) -> None:
        """Text of the reasoning or the content; newlines at its end wait for what comes."""
        body = text.rstrip("\n")
        if body:
            self._say("\n" * self._newlines + body)
            self._newlines = 0
        self._newlines += len(text) - len(body)

    def _say(self, text: str) -> None:
        self._said = True
        if self._state is State.REASONING:
            self._events.append(ReasoningDelta(text))
        else:
            self._say_content(text)

    def _say_content(self, text: str) -> None:
        if self._state is State.END:
            return
        # Removed markers may leave a new one behind, and one may be spelt in ordinary tokens: it loses its
        # last character.
        *before, rest = (self._tail + text).split(control.DSML)
        skipped = len(self._tail)
        for words in before:
            self._show((words + _BROKEN_MARKER)[skipped:])
            if self._state is State.END:
                return
            skipped = 0
            self.recoveries["marker_in_words"] += 1
        self._tail = _BROKEN_MARKER.join((*before, rest))[1 - len(control.DSML) :]
        self._show(rest[skipped:])

    def _show(self, text: str) -> None:
        shown, self.stop = self._stops.add(text)
        if shown:
            self._events.append(ContentDelta(shown))
        if self.stop is not None:
            self._newlines = 0
            self._end("stop")

    def _say_newlines(self) -> None:
        if self._newlines:
            self._say("\n" * self._newlines)
            self._newlines = 0

    # ---- tags --------------------------------------------------------------------------------------

    def _on_tag(self, tag: Tag) -> None:
        if tag.kind is Kind.END_OF_TURN:
            self._close("stop")
        elif self._state is State.REASONING:
            self._in_reasoning(tag)
        elif self._state is State.CONTENT:
            self._in_content(tag)
        elif self._doubt is State.REASONING and tag.kind is Kind.END_THINK:
            self._was_prose(tag)
        elif self._state is State.VALUE:
            self._in_value(tag)
        elif self._state is State.ARGUMENTS:
            self._in_arguments(tag)
        else:
            self._around_calls(tag)

    def _in_reasoning(self, tag: Tag) -> None:
        if tag.kind is Kind.END_THINK:
            self._say_newlines()
            self._state, self._said = State.CONTENT, False
        elif tag.kind is Kind.THINK:
            self.recoveries["stray_think"] += 1
        elif tag.kind is Kind.CALLS and self._tools and (self._newlines or not self._said):
            self._doubt_from(State.REASONING)
            self._hold(tag.raw)
            self._state = State.BEFORE_CALLS
        else:
            self._prose(tag.raw)

    def _in_content(self, tag: Tag) -> None:
        if tag.kind is Kind.CALLS:
            self._state = State.BEFORE_CALLS
        elif tag.kind is Kind.MISSPELT_CALLS and self._tools:
            self._doubt_from(State.CONTENT)
            self._state = State.BEFORE_CALLS
        elif tag.kind is Kind.INVOKE and tag.name in self._tools:
            self._doubt_from(State.CONTENT)
            self._begin_call(tag)
        elif tag.kind in (Kind.THINK, Kind.END_THINK):
            self.recoveries["stray_think"] += 1
        elif tag.kind is Kind.CUT and control.DSML not in tag.raw:
            self._prose(tag.raw)
        else:
            self.recoveries["stray_markup"] += 1

    def _around_calls(self, tag: Tag) -> None:
        """Before the first call of a block, between calls, or after the last."""
        before = self._state is State.BEFORE_CALLS
        if tag.kind is Kind.INVOKE and not (self._doubt and tag.name not in self._tools):
            self._hold(tag.raw)
            self._begin_call(tag)
        elif self._doubt is not None:
            self._was_prose(tag)
        elif tag.kind is Kind.END_CALLS and self._state is not State.AFTER_CALLS:
            self._end_of_block("empty_block" if before else None)
        elif tag.kind is Kind.CALLS and self._state is State.AFTER_CALLS:
            self._state = State.BETWEEN_CALLS
        else:
            self.recoveries["stray_markup"] += 1

    def _in_arguments(self, tag: Tag) -> None:
        if tag.kind is Kind.PARAMETER:
            self._hold(tag.raw)
            self._begin_value(tag)
        elif tag.kind in (Kind.END_INVOKE, Kind.END_CALLS, Kind.INVOKE):
            self._end_call(tag)
        elif self._doubt is not None and tag.kind is not Kind.END_PARAMETER:
            self._was_prose(tag)
        else:
            self._hold(tag.raw)
            self.recoveries["stray_markup"] += 1

    def _in_value(self, tag: Tag) -> None:
        closing = (Kind.END_PARAMETER, Kind.END_INVOKE, Kind.END_CALLS)
        if tag.kind in closing or (tag.kind is Kind.PARAMETER and tag.name is not None):
            if tag.kind is Kind.END_PARAMETER:
                self._hold(tag.raw)
                self._end_value(cut=False)
            else:
                self.recoveries["unclosed_parameter"] += 1
                self._end_value(cut=True)
                if self._state is not State.END:
                    self._in_arguments(tag)
        else:
            self._hold(tag.raw)
            self._give(self._call.more(tag.raw))

    # ---- calls -------------------------------------------------------------------------------------

    def _begin_call(self, tag: Tag) -> None:
        tool = self._tools.get(tag.name)
        if tool is not None and self._num_calls >= self._max_calls:
            self.recoveries["calls_beyond_limit"] += 1
            tool = None
        elif tool is None:
            self.recoveries["undeclared_call"] += 1
        streams = self._stream_arguments and self._doubt is None
        self._call = OpenCall(tag.name or "", tool, self._num_calls, self._new_id, streams)
        self._state = State.ARGUMENTS

    def _begin_value(self, tag: Tag) -> None:
        self._state = State.VALUE
        self._give(self._call.begin(tag.name, tag.is_string))

    def _end_value(self, cut: bool) -> None:
        self._state = State.ARGUMENTS
        self._give(self._call.end_value(cut))

    def _end_call(self, tag: Tag) -> None:
        """A call is over, by its own end or by what can only come after it."""
        if self._doubt is not None:
            if self._doubt is State.CONTENT and self._call.missing:
                self._was_prose(tag)
                return
            kind = "calls_in_reasoning" if self._doubt is State.REASONING else "calls_without_block"
            self.recoveries[kind] += 1
            self._drop_joiner(self._doubt)
            self._doubt, self._held, self._held_words = None, [], []
        if tag.kind is not Kind.END_INVOKE:
            self.recoveries["unclosed_call"] += 1
        if self._state is not State.END:
            self._state = State.BETWEEN_CALLS
            self._give_call()
        if tag.kind is not Kind.END_INVOKE and self._state is not State.END:
            self._around_calls(tag)

    def _give_call(self) -> None:
        """The rest of the call, all of it unless it was given out while it was written."""
        call = self._call
        self._give(call.end())
        self.recoveries += collections.Counter(
            repeated_parameter=call.repeated, parameter_without_name=call.nameless
        )
        self._num_calls += call.tool is not None and self._state is not State.END
        self._call = None

    def _give(self, events: list[Event]) -> None:
        """Events of a call; before the first of them the text before the calls ends."""
        if events and not self._gave_calls:
            self._gave_calls = True
            state = self._state
            self._drop_joiner(State.CONTENT)
            if self._state is State.END:  # a stop string among the newlines before the call
                return
            self._state = state
        self._events += events

    def _drop_joiner(self, channel: State) -> None:
        """Of the newlines that are held back, those before the calls go; the others belong to the text."""
        self._newlines = max(0, self._newlines - JOINER)
        self._state = channel
        self._say_newlines()
        if channel is State.CONTENT and (held := self._stops.flush()):
            self._events.append(ContentDelta(held))

    def _end_of_block(self, kind: str | None) -> None:
        if self._num_calls:
            self._state = State.AFTER_CALLS
        else:
            self._leave_calls(kind)

    def _leave_calls(self, kind: str | None) -> None:
        """A block that held no call of a tool that there is: what follows is content."""
        if kind is not None:
            self.recoveries[kind] += 1
        self._state, self._swallowed = State.CONTENT, True

    # ---- blocks that may be prose ------------------------------------------------------------------

    def _doubt_from(self, state: State) -> None:
        self._doubt, self._held, self._held_words = state, [], []

    def _hold(self, raw: str, words: str = "") -> None:
        if self._doubt is not None:
            self._held.append(raw)
            self._held_words.append(words)

    def _was_prose(self, tag: Tag | None = None) -> None:
        """What was held is text of the reasoning as it is, or of the content without its tags; then `tag`."""
        self._state = self._doubt
        text = "".join(self._held if self._doubt is State.REASONING else self._held_words)
        if self._doubt is State.CONTENT:
            self.recoveries["stray_markup"] += 1
        self._doubt, self._held, self._held_words, self._call = None, [], [], None
        self._prose(text)
        if tag is not None and self._state is not State.END:
            self._on_tag(tag)

    # ---- the end -----------------------------------------------------------------------------------

    def _close(self, reason: FinishReason) -> None:
        if self._state is State.END:
            return
        cut = self._state not in (*_PROSE, State.AFTER_CALLS, State.BROKEN)
        if self._doubt is State.REASONING or (self._doubt is State.CONTENT and reason == "stop"):
            cut = False
            self._was_prose()
        elif cut and (self._doubt is not None or self._state in _IN_CALL):
            self.recoveries["cut_call"] += 1
        if cut and reason == "stop" and self._call is not None and self._call.started:
            reason = "length"
        if self._swallowed:
            self._newlines = max(0, self._newlines - JOINER)
        if self._state in _PROSE:
            self._say_newlines()
        if self._state is not State.END:
            self._end(reason, cut)

    def _end(self, reason: FinishReason, cut: bool = False) -> None:
        if held := self._stops.flush():
            self._events.append(ContentDelta(held))
        if self._num_calls and not (cut and reason == "length") and reason != "abort":
            reason = "tool_calls"
        self._state = State.END
        self._events.append(Finish(reason))
