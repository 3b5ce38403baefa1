"""A conversation with a small random model: the same tokens as without a kept cache, and a true history."""

import dataclasses

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import answer, messages, render, tokens
from dsv4_jax.serving.chat.continuation import Continuation
from dsv4_jax.serving.chat.manner import Manner, checked_manner
from dsv4_jax.serving.chat.profile import OWN
from dsv4_jax.serving.chat.session import ChatSession
from tests.serving.chat import small

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "seed": 3}


def unkept(prompt, count, **sampling):
    """Without a kept cache, through the public way."""
    stream = small.model().stream([prompt], count, **sampling)
    return [int(token[0]) for token in stream]


def test_a_kept_cache_changes_no_token():
    running = Continuation(small.model())
    prompt = [small.IDS["<｜begin▁of▁sentence｜>"], 5, 6, 7]
    for turn in range(3):
        before = len(prompt)
        drawn = list(running.stream(prompt, 6, **SAMPLING))
        assert drawn == unkept(prompt, 6, **SAMPLING)
        assert running.num_reused == (0 if turn == 0 else before - 3)
        prompt = [*prompt, *drawn, 9, 10, 11]
    other = [1, 2, 3]
    assert list(running.stream(other, 4, **SAMPLING)) == unkept(other, 4, **SAMPLING)
    assert running.num_reused == 0


def test_a_cache_that_is_too_small_is_replaced_and_a_stream_that_was_left_is_gone_on_with():
    running = Continuation(small.model())
    prompt = [1, 2, 3]
    stream = running.stream(prompt, 20, **SAMPLING)
    drawn = [next(stream) for _ in range(3)]
    stream.close()
    longer = [*prompt, *drawn, 4]
    assert list(running.stream(longer, 3, **SAMPLING)) == unkept(longer, 3, **SAMPLING)
    assert running.num_reused == 6
    running._room = 8  # as if it had been made for that
    assert list(running.stream([*longer, 5], 1, **SAMPLING)) == unkept([*longer, 5], 1, **SAMPLING)
    assert running.num_reused == 0


def test_a_step_that_fails_leaves_no_used_cache_behind(monkeypatch):
    running = Continuation(small.model())
    drawn = list(running.stream([1, 2, 3], 2, **SAMPLING))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dsv4_jax.serving.chat.continuation.steps.decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(running.stream([1, 2, 3, *drawn, 4], 2, **SAMPLING))
    longer = [1, 2, 3, *drawn, 4, 5]
    assert list(running.stream(longer, 2, **SAMPLING)) == unkept(longer, 2, **SAMPLING)
    assert running.num_reused == 0


@pytest.mark.parametrize("thinking", [False, True])
def test_the_history_is_what_was_said(thinking):
    manner = Manner(thinking=thinking, max_new_tokens=8, seed=1)
    session = ChatSession(small.model(), OWN, "Be brief.", manner)
    said = []
    for words in ("<｜User｜>", "b"):
        events = list(session.answer(words))
        assert isinstance(events[-1], answer.Finish)
        got = answer.answer_of(events)
        if got.content or got.reasoning:
            said += [messages.text_message("user", words), got.message()]
        assert session.messages == [messages.text_message("system", "Be brief."), *said]
    assert said
    session.reset()
    assert session.messages == [messages.text_message("system", "Be brief.")]


def test_answers_follow_the_whole_conversation():
    """What a session answers second is what the model says to the whole prompt."""
    session = ChatSession(small.model(), OWN, None, Manner(thinking=False, max_new_tokens=5, temperature=0.0))
    list(session.answer("a"))
    history = list(session.messages)
    second = answer.answer_of(session.answer("b"))
    pieces = render.render([*history, messages.text_message("user", "b")], OWN, thinking=False)
    prompt = tokens.prompt_ids(session.tokenizer, pieces)
    ids = unkept(prompt, 5, temperature=0.0, seed=2)
    assert second.content == session.tokenizer.full.decode(ids, skip_special_tokens=True)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came():
    session = ChatSession(small.model(), OWN, None, Manner(thinking=False, max_new_tokens=50))
    events = session.answer("a")
    first = next(events)
    events.close()
    (asked, answered) = session.messages
    assert asked == messages.text_message("user", "a")
    assert answered.parts[0].text.startswith(first.text) and len(answered.parts[0].text) < 20
    assert list(session.answer("b"))


def test_a_conversation_that_is_too_long_is_refused_and_not_kept():
    session = ChatSession(small.model(), OWN, None, Manner(thinking=False, max_new_tokens=4))
    most = small.model().config.max_position_embeddings
    with pytest.raises(ProblemsError, match=f"the model holds at most {most}"):
        list(session.answer("a" * most))
    assert session.messages == []
    assert isinstance(list(session.answer("a"))[-1], answer.Finish)


@pytest.mark.parametrize("headings", [True, False])
def test_a_tokenizer_without_the_marks_of_the_format_can_chat(headings):
    """As that of the quickstart: turns under headings, or, by another profile, with marks that are text."""
    model = small.model()
    plain = type(model)(model.config, model.policy, model.parameters, small.tokenizer(()))
    profile = OWN if headings else dataclasses.replace(OWN, name="other")
    session = ChatSession(plain, profile, None, Manner(thinking=True, max_new_tokens=6, temperature=0.0))
    got = answer.answer_of(session.answer("a"))
    text = "### Question\na\n### Answer\n" if headings else "<｜User｜>a<｜Assistant｜><think>"
    prompt = [small.IDS["<｜begin▁of▁sentence｜>"], *plain.tokenizer.encode(text).ids]
    drawn = [id for id in unkept(prompt, 6, temperature=0.0, seed=0) if id < 256]
    said = plain.tokenizer.decode(drawn) or None
    assert (got.reasoning, got.content) == ((None, said) if headings else (said, None))


def test_a_model_without_a_tokenizer_cannot_chat():
    model = small.model()
    bare = type(model)(model.config, model.policy, model.parameters)
    with pytest.raises(ProblemsError, match="no tokenizer.json"):
        ChatSession(bare, OWN)


def test_all_wrong_numbers_are_told_at_once():
    with pytest.raises(ProblemsError) as refused:
        checked_manner(Manner(max_new_tokens=0, temperature=-1.0, top_p=0.0, seed=-1))
    assert len(refused.value.problems) == 4
