"""What comes out of a model's turn: events while it arrives, and the whole answer, which is their sum."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from dsv4_jax.serving.chat.messages import Message, Text, ToolCall

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolStart:
    """A call begins. `index` counts the calls of the turn from 0."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of a call's arguments; the pieces of a call together are the JSON text of one object."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """The turn is over."""

    reason: FinishReason


Event = ReasoningDelta | ContentDelta | ToolStart | ToolArguments | Finish


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A whole turn.

    Attributes:
        reasoning: None if there was none.
        content: None if nothing was said and there are calls, or nothing but reasoning.
        tool_calls: in the order in which they were made.
        finish_reason: why it ended; None if it has not.
    """

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason | None = None

    def message(self) -> Message:
        """The turn as a message of the conversation that goes on."""
        parts = (Text(self.content),) if self.content else ()
        return Message("assistant", parts, reasoning=self.reasoning, tool_calls=self.tool_calls)


def answer_of(events: Iterable[Event]) -> Answer:
    """The sum of a turn's events."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: dict[int, tuple[ToolStart, list[str]]] = {}
    reason = None
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolStart(index):
                calls[index] = (event, [])
            case ToolArguments(index, text):
                calls[index][1].append(text)
            case Finish(reason):
                pass
    made = tuple(ToolCall(start.id, start.name, "".join(pieces)) for start, pieces in calls.values())
    return Answer("".join(reasoning) or None, "".join(content) or None, made, reason)
