"""Requests and answers of Anthropic's form."""

import json
import random

import pytest

from dsv4_jax.serving.chat import render, to_anthropic
from dsv4_jax.serving.chat.answer import Answer, Finish
from dsv4_jax.serving.chat.from_anthropic import conversation_from_anthropic
from dsv4_jax.serving.chat.messages import (
    Message,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Unsupported,
    text_message,
)
from dsv4_jax.serving.chat.profile import OWN
from dsv4_jax.serving.chat.wire import RequestError
from tests.serving.chat.test_from_openai import changed
from tests.serving.chat.turns import PARIS, Read, block, invoke, parameter

USER = {"role": "user", "content": "q"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1, "é"]}}
WHOLE = {
    "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "r", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "c"},
                USE,
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "content": [{"type": "text", "text": "t"}, {"type": "image"}],
                },
                {"type": "text", "text": "and?"},
            ],
        },
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}},
}


def converted(**body):
    return conversation_from_anthropic({"messages": [USER], **body}, OWN)


def test_everything_that_a_request_may_hold():
    got = converted(**WHOLE)
    tool = Tool({"name": "f", "description": "d", "parameters": {"type": "object"}})
    assert list(tool.function) == list(got.tools[0].function)
    assert got.messages == (
        text_message("system", "S", tools=(tool,), response_schema={"type": "object"}),
        text_message("user", "q"),
        Message("assistant", (Text("c"),), "r", (ToolCall("1", "f", '{"a": [1, "é"]}'),)),
        Message("user", (ToolResult("1", (Text("t"), Unsupported("image"))), Text("and?"))),
    )
    assert (got.thinking, got.effort, got.tool_choice) == (True, "max", ("f",))
    assert got.response_format == "json_schema"
    (warning,) = got.warnings
    assert warning.startswith("messages[1].content[1]: ignored")
    text = render.text_of(render.render(got.messages, OWN, effort=got.effort))
    results = "<tool_result>t\n\n[Unsupported image]</tool_result>\n\nand?<｜Assistant｜><think>"
    assert text.endswith("<｜User｜>" + results)


def test_the_beginning_of_an_answer_is_gone_on_with():
    got = converted(
        messages=[USER, {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}]
    )
    assert got.messages[-1] == Message("assistant", (Text("x"), Text("y")), unfinished=True)
    assert render.text_of(render.render(got.messages, OWN, thinking=False)).endswith("</think>x\n\ny")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (False, "high")),
        ({"thinking": {"type": "enabled"}}, (True, "high")),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, (True, "low")),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, (False, "low")),
        ({"output_config": {"effort": "xhigh"}}, (True, "high")),
        ({"output_config": {"effort": "none"}, "thinking": {"type": "enabled"}}, (False, "high")),
    ],
)
def test_thinking(body, expected):
    got = converted(**body)
    assert (got.thinking, got.effort) == expected


def test_thinking_may_be_the_servers_habit():
    assert conversation_from_anthropic({"messages": [USER]}, OWN, thinks_unasked=True).thinking


@pytest.mark.parametrize(
    ("given", "choice"), [("auto", "auto"), ("any", "required"), ("none", "none"), (None, "auto")]
)
def test_choices_of_tools(given, choice):
    got = converted(tools=[TOOL], tool_choice=given and {"type": given})
    assert got.tool_choice == choice and bool(got.tools) == (choice != "none")


REFUSED = [
    ({"messages": []}, ["messages: needs at least one message"]),
    ({"messages": [{}]}, ["messages[0].role: must be one of user, assistant"]),
    (
        {"messages": [{"role": "user"}]},
        ["messages[0].content: must be a string or an array of blocks, not null"],
    ),
    ({"messages": [{"role": "user", "content": []}]}, ["messages[0].content: needs at least one block"]),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {}, {"type": "tool_result"}]}]},
        [
            "messages[0].content[0].type: 'image' must be one of text, tool_result",
            "messages[0].content[1].type: must be",
            "messages[0].content[2].tool_use_id: must be a string, not null",
        ],
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [USE]}]},
        ["messages[1]: needs the results of its calls"],
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{**USE, "input": {'a"': 1}}]}, USER]},
        ["messages[1].content[0].input: a name of an argument"],
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{**USE, "input": {"a": float("nan")}}]}, USER]},
        ["messages[1].content[0].input: holds a number that is not finite"],
    ),
    ({"messages": [USER], "system": 3}, ["system: must be a string or an array of blocks, not a number"]),
    (
        {
            "messages": [USER],
            "tools": [{"type": "web_search_20250305", "name": "a b"}, {**TOOL, "input_schema": 1}],
        },
        [
            "tools[0].type: 'web_search_20250305' must be one of custom",
            "tools[0].name: must be 1 to 64",
            "tools[1].input_schema: must be an object, not a number",
        ],
    ),
    ({"messages": [USER], "tool_choice": {"type": "any"}}, ["tool_choice: any needs tools"]),
    (
        {"messages": [USER], "thinking": {"type": "on"}, "output_config": {"effort": "most", "format": {}}},
        [
            "output_config.effort: 'most' must be one of",
            "output_config.format.type: must be",
            "thinking.type: 'on' must be",
        ],
    ),
]


@pytest.mark.parametrize(("body", "expected"), REFUSED)
def test_what_is_wrong_is_told_by_path(body, expected):
    with pytest.raises(RequestError) as refused:
        conversation_from_anthropic(body, OWN)
    found = refused.value.problems
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


def test_whatever_is_sent_is_rendered_or_refused():
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        body = WHOLE
        for _ in range(draw.randrange(1, 4)):
            body = changed(draw, body)
        if not isinstance(body, dict):
            continue
        try:
            got = conversation_from_anthropic(body, OWN)
        except RequestError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        render.text_of(render.render(got.messages, OWN, thinking=got.thinking, effort=got.effort)).encode()
    assert min(outcomes.values()) > 100


def test_blocks_of_an_answer():
    call = ToolCall("1", "f", '{"a": 1, "b": ' + "9" * 5000 + "}")
    blocks = to_anthropic.blocks_of(Answer("r", "x", (call,), "tool_calls"))
    assert [each["type"] for each in blocks] == ["thinking", "text", "tool_use"]
    assert blocks[2]["input"] == {"a": 1, "b": "9" * 5000}
    assert to_anthropic.blocks_of(Answer(None, None)) == []
    assert to_anthropic.stop_reason("length") == "max_tokens"
    assert to_anthropic.stop_reason("stop", "END") == "stop_sequence"


@pytest.mark.parametrize(
    "text",
    [
        "r</think>x\n\n" + block(PARIS, invoke("f", parameter("a", "[1]", "false"))),
        "only",
        "</think>x",
        "r</think>",
    ],
)
def test_a_stream_of_blocks_sums_up_to_the_blocks(text):
    read = Read(list(text), reasoning=True)
    stream = to_anthropic.BlockStream()
    sent = [each for event in read.events for each in stream.add(event)]
    blocks, pieces = [], {}
    for each in sent:
        if each["type"] == "content_block_start":
            assert each["index"] == len(blocks)
            blocks.append(dict(each["content_block"]))
            open_index = each["index"]
        elif each["type"] == "content_block_delta":
            assert each["index"] == open_index
            (value,) = [value for key, value in each["delta"].items() if key != "type"]
            pieces.setdefault(open_index, []).append(value)
        else:
            assert each == {"type": "content_block_stop", "index": open_index}
            open_index = None
    keys = {"thinking": "thinking", "text": "text", "tool_use": "input"}
    for index, made in enumerate(blocks):
        whole = "".join(pieces[index])
        made[keys[made["type"]]] = json.loads(whole) if made["type"] == "tool_use" else whole
    assert blocks == to_anthropic.blocks_of(read.answer)
    assert isinstance(read.events[-1], Finish)
