"""The check of formulas: its cases can be planned, and its table says what is outside the tolerance."""

import pytest

from dsv4_jax.planning.job import check
from experiments import plan_check


@pytest.mark.parametrize("name", plan_check.CASES)
def test_cases_can_be_planned(name):
    job = plan_check.job_of(name)
    check(job)
    found = plan_check.by_formula(job)
    assert 0 < found["arguments"] < job.slice.chip.hbm_bytes


def test_what_is_outside_is_said():
    row = {"case": "a", "slice": "v6e:2x2", "mesh": "expert=4", "work": "decode"}
    formula = {"arguments": 100 * 2**30, "temporaries": 2**30}
    rows = [
        row | {"formula": formula, "compiler": {"arguments": size * 2**30, "temporaries": 2**29}}
        for size in (98, 104)
    ]
    rows.append(row | {"formula": formula, "failed": "too large"})
    within, outside, failed = plan_check.markdown(rows, "a command").splitlines()[-3:]
    assert "+2.04 %" in within and "outside" not in within
    assert "-3.85 %: outside" in outside
    assert "refused" in failed and "too large" in failed
