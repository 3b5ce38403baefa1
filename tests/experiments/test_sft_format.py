"""The chats of the fine-tuning study: right answers in the form that is scored, and held-out words."""

from dsv4_jax.command_line import train
from dsv4_jax.training import presets
from dsv4_jax.training.chat_records import message_problems
from dsv4_jax.training.lora import chosen
from experiments.sft_format import CONFIG, FORM, HELD_OUT, __file__, chat, report, run, words


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


def test_the_presets_fit_the_model():
    """`dsv4 train FILE`, `sft` and `lora` are what the study runs."""
    assert train.configured(__file__) == run()
    assert len(chosen(CONFIG, presets.lora().lora)) > 10
    assert presets.sft().stages == presets.lora().stages and presets.sft().lora is None


def test_the_report_tells_what_was_not_compared():
    row = {"form": 1.0, "right": 0.25, "trained": 1234, "difference": None, "seconds": 1.0}
    models = {"base": row, "lora": row | {"difference": 2e-6}}
    told = report({"base_steps": 5, "steps": 6, "seed": 0, "models": models})
    assert "| base | 100.0% | 25.0% | 1,234 | not compared |" in told
    assert "| lora | 100.0% | 25.0% | 1,234 | 2.0e-06 |" in told
