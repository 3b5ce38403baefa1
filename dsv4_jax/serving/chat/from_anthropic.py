"""A request of Anthropic's messages, as parsed from JSON, to a conversation. Pure functions.

Blocks map onto V4's format: `tool_use` is a call, `tool_result` a result inside the user's turn, `thinking`
the reasoning of an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_jax.serving.chat.from_openai import result_parts
from dsv4_jax.serving.chat.messages import (
    Conversation,
    Message,
    Part,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    json_text,
    placed,
)
from dsv4_jax.serving.chat.profile import Profile
from dsv4_jax.serving.chat.wire import (
    MAX_CALLS,
    MAX_MESSAGES,
    MAX_SCHEMA_CHARS,
    MAX_TOOLS,
    Problems,
    RequestError,
    kind,
)

_USER_BLOCKS = ("text", "tool_result")
_ASSISTANT_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use")


def conversation_from_anthropic(
    body: Mapping[str, Any], profile: Profile, *, thinks_unasked: bool = False
) -> Conversation:
    """The conversation of a request.

    Args:
        body: the request. Of it are read `system`, `messages`, `tools`, `tool_choice`, `thinking` and
            `output_config`; everything else is somebody else's.
        profile: of the model.
        thinks_unasked: whether a request that says nothing about thinking and effort gets it.

    Raises:
        RequestError: with all problems.
    """
    problems = Problems()
    warnings: list[str] = []
    messages = _messages(body.get("messages"), problems, warnings)
    if (system := body.get("system")) is not None:
        messages.insert(0, Message("system", _texts("system", system, problems)))
    tools = _tools(body.get("tools"), problems)
    choice = _tool_choice(body.get("tool_choice"), tools, problems)
    thinking, effort, schema = _manner(body, profile, thinks_unasked, problems)
    if problems:
        raise RequestError("the request cannot be used", problems)
    if choice == "none":
        tools = ()
    return Conversation(
        messages=tuple(placed(messages, tools, schema)),
        thinking=thinking,
        effort=effort,
        tools=tools,
        tool_choice=choice,
        response_format="text" if schema is None else "json_schema",
        response_schema=schema,
        warnings=tuple(warnings),
    )


def _messages(values: object, problems: Problems, warnings: list[str]) -> list[Message]:
    array = problems.array("messages", values, MAX_MESSAGES)
    if not array and not problems:
        problems.say("messages", "needs at least one message")
    messages: list[Message] = []
    for index, value in enumerate(array):
        path = f"messages[{index}]"
        raw = problems.object(path, value)
        role = (
            None if raw is None else problems.one_of(f"{path}.role", raw.get("role"), ("user", "assistant"))
        )
        if raw is None or role is None:
            continue
        blocks = _blocks(f"{path}.content", raw.get("content"), problems)
        if role == "user":
            messages.append(Message("user", _user_parts(f"{path}.content", blocks, problems)))
            continue
        message = _assistant(f"{path}.content", blocks, problems, warnings)
        if messages and messages[-1].role == "assistant":
            messages[-1] = _joined(messages[-1], message)
        else:
            messages.append(message)
    if messages and messages[-1].role == "assistant":  # the beginning of the answer that is asked for
        last = messages.pop()
        if last.tool_calls:
            problems.say(f"messages[{len(array) - 1}]", "needs the results of its calls after it")
        messages.append(Message("assistant", last.parts, last.reasoning, unfinished=True))
    return messages


def _blocks(path: str, value: object, problems: Problems) -> list[tuple[str, Mapping[str, Any]]]:
    """(path, block) of every block; a text alone is one block."""
    if isinstance(value, str):
        return [(path, {"type": "text", "text": value})]
    if not isinstance(value, (list, tuple)):
        problems.say(path, f"must be a string or an array of blocks, not {kind(value)}")
        return []
    if not value:
        problems.say(path, "needs at least one block")
    found = []
    for index, each in enumerate(value):
        raw = problems.object(f"{path}[{index}]", each)
        if raw is not None:
            found.append((f"{path}[{index}]", raw))
    return found


def _user_parts(path: str, blocks: Sequence[tuple[str, Mapping]], problems: Problems) -> tuple[Part, ...]:
    parts: list[Part] = []
    for where, raw in blocks:
        form = problems.one_of(f"{where}.type", raw.get("type"), _USER_BLOCKS)
        if form == "text":
            parts.append(Text(problems.text(_text_path(where, path), raw.get("text"))))
        elif form == "tool_result":
            call_id = problems.text(f"{where}.tool_use_id", raw.get("tool_use_id"))
            content = raw.get("content")
            said = () if content is None else result_parts(f"{where}.content", content, problems)
            parts.append(ToolResult(call_id, said))
    return tuple(parts)


def _assistant(
    path: str, blocks: Sequence[tuple[str, Mapping]], problems: Problems, warnings: list[str]
) -> Message:
    parts: list[Text] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for where, raw in blocks:
        form = problems.one_of(f"{where}.type", raw.get("type"), _ASSISTANT_BLOCKS)
        if form == "text":
            parts.append(Text(problems.text(_text_path(where, path), raw.get("text"))))
        elif form == "thinking":
            thoughts.append(problems.text(f"{where}.thinking", raw.get("thinking")))
        elif form == "redacted_thinking":
            warnings.append(f"{where}: ignored; this server does not write redacted thinking")
        elif form == "tool_use":
            calls.append(_call(where, raw, problems))
    if len(calls) > MAX_CALLS:
        problems.say(path, f"has {len(calls)} calls; at most {MAX_CALLS} are accepted")
    return Message("assistant", tuple(parts), "\n\n".join(thoughts) or None, tuple(calls))


def _call(path: str, raw: Mapping[str, Any], problems: Problems) -> ToolCall:
    id = problems.text(f"{path}.id", raw.get("id"))
    name = problems.name(f"{path}.name", raw.get("name"))
    given = problems.object(f"{path}.input", raw.get("input"))
    if given is None or problems.json(f"{path}.input", given) is None:
        return ToolCall(id, name, "{}")
    arguments = json_text(given)
    problems.arguments(f"{path}.input", arguments)
    return ToolCall(id, name, arguments)


def _joined(first: Message, second: Message) -> Message:
    thoughts = [message.reasoning for message in (first, second) if message.reasoning]
    return Message(
        "assistant",
        first.parts + second.parts,
        "\n\n".join(thoughts) or None,
        first.tool_calls + second.tool_calls,
    )


def _texts(path: str, value: object, problems: Problems) -> tuple[Text, ...]:
    texts = []
    for where, raw in _blocks(path, value, problems):
        if problems.one_of(f"{where}.type", raw.get("type"), ("text",)):
            texts.append(Text(problems.text(_text_path(where, path), raw.get("text"))))
    return tuple(texts)


def _text_path(where: str, whole: str) -> str:
    return where if where == whole else f"{where}.text"


def _tools(values: object, problems: Problems) -> tuple[Tool, ...]:
    if values is None:
        return ()
    tools: list[Tool] = []
    for index, value in enumerate(problems.array("tools", values, MAX_TOOLS)):
        path = f"tools[{index}]"
        raw = problems.object(path, value)
        if raw is None:
            continue
        problems.one_of(f"{path}.type", raw.get("type", "custom"), ("custom",))
        function = {
            ours: raw[theirs]
            for ours, theirs in (
                ("name", "name"),
                ("description", "description"),
                ("parameters", "input_schema"),
            )
            if theirs in raw
        }
        tool = problems.tool(path, function, "input_schema")
        if tool.name != "?" and tool.name in {each.name for each in tools}:
            problems.say(f"{path}.name", "is the name of an earlier tool, too")
        tools.append(tool)
    return tuple(tools)


def _tool_choice(value: object, tools: Sequence[Tool], problems: Problems) -> Any:
    if value is None:
        return "auto" if tools else "none"
    raw = problems.object("tool_choice", value)
    if raw is None:
        return None
    form = problems.one_of("tool_choice.type", raw.get("type"), ("auto", "any", "tool", "none"))
    if form in ("any", "tool") and not tools:
        problems.say("tool_choice", f"{form} needs tools")
    if form == "tool":
        if raw.get("name") not in [tool.name for tool in tools]:
            problems.say("tool_choice.name", "is no name of a tool of this request")
        return (raw.get("name"),)
    return "required" if form == "any" else form


def _manner(
    body: Mapping[str, Any], profile: Profile, thinks_unasked: bool, problems: Problems
) -> tuple[bool, str, Any]:
    """(whether to think, effort, schema of the response)."""
    thinking, effort, schema = thinks_unasked, profile.default_effort, None
    config = body.get("output_config")
    config = {} if config is None else problems.object("output_config", config) or {}
    if (asked := config.get("effort")) is not None:
        try:
            thinking, effort = profile.effort(asked)
        except ValueError as error:
            problems.say("output_config.effort", str(error))
    if (form := config.get("format")) is not None:
        path = "output_config.format"
        raw = problems.object(path, form)
        if raw is not None and problems.one_of(f"{path}.type", raw.get("type"), ("json_schema",)):
            schema = problems.object(f"{path}.schema", raw.get("schema"))
            schema = None if schema is None else problems.json(f"{path}.schema", schema)
            if schema is not None and len(json_text(schema)) > MAX_SCHEMA_CHARS:
                problems.say(f"{path}.schema", f"is larger than {MAX_SCHEMA_CHARS} characters")
    if (switch := body.get("thinking")) is not None:
        raw = problems.object("thinking", switch)
        kinds = ("enabled", "adaptive", "disabled")
        said = None if raw is None else problems.one_of("thinking.type", raw.get("type"), kinds)
        thinking = said != "disabled" and config.get("effort") != "none"
    return thinking, effort, schema
