"""The parser of answers: every row of the table of edge cases by name, and what holds of every text."""

import json
import time

import pytest

from dsv4_jax.serving.chat import answer, parser, tags
from dsv4_jax.serving.chat.messages import Tool
from tests.serving.chat.turns import (
    CLOSE,
    CORPUS,
    END_INVOKE,
    END_PARAMETER,
    EOS,
    FREE,
    OPEN,
    PARIS,
    PARIS_ARGUMENTS,
    TOOLS,
    Read,
    block,
    invoke,
    parameter,
    read,
)

PARIS_CALL = [("get_weather", PARIS_ARGUMENTS)]


def one_value(value: str, string: str | None = "true", name: str = "a") -> str:
    """The JSON text of the arguments of a call with one parameter."""
    ((called, arguments),) = read(block(invoke("f", parameter(name, value, string)))).calls
    assert called == "f"
    json.loads(arguments)
    return arguments


@pytest.mark.parametrize("name", CORPUS)
def test_row_01_the_result_does_not_depend_on_where_the_text_is_cut(name):
    text, reasoning = CORPUS[name]
    whole = Read([text], reasoning=reasoning).all()
    for at in range(1, len(text)):
        assert Read([text[:at], text[at:]], reasoning=reasoning).all() == whole, at
    for size in (1, 2, 3, 5, 7):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert Read(pieces, reasoning=reasoning).all() == whole, size


def test_row_02_calls_in_reasoning_that_was_not_ended_are_calls():
    got = read("I ask.\n\n" + block(PARIS) + EOS, reasoning=True)
    assert got.calls == PARIS_CALL and got.answer.reasoning == "I ask." and got.answer.content is None
    assert got.answer.finish_reason == "tool_calls" and got.recoveries == {"calls_in_reasoning": 1}


def test_row_03_a_whole_block_in_reasoning_is_a_call_and_quoted_markup_is_prose():
    got = read("I ask.\n\n" + block(PARIS) + "</think>", reasoning=True)
    assert got.calls == PARIS_CALL and got.answer.reasoning == "I ask." and got.answer.content is None
    for quoted in (
        f"The form is {block(PARIS)}",  # not at the start of a line
        f"I could write\n{OPEN}\nwith a call in it",
        "As in\n"
        + block(invoke("$TOOL_NAME", parameter("$PARAMETER_NAME", "$PARAMETER_VALUE", "true|false"))),
        f"a\n{OPEN}\n{CLOSE}\n",
        f"a\n{OPEN}\n{PARIS[:-5]}",  # never closed
        PARIS,
    ):
        got = read(quoted + "</think>x", reasoning=True)
        assert (got.calls, got.answer.reasoning, got.answer.content) == ([], quoted, "x")
    assert read("a\n" + block(PARIS) + "</think>x", reasoning=True, tools=()).answer.content == "x"


def test_row_04_reasoning_that_is_cut_is_all_reasoning():
    got = read("and so on\n\n", reasoning=True, reason="length")
    assert got.answer == answer.Answer("and so on\n\n", None, (), "length")


def test_row_05_stray_marks_of_thinking_are_swallowed():
    assert read("</think>a<think>b</think>c").answer.content == "abc"
    got = read("<think>a<think>b</think>c", reasoning=True)
    assert (got.answer.reasoning, got.answer.content) == ("ab", "c")


def test_row_06_a_call_without_a_block_is_a_call_only_if_it_could_be_meant():
    got = read("x\n\n" + PARIS + EOS)
    assert got.calls == PARIS_CALL and got.answer.content == "x"
    assert got.recoveries == {"calls_without_block": 1}
    missing = invoke("get_weather", parameter("days", "3", "false"))
    for text, tools in ((PARIS, ()), (invoke("nope", parameter("a", "b")), TOOLS), (missing, TOOLS)):
        got = read("x " + text, tools=tools)
        assert got.calls == [] and "DSML" not in got.answer.content
        assert got.answer.content.split() in (["x", "Paris"], ["x", "b"], ["x", "3"])
    unclosed = read("x " + PARIS.removesuffix(END_INVOKE))
    assert unclosed.calls == [] and unclosed.answer.content.split() == ["x", "Paris"]


@pytest.mark.parametrize("word", ["toolcalls", "function_calls"])
def test_row_07_a_misspelt_block_is_one(word):
    got = read(f"x\n\n<｜DSML｜{word}>\n{PARIS}\n</｜DSML｜{word}>")
    assert got.calls == PARIS_CALL and got.answer.content == "x"
    assert read(f"the <｜DSML｜{word}> form").answer.content == "the  form"


def test_row_08_missing_ends_are_supplied():
    open_value = '<｜DSML｜parameter name="location" string="true">Paris\n'
    without_invoke = block(PARIS.removesuffix(END_INVOKE))
    without_value = block(f'<｜DSML｜invoke name="get_weather">\n{open_value}{END_INVOKE}')
    without_both = f'{OPEN}\n<｜DSML｜invoke name="get_weather">\n{open_value}{CLOSE}'
    for text in (without_invoke, without_value, without_both):
        assert read(text).calls == PARIS_CALL
    two = block(
        f'<｜DSML｜invoke name="get_weather">\n{open_value}{parameter("days", "3", "false")}\n{END_INVOKE}'
    )
    assert read(two).calls == [("get_weather", '{"location": "Paris", "days": 3}')]
    assert read(block(PARIS.removesuffix(END_INVOKE), PARIS)).calls == PARIS_CALL * 2


@pytest.mark.parametrize("reason", ["length", "abort", "stop"])
def test_row_09_a_block_that_is_cut_leaves_no_markup_and_no_half_call(reason):
    text = "x\n\n" + block(PARIS, PARIS)
    for end in range(text.index(OPEN) + 8, len(text) - len(CLOSE) - len(END_INVOKE) - 1):
        got = Read([text[:end]], reason=reason)
        assert got.answer.content in ("x", "x\n\n") and got.calls in ([], PARIS_CALL)
        assert got.answer.finish_reason == ("tool_calls" if got.calls and reason == "stop" else reason)
    assert Read([text], reason="length").answer.finish_reason == "tool_calls"


def test_row_10_empty_blocks_and_stray_ends_are_swallowed():
    got = read(f"a\n\n{OPEN}\n{CLOSE}\nb")
    assert got.answer.content == "a\n\n\nb" and got.answer.finish_reason == "stop"
    assert read(f"a{CLOSE}b{END_INVOKE}c{END_PARAMETER}d").answer.content == "abcd"
    assert read(f"a\n\n{OPEN}{CLOSE}").answer.content == "a"


def test_removing_a_marker_leaves_no_other_behind():
    for text in (
        "<｜｜DSML｜DSML｜tool_calls>",
        "｜DS｜DSML｜ML｜",
        "｜DS｜DS｜DSML｜ML｜ML｜",
        "｜DSML" * 3 + "｜" * 9,
    ):
        assert "｜DSML｜" not in read(f"a {text} b").answer.content
    assert read("a ｜DS｜DSML｜ML｜ b").answer.content == "a ｜DSML  b"


def test_row_11_text_after_the_calls_is_dropped_and_counted():
    got = read("x\n\n" + block(PARIS) + "\n\nI have asked.")
    assert got.answer.content == "x" and got.calls == PARIS_CALL
    assert got.recoveries == {"text_after_calls": 1}


def test_row_12_values_are_taken_as_they_are():
    for value in (
        "ls 2>&1",
        "<",
        "a<b",
        "<a href='x'>y</a>",
        "</parameter>",
        " \n x \n",
        "",
        "｜DSML｜",
        "</｜DSML｜para",
    ):
        assert json.loads(one_value(value)) == {"a": value}
        assert json.loads(one_value(value + OPEN + "<think>")) == {"a": value + OPEN + "<think>"}


@pytest.mark.parametrize(
    "value", ["[1,}", "NaN", "[Infinity]", "[1, 2,]", "1e999", "", "nul", '"\\ud800"', "[" * 9999]
)
def test_row_13_what_should_be_json_and_is_not_becomes_a_string(value):
    assert json.loads(one_value(value, "false")) == {"a": value}


def test_row_13_numbers_keep_their_digits():
    digits = "9" * 5000
    got = read(block(invoke("f", parameter("a", f" {digits} ", "false"), parameter("b", "1.50", "false"))))
    assert got.calls == [("f", f'{{"a": {digits}, "b": 1.50}}')]


def test_row_14_nothing_of_a_call_comes_before_it_is_complete():
    text = block(invoke("f", parameter("a", "[1, 2]", "false")))
    reader = parser.AnswerParser(reasoning=False, tools=TOOLS)
    end = text.index(END_INVOKE) + len(END_INVOKE)
    assert [reader.feed(each) for each in text[: end - 1]] == [[]] * (end - 1)
    start, arguments = reader.feed(text[end - 1])
    assert (start.name, arguments.text) == ("f", '{"a": [1, 2]}')


def streamed(text, **more):
    return read(text, stream_arguments=True, **more)


def test_row_14_strings_may_come_while_they_are_written_and_nothing_else():
    text = block(invoke("f", parameter("a", 'x "\n', "true"), parameter("b", "[1, 2]", "false")))
    reader = parser.AnswerParser(reasoning=False, tools=TOOLS, stream_arguments=True)
    events = [(at, event) for at, each in enumerate(text) for event in reader.feed(each)]
    came = {at: event.text for at, event in events if isinstance(event, answer.ToolArguments)}
    start = text.index('x "')
    assert came[start - 1] == '{"a": "'
    assert [came.get(start + i, "") for i in range(4)] == ["x", " ", '\\"', ""]
    pair = text.index(END_PARAMETER, text.index("[1, 2]")) + len(END_PARAMETER) - 1
    assert came[pair] == ', "b": [1, 2]'
    assert not any(text.index("[1, 2]") - 2 < at < pair for at in came)
    assert streamed(text).calls == read(text).calls == [("f", '{"a": "x \\"\\n", "b": [1, 2]}')]


@pytest.mark.parametrize("name", CORPUS)
def test_streamed_arguments_are_those_of_the_whole_call(name):
    text, reasoning = CORPUS[name]
    whole, pieces = Read([text], reasoning=reasoning), streamed(text, reasoning=reasoning)
    assert pieces.all() == whole.all()


def test_streamed_calls_wait_where_they_must():
    wrapped = block(invoke("get_weather", parameter("arguments", '{"location": "Paris"}')))
    assert streamed(wrapped).calls == PARIS_CALL
    both = block(invoke("get_weather", parameter("input", "x"), parameter("location", "Paris")))
    assert streamed(both).calls == [("get_weather", '{"input": "x", "location": "Paris"}')]
    orphan = streamed("x " + invoke("get_weather", parameter("days", "a")))
    assert orphan.calls == []
    twice = streamed(block(invoke("f", parameter("a", "1"), parameter("a", "2"))))
    assert twice.calls == [("f", '{"a": "1"}')] and twice.recoveries == {"repeated_parameter": 1}
    assert streamed(block(invoke("nope", parameter("a", "1")))).calls == []
    assert streamed(block(invoke("f"))).calls == [("f", "{}")]


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_a_streamed_call_that_is_cut_is_told_by_the_reason(reason):
    cut = Read([block(invoke("f", parameter("a", "some words")))[:-60]], reason=reason, stream_arguments=True)
    assert cut.calls == [("f", '{"a": "some words')] or cut.calls[0][1].startswith('{"a": "some')
    assert cut.answer.finish_reason == ("abort" if reason == "abort" else "length")


def test_row_15_a_long_argument_takes_linear_time():
    def seconds(size):
        text = block(invoke("f", parameter("a", "x <y\n" * (size // 5))))
        pieces = [text[at : at + 32] for at in range(0, len(text), 32)]
        start = time.process_time()
        assert len(Read(pieces).calls[0][1]) > size
        return time.process_time() - start

    seconds(2**14)
    assert min(seconds(2**18) for _ in range(2)) < 6 * max(min(seconds(2**17) for _ in range(2)), 1e-3)


def test_row_16_repeated_parameters_and_calls():
    got = read(block(invoke("f", parameter("a", "1"), parameter("b", "2"), parameter("a", "3"))))
    assert got.calls == [("f", '{"a": "3", "b": "2"}')] and got.recoveries == {"repeated_parameter": 1}
    got = read(block(*[PARIS] * 5), max_calls=3)
    assert got.calls == PARIS_CALL * 3 and got.recoveries == {"calls_beyond_limit": 2}
    assert [event.index for event in got.events if isinstance(event, answer.ToolStart)] == [0, 1, 2]
    assert read(block(PARIS) + "\n\n" + block(PARIS)).calls == PARIS_CALL * 2
    reader = parser.AnswerParser(reasoning=False, tools=TOOLS)
    ids = {call.id for call in answer.answer_of(reader.feed(block(*[PARIS] * 50))).tool_calls}
    assert len(ids) == 50 and all(id.startswith("call_") for id in ids)


def test_row_17_a_parameter_that_only_wraps_the_object_is_unwrapped():
    wrapped = '{"location": "Paris", "days": 3}'
    for name in ("arguments", "input"):
        for string in ("true", "false", None):
            got = read(block(invoke("get_weather", parameter(name, wrapped, string))))
            assert got.calls == [("get_weather", wrapped)]
    other = '{"place": "Paris"}'
    got = read(block(invoke("get_weather", parameter("arguments", other, "false"))))
    assert got.calls == [("get_weather", f'{{"arguments": {other}}}')]
    has_it = Tool({"name": "g", "parameters": {"properties": {"input": {}, "location": {}}}})
    text = block(invoke("g", parameter("input", '{"location": 1}', "false")))
    assert read(text, tools=(has_it,)).calls == [("g", '{"input": {"location": 1}}')]


def test_row_18_no_call_of_a_tool_that_there_is_not():
    called = "Let me look.\n\n" + block(PARIS)
    got = read(called, tools=())
    assert got.answer == answer.Answer(None, "Let me look.", (), "stop")
    got = read("a\n\n" + block(invoke("nope", parameter("a", "b")), PARIS))
    assert got.calls == PARIS_CALL and got.recoveries == {"undeclared_call": 1}
    assert read("a\n\n" + block(invoke("nope")) + "\n\nb").answer.content == "a\n\n\n\nb"


def test_row_19_a_grammar_begins_after_the_end_of_reasoning():
    reader = parser.AnswerParser(reasoning=True, tools=TOOLS)
    reader.feed("a\n" + block(PARIS)[:30])
    assert reader.in_reasoning
    reader.feed(" quoted</think>")
    assert not reader.in_reasoning
    assert not parser.AnswerParser(reasoning=False).in_reasoning


def test_row_20_groups_of_accepted_tokens_give_the_same_as_single_ones():
    text = "r</think>x\n\n" + block(PARIS)
    words = text.replace(" ", "| |").replace(">", ">|").split("|")
    single = Read(words, reasoning=True)
    for size in range(2, 7):
        groups = ["".join(words[at : at + size]) for at in range(0, len(words), size)]
        assert Read(groups, reasoning=True).all() == single.all()


def test_row_21_a_fault_of_the_parser_does_not_cost_the_text(monkeypatch):
    def fault(*_):
        raise RuntimeError("a fault")

    for name in ("_give_call", "_in_value", "_prose"):
        with monkeypatch.context() as patch:
            patch.setattr(parser.AnswerParser, name, fault)
            got = Read(["Before. ", block(PARIS), " after ", "all｜DSML｜."])
        assert got.recoveries["parser_error"] == 1 and got.answer.finish_reason == "stop"
        assert "Paris" in got.answer.content and got.answer.content.endswith(" after all｜DSML .")
        assert "｜DSML｜" not in got.answer.content


def test_row_22_parsers_share_nothing():
    first, second = (parser.AnswerParser(reasoning=False, tools=TOOLS) for _ in range(2))
    text = block(PARIS)
    for character in text:
        first.feed(character)
    assert second.feed("x") == [answer.ContentDelta("x")]
    assert second.finish() == [answer.Finish("stop")]
    assert first.finish() == [answer.Finish("tool_calls")]


def test_row_23_whatever_arrives_the_text_is_unicode():
    got = read("a\0b 👩‍👩‍👧" + chr(0xD800) + chr(0xDC01) + block(invoke("f", parameter("k", chr(0xDFFF)))))
    assert got.answer.content == "a\0b 👩‍👩‍👧\ufffd\ufffd"
    assert got.calls == [("f", '{"k": "\ufffd"}')]


def test_row_24_stop_strings_end_content_and_nothing_else():
    text = "STOP</think>a STO b STOP c"
    got = read(text, reasoning=True, stops=["STOP"])
    assert got.answer == answer.Answer("STOP", "a STO b ", (), "stop")
    assert got.parser.ended and got.parser.stop == "STOP"
    assert read("ST</think>OP", reasoning=True, stops=["STOP"]).answer.content == "OP"
    inside = block(invoke("f", parameter("a", "STOP")))
    assert read("x STO\n\n" + inside, stops=["STOP"]).calls == [("f", '{"a": "STOP"}')]
    assert read("x STO", stops=["STOP"]).answer.content == "x STO"
    assert read("abcde", stops=["bcd", "c"]).answer.content == "ab"
    assert read("a\n\nb", stops=["\n\n"]).answer.content == "a"
    got = read("a\n\n\n" + block(PARIS), stops=["\n"])
    assert got.answer == answer.Answer(None, "a", (), "stop")
    reader = parser.AnswerParser(reasoning=False, stops=["STOP"])
    assert reader.feed("x ST") == [answer.ContentDelta("x ")]
    assert reader.feed("AY") == [answer.ContentDelta("STAY")]


def test_row_25_look_alikes_with_ascii_bars_are_text():
    text = block(PARIS).replace("｜", "|")
    assert read(text).answer == answer.Answer(None, text, (), "stop")


def test_row_26_empty_reasoning_is_fine():
    got = read("</think>\n\n" + block(PARIS), reasoning=True)
    assert got.calls == PARIS_CALL and got.answer.reasoning is None and got.answer.content is None


def test_row_27_small_freedoms_of_layout_are_accepted():
    for joiner in ("", "\n", "\n\n"):
        got = read("x" + joiner + block(PARIS))
        assert got.calls == PARIS_CALL and got.answer.content == "x"
    assert read("x\n\n\n\n" + block(PARIS)).answer.content == "x\n\n"
    spread = (
        block(PARIS).replace("invoke name", "invoke\n  name").replace("parameter name", "parameter\tname")
    )
    assert read(spread).calls == PARIS_CALL
    assert read(block(PARIS).replace("\n", "")).calls == PARIS_CALL


def test_row_28_a_value_that_does_not_say_what_it_is():
    assert one_value("[1, 2]", None) == '{"a": [1, 2]}'
    assert one_value("[1, 2", None) == '{"a": "[1, 2"}'
    assert one_value("12", "perhaps") == '{"a": 12}'


def test_the_end_of_a_turn_ends_it():
    got = read(f"a{EOS}b" + block(PARIS))
    assert got.answer == answer.Answer(None, "a", (), "stop")
    assert read(f"a{EOS}b", reasoning=True).answer == answer.Answer("a", None, (), "stop")


def test_content_arrives_while_it_is_written():
    reader = parser.AnswerParser(reasoning=True, tools=TOOLS)
    assert reader.feed("a b") == [answer.ReasoningDelta("a b")]
    assert reader.feed("\n</thi") == []
    assert reader.feed("nk>c <") == [answer.ReasoningDelta("\n"), answer.ContentDelta("c ")]
    assert reader.feed("d\n") == [answer.ContentDelta("<d")]
    assert reader.feed("\ne") == [answer.ContentDelta("\n\ne")]


LONG = {
    "less than": "<",
    "marker": "<｜DSML｜",
    "bare marker": "｜DSML｜",
    "nested": "<｜DSML｜invoke name=",
    "heads": '<｜DSML｜invoke name="f">',
    "blocks": OPEN,
    "lines of blocks": "\n" + OPEN + '\n<｜DSML｜invoke name="f">',
    "values": '<｜DSML｜parameter name="a">',
    "quotes": '<｜DSML｜parameter name="' + '"' * 900,
    "newlines": "\n",
    "ends": "</think>",
}


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("name", LONG)
def test_time_is_linear_in_the_text(name, reasoning):
    def seconds(size):
        text = LONG[name] * (size // len(LONG[name]))
        pieces = [text[at : at + 1000] for at in range(0, len(text), 1000)]
        start = time.process_time()
        Read(pieces, reasoning=reasoning, stops=["<｜STOP", "\n\n\n\n!"])
        return time.process_time() - start

    short = max(min(seconds(10_000) for _ in range(2)), 2e-3)
    assert min(seconds(40_000) for _ in range(2)) < 4 * 2.5 * short


def test_a_tag_of_endless_attributes_is_text():
    text = '<｜DSML｜invoke name="' + "x" * tags.MAX_HEADER_CHARS + '">'
    assert read(text).answer.content == text.replace("｜DSML｜", "")
    reader = parser.AnswerParser(reasoning=False, tools=(FREE,))
    held = [bool(reader.feed(character)) for character in text]
    assert not any(held[:1000]) and any(held)
