"""Messages and events of an answer in OpenAI's form. Pure functions."""

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
from dsv4_jax.serving.chat.messages import Message, Text, ToolCall


def message_to_openai(message: Message) -> dict[str, Any]:
    """A message of texts, such as `/save` of `dsv4 chat` writes it."""
    content = "\n\n".join(part.text for part in message.parts if isinstance(part, Text))
    result: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning is not None:
        result["reasoning_content"] = message.reasoning
    if message.tool_calls:
        result["tool_calls"] = [_call(call) for call in message.tool_calls]
    return result


def answer_to_openai(answer: Answer) -> dict[str, Any]:
    """The `message` of a choice: `content` is null where nothing was said."""
    result: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning is not None:
        result["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        result["tool_calls"] = [_call(call) for call in answer.tool_calls]
    return result


def delta_to_openai(event: Event) -> dict[str, Any]:
    """The `delta` of a chunk; empty for the end, whose reason stands beside it."""
    match event:
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolStart(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case ToolArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case Finish():
            return {}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
