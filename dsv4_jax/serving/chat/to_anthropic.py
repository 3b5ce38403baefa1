"""An answer in Anthropic's form: its blocks, and the events of its stream."""

import json
from typing import Any

from dsv4_jax.serving.chat.answer import (
    Answer,
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    ToolArguments,
    ToolStart,
)

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}


def stop_reason(answer_reason: str, stop: str | None = None) -> str:
    """Why the turn ended; `stop` is the stop string that ended it, if one did (`AnswerParser.stop`)."""
    return "stop_sequence" if stop is not None else STOP_REASONS[answer_reason]


def blocks_of(answer: Answer) -> list[dict[str, Any]]:
    """The content of a message: thinking, text, calls; of these what there is."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content:
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.tool_calls:
        given = json.loads(call.arguments, parse_int=_whole_number)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


class BlockStream:
    """Events of an answer to the `content_block` events of a stream, one block open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def add(self, event: Event) -> list[dict[str, Any]]:
        """The events to send for this one; the last block is closed by `Finish`."""
        match event:
            case ReasoningDelta(text):
                started = self._begin("thinking", {"thinking": "", "signature": ""})
                return [*started, self._delta({"type": "thinking_delta", "thinking": text})]
            case ContentDelta(text):
                return [*self._begin("text", {"text": ""}), self._delta({"type": "text_delta", "text": text})]
            case ToolStart(_, id, name):
                ended = self._end()
                return [*ended, *self._begin("tool_use", {"id": id, "name": name, "input": {}})]
            case ToolArguments(_, text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case Finish():
                return self._end()

    def _begin(self, form: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        if self._open == form:
            return []
        ended = self._end()
        self._index, self._open = self._index + 1, form
        start = {
            "type": "content_block_start",
            "index": self._index,
            "content_block": {"type": form, **block},
        }
        return [*ended, start]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _end(self) -> list[dict[str, Any]]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]


def _whole_number(digits: str) -> int | str:
    """An integer; as text if it has more digits than Python converts."""
    try:
        return int(digits)
    except ValueError:
        return digits
