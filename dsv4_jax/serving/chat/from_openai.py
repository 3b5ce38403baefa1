"""A request of OpenAI's chat completions, as parsed from JSON, to a conversation. Pure functions.

Problems are collected with the path of each, so that a client sees all of them at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.messages import (
    ROLES,
    Conversation,
    Message,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Unsupported,
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

_THINKING_KEYS = ("thinking", "enable_thinking")


def conversation_from_openai(
    body: Mapping[str, Any], profile: Profile, *, developer_turns: bool = False
) -> Conversation:
    """The conversation of a request.

    Args:
        body: the request. Of it are read `messages`, `tools`, `tool_choice`, `response_format`,
            `reasoning_effort`, `thinking` and `chat_template_kwargs`; everything else is somebody else's.
        profile: of the model.
        developer_turns: OpenAI's "developer" is a turn of its own, as in V4's format; otherwise a system
            message.

    Raises:
        RequestError: with all problems.
    """
    problems = Problems()
    warnings: list[str] = []
    messages = read_messages(body.get("messages"), problems, warnings, developer_turns=developer_turns)
    if not problems:
        order_problems(messages, problems)
    tools = tuple(read_tools("tools", body.get("tools"), problems))
    choice = _tool_choice(body.get("tool_choice"), tools, problems)
    form, schema = _response_format(body.get("response_format"), problems)
    thinking, effort = _thinking(body, profile, problems)
    if problems:
        raise RequestError("the request cannot be used", problems)
    if choice == "none":
        tools = ()
    if thinking and tools:  # reasoning of earlier turns is then part of the prompt
        warnings += [
            f"messages[{index}].reasoning_content: missing beside tool calls; rendered as empty"
            for index, message in enumerate(messages)
            if message.role == "assistant" and message.tool_calls and message.reasoning is None
        ]
    return Conversation(
        messages=tuple(placed(messages, tools, schema)),
        thinking=thinking,
        effort=effort,
        tools=tools,
        tool_choice=choice,
        response_format=form,
        response_schema=schema,
        warnings=tuple(warnings),
    )


def messages_from_openai(
    values: Sequence[Mapping[str, Any]], *, developer_turns: bool = True
) -> list[Message]:
    """Messages alone, such as those of a dataset; they may end with an assistant's. Errors as above."""
    problems = Problems()
    messages = read_messages(values, problems, [], developer_turns=developer_turns)
    if problems:
        raise RequestError("the messages cannot be used", problems)
    return messages


def read_messages(
    values: object, problems: Problems, warnings: list[str], *, developer_turns: bool
) -> list[Message]:
    """Every message that can be read; the rest is told to `problems`."""
    array = problems.array("messages", values, MAX_MESSAGES)
    if not array and not problems:
        problems.say("messages", "needs at least one message")
    messages = []
    for index, value in enumerate(array):
        path = f"messages[{index}]"
        raw = problems.object(path, value)
        role = problems.one_of(f"{path}.role", raw.get("role"), ROLES) if raw is not None else None
        if role is None:
            continue
        if role == "developer" and not developer_turns:
            role = "system"
        messages.append(_message(path, role, raw, problems, warnings))
    return messages


def order_problems(messages: Sequence[Message], problems: Problems) -> None:
    """What a model cannot go on from."""
    last = len(messages) - 1
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.unfinished and index != last:
            problems.say(f"{path}.prefix", "only the last message can be continued")
        if message.role == "assistant" and index and messages[index - 1].role == "assistant":
            if not messages[index - 1].task and not message.unfinished:
                problems.say(path, "follows another message of the assistant")
    if not messages or messages[last].task:
        return
    if messages[last].role == "system":
        problems.say(f"messages[{last}]", "the last message must not be a system message")
    if messages[last].role == "latest_reminder" and not any(m.role in ("user", "tool") for m in messages):
        problems.say(f"messages[{last}]", "a reminder needs a message of a user")
    if messages[last].role == "assistant" and not messages[last].unfinished:
        problems.say(f"messages[{last}]", "is the assistant's own; prefix: true continues it")


def read_tools(path: str, values: object, problems: Problems) -> list[Tool]:
    """The tools of a request or a message."""
    if values is None:
        return []
    tools = []
    for index, value in enumerate(problems.array(path, values, MAX_TOOLS)):
        where = f"{path}[{index}]"
        raw = problems.object(where, value)
        if raw is None:
            continue
        problems.one_of(f"{where}.type", raw.get("type", "function"), ("function",))
        tool = problems.tool(f"{where}.function", raw.get("function"))
        if tool.name != "?" and tool.name in {each.name for each in tools}:
            problems.say(f"{where}.function.name", "is the name of an earlier tool, too")
        tools.append(tool)
    return tools


def _message(
    path: str, role: str, raw: Mapping[str, Any], problems: Problems, warnings: list[str]
) -> Message:
    task = raw.get("task")
    if task is not None:
        task = problems.one_of(f"{path}.task", task, tuple(control.TASKS))
    tools: tuple[Tool, ...] = ()
    if raw.get("tools"):
        if role in ("system", "developer"):
            tools = tuple(read_tools(f"{path}.tools", raw["tools"], problems))
        else:
            warnings.append(f"{path}.tools: ignored; tools belong to the request or to a system message")
    schema = None
    if role in ("system", "developer") and raw.get("response_format") is not None:
        schema = problems.json(f"{path}.response_format", raw["response_format"])
    content = f"{path}.content"
    if role == "tool":
        call_id = raw.get("tool_call_id")
        if call_id is not None:
            call_id = problems.text(f"{path}.tool_call_id", call_id)
        return Message("tool", (ToolResult(call_id, result_parts(content, raw.get("content"), problems)),))
    if role == "assistant":
        return _assistant(path, raw, task, problems)
    parts = text_parts(content, raw.get("content"), problems)
    if role == "developer" and not any(part.text for part in parts) and not problems:
        problems.say(content, "a developer message needs text")
    return Message(role, parts, tools=tools, response_schema=schema, task=task)


def _assistant(path: str, raw: Mapping[str, Any], task: str | None, problems: Problems) -> Message:
    parts = ()
    if raw.get("content") is not None:
        parts = text_parts(f"{path}.content", raw["content"], problems)
    key = "reasoning_content" if raw.get("reasoning_content") is not None else "reasoning"
    reasoning = raw.get(key)
    if reasoning is not None:
        reasoning = problems.text(f"{path}.{key}", reasoning)
    calls = []
    if raw.get("tool_calls") is not None:
        for index, value in enumerate(problems.array(f"{path}.tool_calls", raw["tool_calls"], MAX_CALLS)):
            calls.append(_call(f"{path}.tool_calls[{index}]", value, problems))
    unfinished = problems.flag(f"{path}.prefix", raw.get("prefix")) or (
        problems.flag(f"{path}.wo_eos", raw.get("wo_eos"))
    )
    return Message(
        "assistant", parts, reasoning=reasoning, tool_calls=tuple(calls), task=task, unfinished=unfinished
    )


def _call(path: str, value: object, problems: Problems) -> ToolCall:
    raw = problems.object(path, value)
    function = None if raw is None else problems.object(f"{path}.function", raw.get("function"))
    if raw is None or function is None:
        return ToolCall(None, "?", "")
    name = problems.name(f"{path}.function.name", function.get("name"))
    id = raw.get("id")
    if id is not None:
        id = problems.text(f"{path}.id", id)
    where, arguments = f"{path}.function.arguments", function.get("arguments", "")
    if isinstance(arguments, Mapping):  # some clients send the object itself
        arguments = "" if problems.json(where, arguments) is None else json_text(arguments)
    arguments = problems.text(where, arguments)
    problems.arguments(where, arguments)
    return ToolCall(id, name, arguments)


def text_parts(path: str, value: object, problems: Problems) -> tuple[Text, ...]:
    """Content that may only be text: a string, or an array of text parts."""
    if value is None:
        problems.say(path, "must be a string or an array of text parts, not null")
        return ()
    if isinstance(value, str):
        return (Text(problems.text(path, value)),)
    if not isinstance(value, (list, tuple)):
        problems.say(path, f"must be a string or an array of text parts, not {kind(value)}")
        return ()
    parts = []
    for index, each in enumerate(value):
        where = f"{path}[{index}]"
        raw = problems.object(where, each)
        if raw is not None and problems.one_of(f"{where}.type", raw.get("type"), ("text",)):
            parts.append(Text(problems.text(f"{where}.text", raw.get("text"))))
    return tuple(parts)


def result_parts(path: str, value: object, problems: Problems) -> tuple[Text | Unsupported, ...]:
    """Content of a tool's result: as `text_parts`, and parts of other kinds are only named to the model."""
    if not isinstance(value, (list, tuple)):
        return text_parts(path, value, problems)
    parts: list[Text | Unsupported] = []
    for index, each in enumerate(value):
        where = f"{path}[{index}]"
        raw = problems.object(where, each)
        if raw is None:
            continue
        kind_of_part = problems.text(f"{where}.type", raw.get("type"))
        if kind_of_part == "text":
            parts.append(Text(problems.text(f"{where}.text", raw.get("text"))))
        else:
            parts.append(Unsupported(kind_of_part))
    return tuple(parts)


def _tool_choice(value: object, tools: Sequence[Tool], problems: Problems) -> Any:
    if value is None:
        return "auto" if tools else "none"
    if isinstance(value, str):
        choice = problems.one_of("tool_choice", value, ("none", "auto", "required"))
        if choice == "required" and not tools:
            problems.say("tool_choice", "required needs tools")
        return choice
    raw = problems.object("tool_choice", value)
    if raw is None:
        return None
    problems.one_of("tool_choice.type", raw.get("type"), ("function",))
    function = problems.object("tool_choice.function", raw.get("function"))
    if function is None:
        return None
    name = function.get("name")
    if name not in [tool.name for tool in tools]:
        problems.say("tool_choice.function.name", "is no name of a tool of this request")
    return (name,)


def _response_format(value: object, problems: Problems) -> tuple[Any, Any]:
    if value is None:
        return "text", None
    raw = problems.object("response_format", value)
    if raw is None:
        return "text", None
    form = problems.one_of("response_format.type", raw.get("type"), ("text", "json_object", "json_schema"))
    if form != "json_schema":
        return form or "text", None
    where = "response_format.json_schema"
    inner = problems.object(where, raw.get("json_schema"))
    schema = None if inner is None else problems.object(f"{where}.schema", inner.get("schema"))
    if schema is not None:
        schema = problems.json(f"{where}.schema", schema)
    if schema is not None and len(json_text(schema)) > MAX_SCHEMA_CHARS:
        problems.say(f"{where}.schema", f"is larger than {MAX_SCHEMA_CHARS} characters")
    return form, schema


def _thinking(body: Mapping[str, Any], profile: Profile, problems: Problems) -> tuple[bool, str]:
    thinking, effort = True, profile.default_effort
    asked = body.get("reasoning_effort")
    if asked is not None:
        try:
            thinking, effort = profile.effort(asked)
        except ValueError as error:
            problems.say("reasoning_effort", str(error))
    if (value := body.get("thinking")) is not None:
        raw = problems.object("thinking", value)
        if raw is not None:
            switch = problems.one_of("thinking.type", raw.get("type"), ("enabled", "disabled"))
            thinking = thinking and switch != "disabled"
    if (value := body.get("chat_template_kwargs")) is not None:
        for key, flag in (problems.object("chat_template_kwargs", value) or {}).items():
            if key not in _THINKING_KEYS:
                problems.say("chat_template_kwargs", f"only {' and '.join(_THINKING_KEYS)} are accepted")
                continue
            thinking = problems.flag(f"chat_template_kwargs.{key}", flag, True) and thinking
    if body.get("chat_template") is not None:
        problems.say("chat_template", "templates are not accepted: the format is the model's")
    return thinking, effort
