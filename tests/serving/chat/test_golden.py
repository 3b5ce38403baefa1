"""The official examples: prompts to the byte and to the token, and their answers read back."""

import hashlib

import pytest

from dsv4_jax.serving.chat import answer, from_openai, messages, parser, render, tokens, wire
from dsv4_jax.serving.chat.messages import Text, ToolCall
from dsv4_jax.serving.chat.profile import KNOWN
from tests.serving.chat import official
from tests.serving.chat.official import DATA, needs_data, needs_tokenizer

pytestmark = needs_data

IDS = {
    1: (541, "6fd32c00188d8ec20dacdfcd81b054528f077e85ee671a1e4773b1b9ad810c9b"),
    2: (53, "7ed512cf8417da74f533c254430f039d4d19189619182c9c7803244c048faedf"),
    3: (820, "c4d3b13621097e3d168aafed43f6020e273830f0dd24b50cb1fb02432ca5a5b9"),
    4: (582, "8a63b9c250fa92c8f8ab809f565203d5e28d25031413472723d60efcf6fe208d"),
}


def pieces_of(number: int, choice: str = "preview"):
    given, _ = official.golden(number)
    tools = []
    if isinstance(given, dict):
        problems = wire.Problems()
        tools = from_openai.read_tools("tools", given["tools"], problems)
        assert not problems
        given = given["messages"]
    read = messages.placed(from_openai.messages_from_openai(given), tools)
    effort = "high" if choice == "preview" else "low"  # without a prefix
    return render.render(read, official.released(choice), thinking=number != 4, effort=effort)


@pytest.mark.parametrize("number", IDS)
@pytest.mark.parametrize("choice", ["preview", "official"])
def test_prompts_are_equal_to_the_byte(number, choice):
    assert render.text_of(pieces_of(number, choice)) == official.golden(number)[1]


@needs_tokenizer
@pytest.mark.parametrize("number", IDS)
def test_prompts_are_equal_to_the_token(number):
    tokenizer = official.real_tokenizer()
    ids = tokens.prompt_ids(tokenizer, pieces_of(number))
    listed = "[" + ",".join(map(str, ids)) + "]"
    assert (len(ids), hashlib.sha256(listed.encode()).hexdigest()) == IDS[number]
    assert ids == tokens.prompt_ids(tokenizer, pieces_of(number), allow_control_in_text=True)
    assert tokenizer.full.decode(ids, skip_special_tokens=False) == official.golden(number)[1]


def test_the_data_is_what_it_was():
    for name, digest in official.SHA256.items():
        assert hashlib.sha256((DATA / "chat_wire" / name).read_bytes()).hexdigest() == digest
    assert set(KNOWN.values()) == {official.SHA256[name] for name in official.LITERALS}


def test_literals_in_use_are_the_official_ones():
    preview, later = official.released("preview"), official.released("official")
    assert preview.effort_prefixes == {"low": "", "high": "", "max": official.literal("effort_a.txt")}
    assert later.effort_prefixes == {
        "low": "",
        "high": official.literal("effort_a.txt"),
        "max": official.literal("effort_b.txt"),
    }
    for profile in (preview, later):
        schema = messages.json_text({"name": "f"})
        assert schema.join(profile.tools_block) == official.literal("tools_rendered_f.txt")
        before, after = profile.response_format
        assert (len(before), after) == (80, "")
        digest = hashlib.sha256(before.encode()).hexdigest()
        assert digest == "5200f58413f49f3957c43beddbc97bead023232cb5934fad0c1997c30c139112"


def parsed(text: str, tools=()) -> answer.Answer:
    reader = parser.AnswerParser(reasoning=True, tools=tools, new_id=lambda: "call_001")
    return answer.answer_of([*reader.feed(text), *reader.finish()])


def test_the_turns_of_the_first_example_are_read_back():
    given, text = official.golden(1)
    tools = from_openai.read_tools("tools", given["tools"], wire.Problems())
    turns = [each.split("<｜User｜>")[0] for each in text.split("<｜Assistant｜><think>")[1:]]
    call = ToolCall("call_001", "get_weather", '{"location": "Beijing", "unit": "celsius"}')
    assert parsed(turns[0], tools) == answer.Answer(
        "The user wants to know the weather in Beijing. I should use the get_weather tool.",
        None,
        (call,),
        "tool_calls",
    )
    last = parsed(turns[1], tools)
    assert last.tool_calls == () and "22°C" in last.content and last.finish_reason == "stop"
    expected = [
        each for each in from_openai.messages_from_openai(given["messages"]) if each.role == "assistant"
    ]
    assert [parsed(turn, tools).message() for turn in turns] == expected


def test_the_second_example_forgets_old_reasoning():
    text = official.golden(2)[1]
    assert "The user said hello" not in render.text_of(pieces_of(2))
    last = parsed(text.rsplit("<｜Assistant｜><think>", 1)[1])
    assert last.content == "The capital of France is Paris."


KNOWN_IDS = {
    "Hello, world!": "19923 14 2058 3",
    "深度求索 DeepSeek-V4 12345 tokens\n\n": (
        "17180 1645 4568 22651 4374 1465 13582 22 223 6895 1883 35977 271"
    ),
    "\n\n": "271",
    ".\n\n": "339",
    "a\0b": "67 191 68",
    "｜DSML｜": "28217 10525 7398 28217",
    "<｜User｜>": "30 28217 6756 28217 32",
    "<think>": "30 37947 32",
    "</think>": "1718 37947 32",
    "<｜begin▁of▁sentence｜>": "30 28217 8277 5487 226 2154 5487 226 85 51015 28217 32",
    "👩‍👩‍👧 é": "25730 105 46088 25730 105 46088 25730 103 2678",
}


@needs_tokenizer
@pytest.mark.parametrize("text", KNOWN_IDS)
def test_known_ids_of_a_users_words(text):
    ids = tokens.prompt_ids(official.real_tokenizer(), [render.Piece(text, False)])
    assert ids == [int(each) for each in KNOWN_IDS[text].split()]


@needs_tokenizer
def test_text_of_the_format_and_of_users_is_merged_across_their_border():
    given = [messages.text_message("system", "S.", tools=(messages.Tool({"name": "f"}),))]
    ids = tokens.prompt_ids(official.real_tokenizer(), render.render(given, official.released("preview")))
    assert ids[:5] == [0, 53, 339, 372, 27193]


@needs_tokenizer
def test_every_added_token_stays_text_in_the_words_of_users():
    tokenizer = official.real_tokenizer()
    added = [each.content for each in tokenizer.full.get_added_tokens_decoder().values()]
    assert len(added) == 1283
    nested = [text[:3] + text + text[3:] for text in added]
    for text in ["".join(added), "".join(nested), *added[:3], *added[-1000::50]]:
        ids = tokens.prompt_ids(tokenizer, [render.Piece(text, False)])
        assert min(ids) >= 3 and max(ids) < 128000
        assert tokenizer.full.decode(ids, skip_special_tokens=False) == text


@needs_tokenizer
def test_no_field_of_a_request_can_hold_a_control_token():
    """Also where it is cut over neighbouring fields."""
    tokenizer, profile = official.real_tokenizer(), official.released("official")

    def ids(word):
        tools = [
            {"type": "function", "function": {"name": "f", "description": word, "parameters": {word: word}}}
        ]
        call = {
            "id": "1",
            "function": {"name": "f", "arguments": messages.json_text({"a": word, "b": [word]})},
        }
        halves = (word[: len(word) // 2], word[len(word) // 2 :])
        body = {
            "messages": [
                {"role": "system", "content": word},
                {"role": "latest_reminder", "content": word},
                {"role": "user", "content": [{"type": "text", "text": half} for half in halves]},
                {"role": "assistant", "content": word, "reasoning_content": word, "tool_calls": [call]},
                {
                    "role": "tool",
                    "tool_call_id": "1",
                    "content": [{"type": "text", "text": h} for h in halves],
                },
                {"role": "tool", "content": [{"type": word}]},
            ],
            "tools": tools,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {word: word}}},
        }
        conversation = from_openai.conversation_from_openai(body, profile)
        return tokens.prompt_ids(tokenizer, render.render(conversation.messages, profile))

    expected = [id for id in ids("word") if id >= 128000 or id < 3]
    assert len(expected) > 20
    for word in (
        "<｜User｜>",
        "｜DSML｜",
        "</think>",
        "<｜end▁of▁sentence｜>",
        "<｜｜DSML｜DSML｜tool_calls>",
    ):
        assert [id for id in ids(word) if id >= 128000 or id < 3] == expected, word


@needs_tokenizer
def test_a_prompt_goes_on_with_the_tokens_that_were_generated():
    """The next turn's prompt begins with this turn's prompt and answer: the condition for reusing a cache."""
    tokenizer, profile = official.real_tokenizer(), official.released("official")
    tools = (messages.Tool({"name": "f", "parameters": {"properties": {"a": {}, "n": {}}}}),)
    history = messages.placed([messages.text_message("user", "Hi.")], tools)
    before = tokens.prompt_ids(tokenizer, render.render(history, profile))
    turn = messages.Message(
        "assistant", (Text("So:"),), "Well.\n", (ToolCall("1", "f", '{"a": "x\\ny ", "n": [1, 2.5]}'),)
    )
    written = render.text_of(render.render([*history, turn], profile))
    generated = written.removeprefix(render.text_of(render.render(history, profile)))
    ids = tokenizer.full.encode(generated, add_special_tokens=False).ids
    reader = tokenizer.parser(reasoning=True, tools=tools, new_id=lambda: "1")
    answered = answer.answer_of(tokens.AnswerTokens(tokenizer, reader).add(ids))
    assert answered.message() == turn and answered.finish_reason == "tool_calls"
    later = [*history, answered.message(), messages.text_message("user", "And?")]
    after = tokens.prompt_ids(tokenizer, render.render(later, profile))
    assert after[: len(before) + len(ids)] == before + ids
