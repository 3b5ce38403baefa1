"""Conversations as the server holds them, whatever wire format they came in.

OpenAI's chat completions and Anthropic's messages are both converted to these (`from_openai`,
`from_anthropic`), and the prompt is rendered from them alone (`render`). Nothing here was checked: the
conversions do that.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Role = Literal["system", "developer", "user", "tool", "assistant", "latest_reminder"]
ROLES: tuple[str, ...] = ("system", "developer", "user", "tool", "assistant", "latest_reminder")


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Words of a user, a tool or a model: always ordinary text, never control tokens."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Unsupported:
    """A part of a tool's result that is no text, such as an image; only its kind is told to the model."""

    kind: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered.

    Attributes:
        call_id: of the call that it answers, if the client said so.
        parts: the answer.
    """

    call_id: str | None
    parts: tuple[Text | Unsupported, ...]


Part = Text | ToolResult


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made.

    Attributes:
        id: by which a result refers to it.
        name: of the tool.
        arguments: JSON text of an object; of an earlier turn it is whatever the client sent.
    """

    id: str | None
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
    """A tool that may be called.

    Attributes:
        function: the `function` object of OpenAI's form, in the client's order of keys: name, description,
            parameters (a JSON schema) and what else the client says.
    """

    function: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.function["name"]

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The JSON schema of its arguments; empty if it takes none."""
        parameters = self.function.get("parameters")
        return parameters if isinstance(parameters, Mapping) else {}


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        role: who speaks. A "tool" message holds one `ToolResult`; a user message may hold some, too.
        parts: what is said.
        reasoning: of an assistant, before its answer; None and "" are rendered alike.
        tool_calls: of an assistant.
        tools: of a system or developer message: the block of tools stands after its text.
        response_schema: of a system or developer message: the JSON value that an answer must fit.
        task: the quick instruction that follows the message (`control.TASKS`).
        unfinished: an assistant's message that the model goes on with, so without an end.
    """

    role: Role
    parts: tuple[Part, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[Tool, ...] = ()
    response_schema: Any = None
    task: str | None = None
    unfinished: bool = False


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Everything of a request that decides about its prompt and about how its answer is read.

    Attributes:
        messages: with tools and schema at their places, see `placed`.
        thinking: whether the model reasons before it answers.
        effort: one of the profile's efforts ("low", "high", "max").
        tools: that the answer may call; empty with the choice "none".
        tool_choice: "none", "auto", "required", or the name of a tool in a tuple of one.
        response_format: "text", "json_object" or "json_schema".
        response_schema: of "json_schema".
        warnings: what was accepted although it has no effect, for a header or a log.
    """

    messages: tuple[Message, ...]
    thinking: bool
    effort: str
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["none", "auto", "required"] | tuple[str] = "auto"
    response_format: Literal["text", "json_object", "json_schema"] = "text"
    response_schema: Any = None
    warnings: tuple[str, ...] = ()


def text_message(role: Role, text: str, **fields: Any) -> Message:
    """A message of one text; `fields` as of `Message`."""
    return Message(role, (Text(text),), **fields)


def placed(messages: Iterable[Message], tools: Sequence[Tool] = (), schema: Any = None) -> list[Message]:
    """The messages with the tools and the response schema of a whole request at their places.

    Tools go to the first message if it is a system or developer message, and replace tools on it; the schema
    goes to the first system message. Where there is none, an empty system message is put in front.
    """
    messages = list(messages)
    if tools:
        if not messages or messages[0].role not in ("system", "developer"):
            messages.insert(0, Message("system"))
        messages[0] = dataclasses.replace(messages[0], tools=tuple(tools))
    if schema is not None:
        first = next((i for i, message in enumerate(messages) if message.role == "system"), None)
        if first is None:
            messages.insert(0, Message("system"))
            first = 0
        messages[first] = dataclasses.replace(messages[first], response_schema=schema)
    return messages


def json_text(value: Any) -> str:
    """JSON as it stands in a prompt: `, ` and `: `, only the needed escapes, the order of keys kept."""
    return json.dumps(value, ensure_ascii=False)
