"""Turns under headings: what fine-tuning writes for a tokenizer without role tokens."""

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import from_openai, headings, messages
from dsv4_jax.serving.chat.messages import Message, ToolResult
from dsv4_jax.training.chat_records import QUICKSTART_CHAT

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a\n### Answer\n"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("end", [3, 5])
def test_the_form_is_the_one_that_fine_tuning_writes(start, end):
    trained = [(piece.text, piece.control) for piece in QUICKSTART_CHAT.pieces(TALK[start:end])]
    pieces = headings.under_headings(from_openai.messages_from_openai(TALK[start:end]))
    assert [tuple(piece) for piece in pieces] == trained


def test_a_prompt_ends_where_the_answer_begins():
    asked = from_openai.messages_from_openai(TALK[:4])
    assert headings.under_headings(asked)[-1].text == "### Question\nc\n### Answer\n"
    begun = [*asked, messages.text_message("assistant", "so", unfinished=True)]
    assert headings.under_headings(begun)[-1] == ("so", False)


def test_what_has_no_form_is_refused():
    given = [
        messages.text_message("system", "S", tools=(messages.Tool({"name": "f"}),)),
        messages.text_message("user", "a", task="query"),
        Message("tool", (ToolResult("1", ()),)),
        messages.text_message("user", "fine"),
    ]
    with pytest.raises(ProblemsError) as refused:
        headings.under_headings(given)
    assert len(refused.value.problems) == 3
