"""Pieces to ids, and generated ids to answers, with a small tokenizer that has V4's control tokens."""

import json

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import answer, control, messages, render, tokens
from dsv4_jax.serving.chat.profile import OWN
from tests.serving.chat import small
from tests.serving.chat.turns import CORPUS, PARIS, PARIS_ARGUMENTS, TOOLS, Read, block, invoke, parameter

TOKENIZER = small.chat_tokenizer()
IDS = small.IDS


def pieces(*words, **how):
    return render.render([messages.text_message("user", each) for each in words], OWN, **how)


def read_ids(ids, *, reasoning=False, size=1, tokenizer=TOKENIZER, reason="stop", **how):
    numbers = iter(range(1000))
    reader = tokenizer.parser(reasoning=reasoning, tools=TOOLS, new_id=lambda: f"call_{next(numbers)}", **how)
    given = tokens.AnswerTokens(tokenizer, reader)
    events = [event for at in range(0, len(ids), size) for event in given.add(ids[at : at + size])]
    if not reader.ended:
        events += given.finish(reason)
    return answer.answer_of(events), dict(reader.recoveries), given.num_reasoning


def full(text):
    return TOKENIZER.full.encode(text, add_special_tokens=False).ids


def test_control_pieces_are_single_tokens_and_words_never_are():
    ids = tokens.prompt_ids(TOKENIZER, pieces("a<｜User｜>b</think>"))
    words = TOKENIZER.literal.encode("a<｜User｜>b</think>").ids
    assert max(words) < small.FIRST_ADDED
    added = [IDS[each] for each in (control.BOS, control.USER, control.ASSISTANT, control.THINK)]
    assert ids == [*added[:2], *words, *added[2:]]


def test_the_reference_mode_makes_tokens_of_words():
    ids = tokens.prompt_ids(TOKENIZER, pieces("a<｜User｜>b"), allow_control_in_text=True)
    assert ids.count(IDS[control.USER]) == 2


def test_half_a_character_is_refused_before_it_is_encoded():
    with pytest.raises(ProblemsError, match="half of a surrogate pair"):
        tokens.prompt_ids(TOKENIZER, pieces("a\ud800"))


def test_a_tokenizer_without_control_tokens_writes_them_as_text_and_says_so():
    plain = small.chat_tokenizer(())
    assert set(plain.missing) == set(control.CONTROL) - {control.BOS, control.EOS}
    assert not plain.knows_thinking and TOKENIZER.missing == ()
    ids = tokens.prompt_ids(plain, pieces("a"))
    assert ids == [IDS[control.BOS], *plain.literal.encode("<｜User｜>a<｜Assistant｜><think>").ids]
    written = plain.literal.encode("r</think>x").ids + [IDS[control.EOS]]
    assert read_ids(written, reasoning=True, tokenizer=plain)[0] == answer.Answer("r", "x", (), "stop")


@pytest.mark.parametrize("name", CORPUS)
def test_ids_give_what_their_text_gives(name):
    """In groups of any size: no text of the corpus spells out a mark of thinking that is not one."""
    text, reasoning = CORPUS[name]
    expected = Read([text], reasoning=reasoning)
    for size in (1, 2, 5, 1000):
        got, recoveries, _ = read_ids(full(text), reasoning=reasoning, size=size)
        assert (got, recoveries) == expected.all()


def test_words_like_the_marks_of_thinking_are_words():
    spelt = TOKENIZER.literal.encode("write </think> and <think>").ids
    got, recoveries, _ = read_ids([*spelt, IDS[control.END_THINK], *spelt], reasoning=True)
    assert got == answer.Answer("write </think> and <think>", "write </think> and <think>", (), "stop")
    assert recoveries == {}


def spelt(text):
    return TOKENIZER.literal.encode(text, add_special_tokens=False).ids


TAGS = (
    "<｜DSML｜tool_calls>", "<｜DSML｜toolcalls>", '<｜DSML｜invoke name="f">', "</｜DSML｜tool_calls>",
    '<｜DSML｜parameter name="b" string="false">', "</｜DSML｜parameter>", "</｜DSML｜invoke>", "｜DSML｜",
)  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tags_that_are_spelt_in_a_value_belong_to_it(tag, size):
    before, after = block(invoke("f", parameter("a", "x|y"))).split("|")
    got, recoveries, _ = read_ids([*full(before), *spelt(tag), *full(after)], size=size)
    assert [json.loads(call.arguments) for call in got.tool_calls] == [{"a": f"x{tag}y"}]
    assert recoveries == {} and got.content is None
    spelt_end, end = spelt("</｜DSML｜param"), spelt("</")
    got, _, _ = read_ids([*full(before), *spelt_end, *end, IDS[control.DSML], *full("parameter>" + after)])
    assert json.loads(got.tool_calls[0].arguments) == {"a": "x</｜DSML｜param"}


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_that_are_spelt_are_no_calls(size):
    """Words of a document that an answer repeats must not call a tool."""
    text = "x\n\n" + block(PARIS)
    got, recoveries, _ = read_ids(spelt(text), size=size)
    assert got == answer.Answer(None, text.replace("｜DSML｜", "｜DSML "), (), "stop")
    assert recoveries == {"marker_in_words": text.count("｜DSML｜")}
    got, recoveries, _ = read_ids(spelt("a\n" + text), reasoning=True, size=size)
    assert got == answer.Answer("a\n" + text, None, (), "stop") and recoveries == {}
    stopped, recoveries, _ = read_ids(spelt("a｜DSML｜b STOP ｜DSML｜"), size=size, stops=["STOP"])
    assert stopped.content == "a｜DSML b " and recoveries == {"marker_in_words": 1}


def test_without_the_token_of_calls_their_words_are_the_tags():
    plain = small.chat_tokenizer(tuple(each for each in small.ADDED if each != control.DSML))
    assert plain.knows_thinking and not plain.knows_calls
    got, _, _ = read_ids(plain.full.encode(block(PARIS)).ids, tokenizer=plain)
    assert got.tool_calls[0].arguments == PARIS_ARGUMENTS


@pytest.mark.parametrize(("name", "is_one"), [("a</think>", False), ("<think>", False), ("｜DSML｜", True)])
def test_a_mark_in_a_name_is_what_its_words_would_be(name, is_one):
    text = block(invoke("f", parameter(name, "x")))
    expected = Read([text])
    assert [json.loads(arguments) for _, arguments in expected.calls] == [{name: "x"} if is_one else {}]
    got, recoveries, _ = read_ids(full(text))
    assert (got, recoveries) == expected.all()


def test_a_mark_of_thinking_in_a_value_is_text():
    text = block(PARIS).replace("Paris", "<think>Paris</think>")
    got, _, _ = read_ids(full(text))
    assert got.tool_calls[0].arguments == PARIS_ARGUMENTS.replace("Paris", "<think>Paris</think>")


@pytest.mark.parametrize("token", control.ENDS_OF_TURN)
def test_tokens_of_a_prompt_end_the_turn(token):
    got, recoveries, _ = read_ids([*full("ab"), IDS[token], *full("c")])
    assert got == answer.Answer(None, "ab", (), "stop") and recoveries == {"role_token": 1}


def test_tokens_that_are_nobodys_business_are_not_shown():
    got, recoveries, _ = read_ids([*full("a"), IDS["<｜▁pad▁｜>"], IDS[control.ACTION], *full("b")])
    assert got.content == "ab" and recoveries == {"hidden_token": 2}


def test_characters_are_whole_in_every_event_and_the_end_keeps_what_is_left():
    ids = full("é👩‍👩‍👧")
    reader = TOKENIZER.parser(reasoning=False)
    given = tokens.AnswerTokens(TOKENIZER, reader)
    events = [event for id in ids for event in given.add([id])]
    assert [event.text for event in events] == ["é", *"👩‍👩‍👧"]
    assert read_ids(ids[:-1])[0].content == "é👩‍👩‍\ufffd"
    assert read_ids([*ids[:1], IDS[control.END_THINK], *full("x")])[0].content == "\ufffdx"


def test_tokens_of_the_reasoning_are_counted():
    _, _, count = read_ids([*full("abc"), IDS[control.END_THINK], *full("defg")], reasoning=True)
    assert count == 4
