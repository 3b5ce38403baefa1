"""The check tells a caught fault from a survivor, and keeps what it found."""

import json

import pytest

from experiments import kernel_mutations
from experiments.kernel_faults import Fault
from experiments.kernel_mutations import Outcome


def small_tree(root, test):
    """A copy of the tree with one family and one test."""
    for folder in ("pallas_kernels/family", "tests/kernels"):
        (root / folder).mkdir(parents=True)
    (root / "pallas_kernels/family/op.py").write_text("value = 1\n")
    (root / "tests/kernels/test_family.py").write_text(test)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\n')


FAMILY = Fault("family", "wrong value", "op.py", "", "value = 1", "value = 2")
SAME = Fault("family", "same", "op.py", "", "1", "1.0")
READS = "from pallas_kernels.family.op import value\n"
SHARP = READS + "def test_value():\n    assert value == 1\n"
BLUNT = READS + "def test_value():\n    assert value\ndef test_that_it_compiles():\n    assert value == 1\n"
BROKEN = READS.replace("value", "nothing")


@pytest.mark.parametrize(("test", "verdict"), [(SHARP, "failed"), (BLUNT, "passed"), (BROKEN, "error")])
def test_verdicts(tmp_path, test, verdict):
    """The copy is what is tested, and tests that only compile have no say."""
    small_tree(tmp_path, test)
    FAMILY.apply(tmp_path)
    outcome = kernel_mutations.run_tests(tmp_path, "family", 120)
    assert outcome.verdict == verdict, outcome
    if verdict == "failed":
        assert outcome.test == "test_value" and "assert 2 == 1" in outcome.message


def test_a_hanging_test_is_no_verdict(tmp_path):
    small_tree(tmp_path, "import time\ntime.sleep(60)\n")
    assert kernel_mutations.run_tests(tmp_path, "family", 1).verdict == "timeout"


@pytest.fixture
def faults(monkeypatch, tmp_path):
    """Two faults of one family, of which the tests notice the first."""
    monkeypatch.setattr(kernel_mutations, "FAULTS", [FAMILY, SAME])
    monkeypatch.setattr(kernel_mutations, "copy_tree", lambda root: small_tree(root, SHARP))
    return kernel_mutations.Options(families=("family",), out=tmp_path / "results" / "rows.json")


def test_a_survivor_is_an_error_and_named(faults, capsys):
    with pytest.raises(SystemExit, match="1"):
        kernel_mutations.main(faults)
    assert "NOT CAUGHT: passed" in capsys.readouterr().out
    rows = json.loads(faults.out.read_text())
    assert [(row["name"], row["caught"]) for row in rows] == [("wrong value", True), ("same", False)]
    text = faults.out.with_suffix(".md").read_text()
    assert "1 of 2 faults were caught" in text
    assert "| family | wrong value | `test_value` | " in text and "| **not caught** (passed) |" in text


def test_missing_faults_are_those_not_caught_word_for_word(faults, monkeypatch):
    with pytest.raises(SystemExit, match="1"):
        kernel_mutations.main(faults)
    missing = kernel_mutations.Options(families=("family",), missing=True, out=faults.out)
    with pytest.raises(SystemExit, match="1"):
        kernel_mutations.main(missing)
    assert kernel_mutations.caught(faults.out) == [FAMILY]
    changed = Fault("family", "wrong value", "op.py", "", "value = 1", "value = 3")
    monkeypatch.setattr(kernel_mutations, "FAULTS", [changed])
    kernel_mutations.main(missing)
    assert kernel_mutations.caught(faults.out) == [changed]


def test_rows_of_other_runs_stay(faults, monkeypatch):
    for _ in range(2):
        kernel_mutations.main(kernel_mutations.Options(families=("family",), faults="wrong", out=faults.out))
    kernel_mutations.keep(faults.out, json.loads(faults.out.read_text())[0] | {"name": "same"})
    assert [row["name"] for row in json.loads(faults.out.read_text())] == ["wrong value", "same"]
    monkeypatch.setattr(kernel_mutations, "FAULTS", [FAMILY])  # "same" is no fault any more
    kernel_mutations.keep(faults.out, json.loads(faults.out.read_text())[0])
    assert [row["name"] for row in json.loads(faults.out.read_text())] == ["wrong value"]


def test_tests_that_fail_anyway_prove_nothing(faults, monkeypatch):
    monkeypatch.setattr(
        kernel_mutations, "run_tests", lambda *a: Outcome("failed", "test_value", "assert 1 == 2", 0.1)
    )
    with pytest.raises(SystemExit, match="family fails without a fault"):
        kernel_mutations.main(faults)
    with pytest.raises(SystemExit, match="no fault of .* has 'x'"):
        kernel_mutations.main(kernel_mutations.Options(families=("family",), faults="x", out=faults.out))


@pytest.mark.slow
def test_a_real_fault_is_caught(tmp_path):
    options = kernel_mutations.Options(
        families=("linear_cross_entropy",), faults="the target's logit", out=tmp_path / "rows.json"
    )
    kernel_mutations.main(options)
    (row,) = json.loads(options.out.read_text())
    assert row["caught"] and row["test"].startswith("test_")
