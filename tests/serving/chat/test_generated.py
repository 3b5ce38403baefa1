"""Generated conversations: prompts agree with a second composition of the rules, and answers are read back.

The default run takes a few thousand; `-m slow` takes 100,000.
"""

import dataclasses
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_jax.serving.chat import answer, control, from_openai, messages, parser, render, tokens
from dsv4_jax.serving.chat.messages import Message, Text, Tool, ToolCall
from dsv4_jax.serving.chat.profile import OWN
from tests.serving.chat import official
from tests.serving.chat.composed import composed
from tests.serving.chat.official import needs_tokenizer
from tests.serving.chat.turns import CORPUS, Read, block, invoke, parameter

SHRINKING = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
"""Hypothesis finds small examples; what it draws is a source of random numbers, as the plain ones are."""

RANDOM = st.randoms(use_true_random=False)
SOME, MANY = 3_000, pytest.param(100_000, marks=pytest.mark.slow)
number = pytest.mark.parametrize("number", [SOME, MANY])

SNIPPETS = [
    "a",
    "B ",
    "é",
    "中",
    "\n",
    "\n\n",
    "<",
    "</",
    "<｜",
    "｜",
    "DSML",
    "<thin",
    "k>",
    '"',
    "{}",
    "\\",
    "1",
]
SNIPPETS += ["👩‍👧", "\0"]
NAMES = ["a", "location", "n_1", "长"]
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "<think>"}}
    for name in ("f", "get_weather")
]
PREFIXED = dataclasses.replace(OWN, effort_prefixes={"low": "", "high": "P1 {x}\n\n", "max": "P2\n"})


def words(draw: random.Random) -> str:
    return "".join(draw.choice(SNIPPETS) for _ in range(draw.randrange(7)))


def value(draw, depth=2):
    kinds = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.randrange(-(10**9), 10**20),
        lambda: draw.uniform(-9, 9) * 10 ** draw.randrange(-30, 30),
        lambda: words(draw),
        lambda: words(draw),
        lambda: [value(draw, depth - 1) for _ in range(draw.randrange(3))],
        lambda: values(draw, depth - 1),
    ]
    return draw.choice(kinds if depth else kinds[:6])()


def values(draw, depth=2):
    return {draw.choice(NAMES): value(draw, depth) for _ in range(draw.randrange(4))}


def calls_of(draw):
    count = draw.choice([0, 0, 1, 2, 3])
    return [(draw.choice(["f", "get_weather"]), messages.json_text(values(draw))) for _ in range(count)]


def message(draw, role):
    """One message in OpenAI's form."""
    made = {"role": role, "content": words(draw)}
    if role in ("user", "assistant") and draw.randrange(6) == 0:
        made["task"] = draw.choice(sorted(control.TASKS))
    if role == "tool":
        made["tool_call_id"] = draw.choice(["0", "1", "2", "x"])
    if role == "developer":
        made["content"] += "."
    if role in ("system", "developer"):
        if draw.randrange(4) == 0:
            made["tools"] = TOOLS[: draw.randrange(1, 3)]
        if draw.randrange(4) == 0:
            made["response_format"] = values(draw)
    if role == "assistant":
        made["reasoning_content"] = draw.choice([None, words(draw)])
        made["prefix"] = draw.randrange(9) == 0
        if calls := calls_of(draw):
            made["tool_calls"] = [
                {"id": str(index), "function": {"name": name, "arguments": arguments}}
                for index, (name, arguments) in enumerate(calls)
            ]
    return made


ROLES = ["system", "developer", "user", "user", "tool", "tool", "assistant", "assistant", "latest_reminder"]


def agrees_with_the_rules(draw):
    conversation = [message(draw, draw.choice(ROLES)) for _ in range(draw.randrange(1, 8))]
    thinking, drop, effort = draw.random() < 0.7, draw.random() < 0.7, draw.choice(["low", "high", "max"])
    read = from_openai.messages_from_openai(conversation)
    pieces = render.render(read, PREFIXED, thinking=thinking, effort=effort, drop_thinking=drop)
    expected = composed(
        conversation,
        thinking=thinking,
        drop=drop,
        prefix=PREFIXED.effort_prefixes[effort],
        tools_block=OWN.tools_block,
        response_format=OWN.response_format,
    )
    assert render.text_of(pieces) == expected
    assert all(piece.text for piece in pieces)
    assert not any(a.is_control == b.is_control is False for a, b in zip(pieces, pieces[1:], strict=False))
    assert all(piece.text in control.CONTROL for piece in pieces if piece.is_control)


@number
def test_prompts_agree_with_a_second_composition_of_the_rules(number):
    draw = random.Random(number)
    for _ in range(number):
        agrees_with_the_rules(draw)


@SHRINKING
@given(RANDOM)
def test_prompts_agree_with_a_second_composition_of_the_rules_small(draw):
    agrees_with_the_rules(draw)


DECLARED = tuple(Tool(tool["function"]) for tool in TOOLS)


def is_read_back(draw):
    thinking, size = draw.random() < 0.6, draw.choice([1, 3, 1000])
    reasoning, content, calls = words(draw), words(draw), calls_of(draw)
    texts = [reasoning, content, *(arguments for _, arguments in calls)]
    if any(mark in text for text in texts for mark in ("<think>", "</think>", control.DSML)):
        return
    turn = Message(
        "assistant",
        (Text(content.rstrip("\n") if calls else content),) if content.rstrip("\n" * bool(calls)) else (),
        (reasoning or None) if thinking else None,
        tuple(ToolCall(f"call_{i}", *call) for i, call in enumerate(calls)),
    )
    history = messages.placed([messages.text_message("user", "q")], DECLARED)
    before = render.text_of(render.render(history, OWN, thinking=thinking))
    pieces = render.render([*history, turn], OWN, thinking=thinking)
    written = render.text_of(pieces).removeprefix(before)
    assert written.endswith(control.EOS)
    pieces = [written[at : at + size] for at in range(0, len(written), size)]
    how = {"reasoning": thinking, "tools": DECLARED, "stream_arguments": draw.random() < 0.5}
    read = Read(pieces, **how)
    assert read.answer.message() == turn and read.recoveries == {}
    assert read.answer.finish_reason == ("tool_calls" if calls else "stop")


@number
def test_answers_are_read_back(number):
    draw = random.Random(number)
    for _ in range(number):
        is_read_back(draw)


@SHRINKING
@given(RANDOM)
def test_answers_are_read_back_small(draw):
    is_read_back(draw)


def is_gone_on_with(draw, tokenizer):
    thinking = draw.random() < 0.6
    calls = tuple(ToolCall(str(i), *call) for i, call in enumerate(calls_of(draw)))
    content = words(draw).rstrip("\n" if calls else "")
    turn = Message("assistant", (Text(content),) if content else (), words(draw) if thinking else None, calls)
    history = messages.placed([messages.text_message("user", words(draw) + ".")], DECLARED)
    before = render.render(history, OWN, thinking=thinking)
    written = render.render([*history, turn], OWN, thinking=thinking)
    assert written[: len(before)] == before
    generated = tokens.prompt_ids(tokenizer, written[len(before) :])
    reader = tokenizer.parser(reasoning=thinking, tools=DECLARED)
    answered = answer.answer_of(tokens.AnswerTokens(tokenizer, reader).add(generated)).message()
    later = render.render(
        [*history, answered, messages.text_message("user", words(draw))], OWN, thinking=thinking
    )
    expected = tokens.prompt_ids(tokenizer, before) + generated
    assert tokens.prompt_ids(tokenizer, later)[: len(expected)] == expected


@needs_tokenizer
def test_prompts_go_on_with_the_tokens_that_were_generated():
    """What a kept cache holds is the beginning of the next prompt."""
    draw = random.Random(0)
    for _ in range(300):
        is_gone_on_with(draw, official.real_tokenizer())


WELL_FORMED = "x\n\n" + block(
    invoke("get_weather", parameter("location", "2>&1 <b>"), parameter("days", "[1, {}]", "false")),
    invoke("f"),
)
BROKEN_TEXTS = [WELL_FORMED, "r</think>" + WELL_FORMED, *(text for text, _ in CORPUS.values())]


def mutated(draw):
    """A text of the corpus after some deletions, repetitions, exchanges and cuts."""
    text = draw.choice(BROKEN_TEXTS)
    for _ in range(draw.randrange(5)):
        at, size = draw.randrange(len(text) + 1), draw.randrange(1, 31)
        part, rest = text[at : at + size], text[at + size :]
        text = draw.choice(
            [text[:at] + rest, text[:at] + part + part + rest, text[:at] + rest[:size] + part + rest[size:]]
        )
    return text if draw.random() < 0.8 else text[: draw.randrange(len(text) + 1)]


def survives(draw):
    text = mutated(draw)
    reasoning, reason = draw.random() < 0.5, draw.choice(["stop", "length", "abort"])
    stops = draw.choice([(), (), ("x", "\n\n"), ("Paris", "aris<")])
    streams = draw.random() < 0.5
    how = {"reasoning": reasoning, "reason": reason, "stops": stops, "stream_arguments": streams}
    whole = Read([text], **how)
    places = [0, *sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(6))), len(text)]
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert Read(pieces, **how).all() == whole.all()
    assert Read(list(text), **how).all() == whole.all()
    assert control.DSML not in (whole.answer.content or "") and "parser_error" not in whole.recoveries
    calls = whole.answer.tool_calls
    if streams and whole.answer.finish_reason in ("length", "abort"):
        calls = calls[:-1]  # the last one may be cut, and the reason says so
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.name in ("f", "get_weather")
    if streams and "repeated_parameter" not in whole.recoveries:
        unstreamed = Read([text], **how | {"stream_arguments": False})
        assert calls[: len(unstreamed.answer.tool_calls)] == unstreamed.answer.tool_calls[: len(calls)]
        assert unstreamed.answer.content == whole.answer.content or len(calls) < len(whole.answer.tool_calls)


@pytest.mark.parametrize("number", [1_500, MANY])
def test_broken_texts_give_some_answer_the_same_however_they_are_cut(number):
    draw = random.Random(number)
    for _ in range(number):
        survives(draw)


@SHRINKING
@given(RANDOM)
def test_broken_texts_give_some_answer_the_same_however_they_are_cut_small(draw):
    survives(draw)


def test_the_checks_can_fail():
    """A prompt with another order of results, and an answer whose value holds the end of a parameter."""
    conversation = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": each, "function": {"name": "f", "arguments": "{}"}} for each in "01"],
        },
        *({"role": "tool", "tool_call_id": each, "content": each} for each in "10"),
    ]
    text = composed(
        conversation, thinking=True, drop=True, prefix="", tools_block=("", ""), response_format=("", "")
    )
    assert text.index("<tool_result>0") < text.index("<tool_result>1")
    closes = answer.answer_of(
        parser.AnswerParser(reasoning=False, tools=DECLARED).feed(
            block(invoke("f", parameter("a", "1</｜DSML｜parameter>2")))
        )
    )
    assert closes.tool_calls[0].arguments == '{"a": "1"}'
