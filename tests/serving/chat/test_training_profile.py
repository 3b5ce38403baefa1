"""Chats for training: the server's own rendering, with what the model would write marked."""

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.from_openai import messages_from_openai
from dsv4_jax.serving.chat.profile import OWN
from dsv4_jax.serving.chat.render import render
from dsv4_jax.serving.chat.tokens import chat_tokenizer, prompt_ids
from dsv4_jax.serving.chat.training_profile import training_profile
from dsv4_jax.training.chat_records import ChatEncoder
from dsv4_jax.training.tokenizer import TextEncoder, train_tokenizer
from tests.models import compressed_kinds

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
CHATS = {
    "one turn": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "turns of all kinds": [
        {"role": "system", "content": f"Be {control.USER} brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "user", "content": "Please."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": f"It is 3{control.EOS}."},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ],
}
REASONED = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "3", "reasoning_content": "easy"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "welcome"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["It is a sum. Be brief, please. "], 280)
    tokenizer.add_special_tokens([name for name in control.CONTROL if tokenizer.token_to_id(name) is None])
    return tokenizer


def joined(pieces, counted=None):
    return "".join(piece.text for piece in pieces if counted is None or piece.counted == counted)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_the_server(tokenizer, name, thinking):
    chat, profile = CHATS[name], training_profile(OWN, thinking=thinking)
    assert profile.problems(chat) == []
    document = ChatEncoder(TextEncoder(tokenizer), profile).document(chat)
    whole = render(messages_from_openai(chat), OWN, thinking=thinking, drop_thinking=False)
    config = compressed_kinds(bos_token_id=0, eos_token_id=1)
    served = chat_tokenizer(tokenizer, config.bos_token_id, [config.eos_token_id])
    assert document.tokens.tolist() == prompt_ids(served, whole)


@pytest.mark.parametrize("thinking", [False, True])
def test_what_counts_is_what_stands_behind_each_prompt(thinking):
    chat = CHATS["turns of all kinds"]
    pieces = training_profile(OWN, thinking=thinking).pieces(chat)
    read = messages_from_openai(chat)
    answers = [index for index, message in enumerate(read) if message.role == "assistant"]
    wanted = ""
    for index in answers:
        prompt = joined_text(render(read[:index], OWN, thinking=thinking, drop_thinking=False))
        with_answer = joined_text(render(read[: index + 1], OWN, thinking=thinking, drop_thinking=False))
        assert with_answer.startswith(prompt)
        wanted += with_answer[len(prompt) :]
    assert joined(pieces, True) == wanted and wanted.count(control.EOS) == len(answers) + 1
    assert wanted.endswith(f"welcome{control.EOS}")
    assert "thanks" not in wanted and control.ASSISTANT not in wanted


def joined_text(pieces):
    return "".join(text for text, _ in pieces)


def test_reasoning_counts_and_is_kept_in_every_turn():
    profile = training_profile(OWN, thinking=True)
    assert profile.problems(REASONED) == []
    end, done = control.EOS, control.END_THINK
    assert joined(profile.pieces(REASONED), True) == f"easy{done}3{end}{done}welcome{end}"


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (CHATS["one turn"][:1], "messages[0] is of user; the last must be the assistant's"),
        (CHATS["one turn"][1:], "messages[0] answers no message"),
        ([*CHATS["one turn"], CHATS["one turn"][1]], "messages[2] answers no message"),
        (REASONED, "messages[1] has reasoning"),
        ([{"role": "nobody", "content": "x"}], "messages[0].role"),
        ([], "messages"),
        (None, "messages"),
    ],
)
def test_what_cannot_be_trained_on_is_named(chat, words):
    (problem,) = training_profile(OWN).problems(chat)
    assert words in problem


def test_an_unknown_effort_is_refused():
    with pytest.raises(ProblemsError, match="effort='much' must be one of"):
        training_profile(OWN, thinking=True, effort="much")
