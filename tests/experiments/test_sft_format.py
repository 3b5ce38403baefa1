"""The chats of the fine-tuning study: right answers in the form that is scored, and held-out words."""

from dsv4_jax.training.chat_records import message_problems
from dsv4_jax.training.lora import chosen
from experiments.sft_format import CONFIG, FORM, HELD_OUT, LORA_SETTINGS, chat, words


def test_chats_are_valid_and_in_form():
    messages = chat("argparse")
    assert message_problems(messages) == []
    assert FORM.fullmatch(messages[1]["content"])[1] == "8"
    for wrong in ("Answer: 8 letters", "Answer: eight letters.", " Answer: 8 letters.", "8"):
        assert not FORM.fullmatch(wrong)


def test_words_are_enough_and_each_once():
    found = words(0)
    assert len(found) > HELD_OUT + 3000 and len(set(found)) == len(found)
    assert found != words(1) and sorted(found) == sorted(words(1))


def test_the_targets_exist():
    assert len(chosen(CONFIG, LORA_SETTINGS)) > 10
