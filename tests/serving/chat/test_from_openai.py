"""Requests of OpenAI's form: what they become, and what is wrong with them, all of it, by path."""

import json
import random

import pytest

from dsv4_jax.serving.chat import from_openai, messages, render, to_openai
from dsv4_jax.serving.chat.from_openai import RequestError, conversation_from_openai
from dsv4_jax.serving.chat.messages import Text, ToolCall, ToolResult, Unsupported, text_message
from dsv4_jax.serving.chat.profile import OWN
from tests.serving.chat.turns import CORPUS, Read

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "q"}


def converted(*conversation, **request):
    return conversation_from_openai({"messages": list(conversation) or [USER], **request}, OWN)


def problems(*conversation, **request):
    with pytest.raises(RequestError) as refused:
        converted(*conversation, **request)
    return list(refused.value.problems)


def test_a_plain_request():
    got = converted({"role": "developer", "content": "S"}, USER)
    assert got.messages == (text_message("system", "S"), text_message("user", "q"))
    assert (got.thinking, got.effort, got.tools, got.tool_choice) == (True, "high", (), "none")
    assert (got.response_format, got.response_schema, got.warnings) == ("text", None, ())


def test_a_developer_may_have_a_turn_of_its_own():
    body = {"messages": [{"role": "developer", "content": "D"}]}
    assert conversation_from_openai(body, OWN, developer_turns=True).messages[0].role == "developer"


def test_everything_that_a_message_may_hold():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    got = converted(
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "x",
        },
        {"role": "latest_reminder", "content": "L"},
        {**USER, "task": "query", "mask": 1},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "1",
            "content": [{"type": "text", "text": "t"}, {"type": "image_url"}],
        },
        {"role": "assistant", "content": "c", "reasoning_content": "R", "prefix": True},
        tools=[TOOL],
    )
    assert [message.role for message in got.messages] == [
        "system",
        "latest_reminder",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert got.messages[0].parts == (Text("a"), Text("b")) and got.messages[0].tools == got.tools
    assert got.messages[2].task == "query"
    assert got.messages[3] == messages.Message("assistant", (), "r", (ToolCall("1", "f", '{"a": 1}'),))
    assert got.messages[4].parts == (ToolResult("1", (Text("t"), Unsupported("image_url"))),)
    assert got.messages[5].unfinished and got.messages[5].reasoning == "R"
    text = render.text_of(render.render(got.messages, OWN))
    assert text.endswith("<think>R</think>c")


def test_arguments_as_an_object_are_the_object():
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": ["é"]}}}
    got = converted(USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"})
    assert got.messages[1].tool_calls[0].arguments == '{"a": ["é"]}'


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, (True, "high")),
        ({"reasoning_effort": "none"}, (False, "high")),
        ({"reasoning_effort": "ultra"}, (True, "max")),
        ({"thinking": {"type": "disabled"}}, (False, "high")),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "low"}, (True, "low")),
        ({"chat_template_kwargs": {"thinking": False}}, (False, "high")),
        ({"chat_template_kwargs": {"enable_thinking": True}}, (True, "high")),
    ],
)
def test_thinking(request_, expected):
    got = converted(**request_)
    assert (got.thinking, got.effort) == expected


def test_tools_and_their_choice():
    assert converted(tools=[TOOL]).tool_choice == "auto"
    got = converted(tools=[TOOL], tool_choice="none")
    assert got.tools == () and got.messages == (text_message("user", "q"),)
    got = converted(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}})
    assert got.tool_choice == ("f",) and got.messages[0].tools[0].parameters == {"type": "object"}
    assert converted(tools=[TOOL], tool_choice="required").tool_choice == "required"
    (warning,) = converted({**USER, "tools": [TOOL]}).warnings
    assert warning.startswith("messages[0].tools: ignored")
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    given = (USER, call, {"role": "tool", "tool_call_id": "1", "content": "r"})
    (warning,) = converted(*given, tools=[TOOL]).warnings
    assert warning.startswith("messages[1].reasoning_content: missing beside tool calls")
    assert converted(*given, tools=[TOOL], reasoning_effort="none").warnings == ()


def test_formats_of_a_response():
    schema = {"type": "object"}
    got = converted(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert got.response_schema == schema == got.messages[0].response_schema
    got = converted(response_format={"type": "json_object"})
    assert got.response_format == "json_object" and got.messages == (text_message("user", "q"),)


ASSISTANT = {"role": "assistant", "content": "x"}
DEEP = json.loads("[" * 70 + "]" * 70)
REFUSED = {
    "no list": ({"messages": "x"}, ["messages: must be an array, not a string"]),
    "no messages": ({"messages": []}, ["messages: needs at least one message"]),
    "nothing": ({}, ["messages: must be an array, not null"]),
    "role": ({"messages": [{"role": "bot"}]}, ["messages[0].role: 'bot' must be one of system, "]),
    "empty objects": (
        {
            "messages": [{}, {"role": "user", "content": [{}]}],
            "tools": [{}],
            "tool_choice": {},
            "thinking": {},
        },
        [
            "messages[0].role: must be one of",
            "messages[1].content[0].type: must be one of text",
            "tools[0].function: must be an object, not null",
            "tool_choice.type: must be",
            "tool_choice.function: must be an object, not null",
            "thinking.type: must be",
        ],
    ),
    "no object": ({"messages": [USER, 3]}, ["messages[1]: must be an object, not a number"]),
    "null of a user": (
        {"messages": [{"role": "user"}]},
        ["messages[0].content: must be a string or an array"],
    ),
    "null of a tool": (
        {"messages": [{"role": "tool"}]},
        ["messages[0].content: must be a string or an array"],
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        ["messages[0].content[0].type: 'image_url' must be one of text"],
    ),
    "part": (
        {"messages": [{"role": "user", "content": ["x"]}]},
        ["messages[0].content[0]: must be an object"],
    ),
    "half a character": (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        ["messages[0].content: holds half"],
    ),
    "task": ({"messages": [{**USER, "task": "cook"}]}, ["messages[0].task: 'cook' must be one of action"]),
    "last system": (
        {"messages": [USER, {"role": "system", "content": "S"}]},
        ["messages[1]: the last message"],
    ),
    "last assistant": ({"messages": [USER, ASSISTANT]}, ["messages[1]: is the assistant's own"]),
    "two assistants": (
        {"messages": [USER, ASSISTANT, ASSISTANT, USER]},
        ["messages[2]: follows another message of the assistant"],
    ),
    "prefix inside": (
        {"messages": [USER, {**ASSISTANT, "prefix": True}, USER]},
        ["messages[1].prefix: only the last message"],
    ),
    "prefix": (
        {"messages": [USER, {**ASSISTANT, "prefix": 1}]},
        ["messages[1].prefix: must be true or false, not"],
    ),
    "call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{}, 3, {"function": {"name": "a b"}}]},
                USER,
            ]
        },
        [
            "messages[1].tool_calls[0].function: must be an object, not null",
            "messages[1].tool_calls[1]: must be an object",
            "messages[1].tool_calls[2].function.name: must be 1 to 64 letters",
        ],
    ),
    "tool name": (
        {"tools": [{"function": {"name": 'a"b'}}], "messages": [USER]},
        ["tools[0].function.name: must be"],
    ),
    "same tools": (
        {"tools": [TOOL, TOOL], "messages": [USER]},
        ["tools[1].function.name: is the name of an earlier"],
    ),
    "tool type": (
        {"tools": [{**TOOL, "type": "web"}], "messages": [USER]},
        ["tools[0].type: 'web' must be one of"],
    ),
    "too many tools": ({"tools": [TOOL] * 129, "messages": [USER]}, ["tools: has 129 elements; at most 128"]),
    "too many messages": ({"messages": [USER] * 2049}, ["messages: has 2049 elements"]),
    "deep schema": (
        {"tools": [{"function": {"name": "f", "parameters": {"a": DEEP}}}], "messages": [USER]},
        ["tools[0].function: is nested deeper than 64"],
    ),
    "endless number": (
        {"tools": [{"function": {"name": "f", "parameters": {"a": 10**5000}}}], "messages": [USER]},
        ["tools[0].function: holds an integer of more digits"],
    ),
    "infinite schema": (
        {"tools": [{"function": {"name": "f", "parameters": {"a": float("inf")}}}], "messages": [USER]},
        ["tools[0].function: holds a number that is not finite"],
    ),
    "choice": ({"tool_choice": "maybe", "messages": [USER]}, ["tool_choice: 'maybe' must be one of"]),
    "required without tools": (
        {"tool_choice": "required", "messages": [USER]},
        ["tool_choice: required needs tools"],
    ),
    "choice of nobody": (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL], "messages": [USER]},
        ["tool_choice.function.name: is no name of a tool"],
    ),
    "format": (
        {"response_format": {"type": "xml"}, "messages": [USER]},
        ["response_format.type: 'xml' must be one"],
    ),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {}}, "messages": [USER]},
        ["response_format.json_schema.schema: must be an object, not null"],
    ),
    "large schema": (
        {
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 300_000}}},
            "messages": [USER],
        },
        ["response_format.json_schema.schema: is larger than"],
    ),
    "effort": (
        {"reasoning_effort": "most", "messages": [USER]},
        ["reasoning_effort: 'most' must be one of none, "],
    ),
    "effort type": (
        {"reasoning_effort": 3, "messages": [USER]},
        ["reasoning_effort: must be one of none, "],
    ),
    "thinking": ({"thinking": {"type": "on"}, "messages": [USER]}, ["thinking.type: 'on' must be one of"]),
    "template": (
        {"chat_template": "{{ 7*7 }}", "messages": [USER]},
        ["chat_template: templates are not accepted"],
    ),
    "template arguments": (
        {"chat_template_kwargs": {"thinking": "yes", "x": 1}, "messages": [USER]},
        ["chat_template_kwargs.thinking: must be true or false", "chat_template_kwargs: only thinking and"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_told_by_path(name):
    body, expected = REFUSED[name]
    with pytest.raises(RequestError) as refused:
        conversation_from_openai(body, OWN)
    found = refused.value.problems
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": [Infinity]}', '{"a": 1e400}'])
def test_numbers_that_json_does_not_have_are_refused(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    (problem,) = problems(USER, {"role": "assistant", "tool_calls": [call]}, USER)
    assert problem.startswith("messages[1].tool_calls[0].function.arguments: ")


@pytest.mark.parametrize("name", ['a"b', "a<b", "a>b", "a\nb"])
def test_names_of_arguments_that_would_break_a_tag_are_refused(name):
    call = {"function": {"name": "f", "arguments": json.dumps({name: 1})}}
    (problem,) = problems(USER, {"role": "assistant", "tool_calls": [call]}, USER)
    assert "a name of an argument may not hold" in problem


def test_all_problems_come_at_once_and_repeat_nothing_of_the_client():
    found = problems(
        {"role": "user", "content": 7},
        {"role": "assistant", "content": ["SECRET"]},
        tools=[{"function": {"name": "SECRET name"}}],
        reasoning_effort="most",
        response_format={"type": "xml"},
    )
    assert [problem.split(":")[0] for problem in found] == [
        "messages[0].content",
        "messages[1].content[0]",
        "tools[0].function.name",
        "response_format.type",
        "reasoning_effort",
    ]
    assert "SECRET" not in "\n".join(found)


def test_a_message_becomes_openais_form_again():
    given = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "x",
            "reasoning_content": "r",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
    ]
    read = from_openai.messages_from_openai(given)
    assert [to_openai.message_to_openai(message) for message in read] == given
    with pytest.raises(RequestError, match="the messages cannot be used"):
        from_openai.messages_from_openai([{"role": "x"}])


ODD = (
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
    ["x", {}],
    10**400,
    10**9999,
)


def changed(draw, value):
    """`value` with one thing in it replaced, removed or repeated."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.2:
        return draw.choice(ODD)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = draw.choice(list(copy)) if isinstance(copy, dict) else draw.randrange(len(copy))
    if draw.random() < 0.1:
        del copy[key]
    elif draw.random() < 0.1 and isinstance(copy, list):
        copy.append(copy[key])
    else:
        copy[key] = changed(draw, copy[key])
    return copy


def test_whatever_is_sent_is_rendered_or_refused():
    """The encoder takes everything that the conversion lets through."""
    draw = random.Random(0)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "b"]}'}}
    whole = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            {**USER, "task": "query"},
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "t"}]},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "reasoning_effort": "max",
        "thinking": {"type": "enabled"},
        "chat_template_kwargs": {"thinking": True},
    }
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        body = whole
        for _ in range(draw.randrange(1, 4)):
            body = changed(draw, body)
        if not isinstance(body, dict):
            continue
        try:
            got = conversation_from_openai(body, OWN)
        except RequestError as refused:
            outcomes[False] += 1
            assert all(": " in problem for problem in refused.problems)
            continue
        outcomes[True] += 1
        render.text_of(render.render(got.messages, OWN, thinking=got.thinking, effort=got.effort)).encode()
    assert min(outcomes.values()) > 100


def test_deltas_sum_up_to_the_message():
    """As a client sums them up, for every text of the parser's corpus."""
    for text, reasoning in CORPUS.values():
        read = Read(list(text), reasoning=reasoning)
        summed, calls = {"role": "assistant"}, {}
        for event in read.events:
            for key, value in to_openai.delta_to_openai(event).items():
                if key != "tool_calls":
                    summed[key] = summed.get(key, "") + value
                    continue
                (piece,) = value
                call = calls.setdefault(piece["index"], {"function": {"name": "", "arguments": ""}})
                call |= {name: piece[name] for name in ("id", "type") if name in piece}
                for name, more in piece["function"].items():
                    call["function"][name] += more
        if calls:
            summed["tool_calls"] = list(calls.values())
        summed.setdefault("content", None)
        assert summed == to_openai.answer_to_openai(read.answer)
