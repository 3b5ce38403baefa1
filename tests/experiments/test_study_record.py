"""A study's record says how to run it again."""

import sys

from experiments import study_record


def test_the_command_has_its_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/qat_study.py", "--seeds", "0", "1", "--out", "a b.json"])
    assert study_record.stamp("qat_study")["command"] == (
        "python -m experiments.qat_study --seeds 0 1 --out 'a b.json'"
    )


def test_a_table_is_markdown():
    assert study_record.table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"
