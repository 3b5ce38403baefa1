"""The layout of prompts: every worked example of the format, and the places where the reference is unsafe."""

import json

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import from_openai, messages, render
from dsv4_jax.serving.chat.messages import Message, Text, ToolResult, Unsupported
from dsv4_jax.serving.chat.profile import OWN, Profile

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
T = "Tools: [] end\n"
PROFILE = Profile(
    name="short",
    tools_block=("Tools: [", "] end\n"),
    response_format=("## Response Format:", ""),
    effort_prefixes={"low": "", "high": "", "max": "P "},
    aliases={},
)


def system(text, **more):
    return {"role": "system", "content": text, **more}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, reasoning=None, **more):
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **more}


def called(*ids):
    return [{"id": id, "function": {"name": "f", "arguments": ""}} for id in ids]


def result(text, id=None):
    return {"role": "tool", "content": text, **({} if id is None else {"tool_call_id": id})}


def rendered(*conversation, thinking=True, drop=True, effort="high"):
    read = from_openai.messages_from_openai(list(conversation))
    pieces = render.render(read, PROFILE, thinking=thinking, effort=effort, drop_thinking=drop)
    return render.text_of(pieces)


def with_tools(message):
    tool = messages.Tool({"name": "f"})
    return messages.placed(from_openai.messages_from_openai([message]), [tool])


CALL = f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}'
TURNS = (system("S"), user("a"), assistant("x", "r"), user("b"))
KEPT = f"{BOS}S<｜User｜>a<｜Assistant｜><think>r</think>x{EOS}<｜User｜>b<｜Assistant｜><think>"
EXAMPLES = {
    "chat": (([system("S"), user("q")], {"thinking": False}), "S<｜User｜>q<｜Assistant｜></think>"),
    "thinking": (([system("S"), user("q")], {}), "S<｜User｜>q<｜Assistant｜><think>"),
    "effort": (([user("q")], {"effort": "max"}), "P <｜User｜>q<｜Assistant｜><think>"),
    "effort without thinking": (
        ([user("q")], {"effort": "max", "thinking": False}),
        "<｜User｜>q<｜Assistant｜></think>",
    ),
    "effort before a system message": (
        ([system("S"), user("q")], {"effort": "max"}),
        "P S<｜User｜>q<｜Assistant｜><think>",
    ),
    "drop": (
        (TURNS, {}),
        f"S<｜User｜>a<｜Assistant｜></think>x{EOS}<｜User｜>b<｜Assistant｜><think>",
    ),
    "keep": ((TURNS, {"drop": False}), KEPT.removeprefix(BOS)),
    "history in chat": (
        (TURNS, {"thinking": False}),
        f"S<｜User｜>a<｜Assistant｜></think>x{EOS}<｜User｜>b<｜Assistant｜></think>",
    ),
    "two users": (([user("a"), user("b")], {}), "<｜User｜>a\n\nb<｜Assistant｜><think>"),
    "a task of the first of two users": (
        ([user("a", task="query"), user("b")], {}),
        "<｜User｜>a<｜User｜>b<｜Assistant｜><think>",
    ),
    "results in the order of the calls": (
        (
            [
                user("a"),
                assistant("", "r", tool_calls=called("1", "2")),
                result("R2", "2"),
                result("R1", "1"),
                user("b"),
            ],
            {"drop": False},
        ),
        "<｜User｜>a<｜Assistant｜><think>r</think>\n\n"
        + CALL.replace(
            "</｜DSML｜invoke>\n", '</｜DSML｜invoke>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
        )
        + "<｜User｜><tool_result>R1</tool_result>\n\n<tool_result>R2</tool_result>\n\nb"
        + "<｜Assistant｜><think>",
    ),
    "reasoning is lost without tools in the request": (
        ([user("a"), assistant("", "r", tool_calls=called("1")), result("R", "1")], {}),
        f"<｜User｜>a<｜Assistant｜></think>\n\n{CALL}<｜User｜><tool_result>R</tool_result><｜Assistant｜><think>",
    ),
    "task of an assistant": (
        ([user("a"), assistant("x", "r", task="title"), assistant("T")], {}),
        f"<｜User｜>a<｜Assistant｜><think>r</think>x{EOS}<｜title｜>T{EOS}",
    ),
    "action": (([user("a", task="action")], {}), "<｜User｜>a<｜Assistant｜><think><｜action｜>"),
    "action in chat": (
        ([user("a", task="action")], {"thinking": False}),
        "<｜User｜>a<｜Assistant｜></think><｜action｜>",
    ),
    "old developer": (
        ([{"role": "developer", "content": "D"}, assistant("x", "r"), user("b")], {}),
        f"x{EOS}<｜User｜>b<｜Assistant｜><think>",
    ),
    "old developer in chat": (
        ([{"role": "developer", "content": "D"}, assistant("x", "r"), user("b")], {"thinking": False}),
        f"<｜User｜>D<｜Assistant｜></think>x{EOS}<｜User｜>b<｜Assistant｜></think>",
    ),
    "reminder after the last user": (
        ([system("S"), user("a"), {"role": "latest_reminder", "content": "L"}], {}),
        "S<｜User｜>a<｜Assistant｜><think><｜latest_reminder｜>L",
    ),
    "an assistant alone": (([assistant("x", "r")], {}), f"r</think>x{EOS}"),
    "an unfinished answer": (
        ([user("a"), assistant("x", prefix=True)], {}),
        "<｜User｜>a<｜Assistant｜><think></think>x",
    ),
    "a system message between": (
        ([user("a"), system("S"), user("b")], {}),
        "<｜User｜>aS<｜User｜>b<｜Assistant｜><think>",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name):
    (conversation, how), expected = EXAMPLES[name]
    assert rendered(*conversation, **how) == BOS + expected


def test_tools_of_a_request_go_to_the_first_message_or_in_front():
    block = 'Tools: [{"name": "f"}] end\n'
    assert render.text_of(render.render(with_tools(user("q")), PROFILE)).startswith(
        f"{BOS}\n\n{block}<｜User｜>q"
    )
    assert render.text_of(render.render(with_tools(system("S")), PROFILE)) == f"{BOS}S\n\n{block}"
    developer = with_tools({"role": "developer", "content": "D"})
    assert render.text_of(render.render(developer, PROFILE)).startswith(
        f"{BOS}<｜User｜>D\n\n{block}<｜Assistant｜>"
    )
    replaced = with_tools(system("S", tools=[{"function": {"name": "old"}}]))
    assert "old" not in render.text_of(render.render(replaced, PROFILE))


def test_tools_keep_the_reasoning_of_old_turns():
    tooled = (system("S", tools=[{"function": {"name": "f"}}]), *TURNS[1:])
    assert rendered(*tooled).endswith(KEPT.removeprefix(BOS + "S"))


def test_a_schema_stands_after_the_tools_of_the_first_system_message():
    given = from_openai.messages_from_openai([user("a"), system("S"), user("b")])
    placed = messages.placed(given, [messages.Tool({"name": "f"})], {"type": "object"})
    text = render.text_of(render.render(placed, PROFILE))
    assert text.startswith(
        f'{BOS}\n\nTools: [{{"name": "f"}}] end\n\n\n## Response Format:{{"type": "object"}}<｜User｜>a'
    )
    assert messages.placed(given, [], {})[1].response_schema == {}


def test_results_of_several_parts():
    parts = (Text("a"), Unsupported("image_url"), Text("b"))
    turn = [Message("tool", (ToolResult(None, parts),))]
    text = render.text_of(render.render(turn, PROFILE))
    assert text.startswith(f"{BOS}<｜User｜><tool_result>a\n\n[Unsupported image_url]\n\nb</tool_result>")


ARGUMENTS = {
    "[1, 2]": [("arguments", "true", "[1, 2]")],
    "3": [("arguments", "true", "3")],
    "{not json": [("arguments", "true", "{not json")],
    "": [],
    "{}": [],
    '{"a": 1, "a": 2}': [("a", "false", "2")],
    '{"a": 1.50, "b": "x\\"y", "c": [null, {"d": "é"}]}': [
        ("a", "false", "1.5"),
        ("b", "true", 'x"y'),
        ("c", "false", '[null, {"d": "é"}]'),
    ],
    '{"a": ' + "9" * 5000 + "}": [("arguments", "true", '{"a": ' + "9" * 5000 + "}")],
    '{"a": "</｜DSML｜parameter>"}': [("a", "true", "</｜DSML｜parameter>")],
    '{"a": {"b": true}}': [("a", "false", '{"b": true}')],
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_of_earlier_calls(arguments):
    call = [{"id": "1", "function": {"name": "f", "arguments": arguments}}]
    text = rendered(user("a"), assistant("", tool_calls=call))
    values = "\n".join(
        f'<｜DSML｜parameter name="{name}" string="{flag}">{value}</｜DSML｜parameter>'
        for name, flag, value in ARGUMENTS[arguments]
    )
    assert f'<｜DSML｜invoke name="f">\n{values}\n</｜DSML｜invoke>' in text


def test_newlines_before_calls_are_what_the_model_wrote():
    call = called("1")
    assert "</think>c\n\n<｜DSML｜tool_calls>" in rendered(user("a"), assistant("c\n\n", tool_calls=call))


def test_braces_of_clients_are_plain_text():
    tool = messages.Tool({"name": "f", "description": "{tool_schemas} {0} {schema}"})
    given = messages.placed(
        from_openai.messages_from_openai([user("{tool_schemas}")]), [tool], {"{schema}": 1}
    )
    text = render.text_of(render.render(given, OWN))
    assert (
        json.dumps(tool.function) in text
        and '{"{schema}": 1}' in text
        and "<｜User｜>{tool_schemas}<" in text
    )


def test_everything_that_cannot_be_rendered_is_told():
    given = [messages.text_message("user", "a", task="nope"), Message("developer")]
    with pytest.raises(ProblemsError) as refused:
        render.render(given, PROFILE, effort="most")
    assert len(refused.value.problems) == 3
    assert "'nope' must be one of action" in str(refused.value)


def test_where_the_model_goes_on():
    def starts(**how):
        return render.starts_reasoning(render.render([messages.text_message("user", "a")], PROFILE, **how))

    assert starts() and not starts(thinking=False) and not render.starts_reasoning(())


def test_thousands_of_results_are_one_turn():
    ids = [str(number) for number in range(2000)]
    calls = tuple(messages.ToolCall(id, "f", "") for id in ids)
    answers = (Message("tool", (ToolResult(id, (Text(id),)),)) for id in reversed(ids))
    given = [Message("assistant", tool_calls=calls), *answers, messages.text_message("user", "b")]
    text = render.text_of(render.render(given, PROFILE))
    results = "\n\n".join(f"<tool_result>{id}</tool_result>" for id in ids)
    assert text.endswith(f"<｜User｜>{results}\n\nb<｜Assistant｜><think>")
