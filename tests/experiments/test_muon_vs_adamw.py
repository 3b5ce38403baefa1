"""The arithmetic of the table: which rate is best, and how many tokens Muon needs."""

import dataclasses
import json

import pytest

from experiments import muon_vs_adamw
from experiments.muon_vs_adamw import best_rate, share_of_tokens, summary


def one(optimizer, steps, loss, seed=0, rate=1e-3, cpu=1.0):
    return {
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "cpu_seconds_a_step": cpu,
        "points": [{"held_out": 9.0}, {"held_out": loss}],
    }


def test_tokens_are_interpolated_between_schedules():
    parts, losses = [0.5, 0.75, 1.0], [6.0, 5.5, 5.3]
    assert share_of_tokens(5.6, parts, losses) == pytest.approx(0.7)
    assert share_of_tokens(5.4, parts, losses) == pytest.approx(0.875)
    assert share_of_tokens(5.3, parts, losses) == pytest.approx(1.0)
    assert share_of_tokens(5.2, parts, losses) is None
    assert share_of_tokens(6.5, parts, losses) == 0.5
    assert share_of_tokens(5.6, parts, [6.0, 5.7, 5.5]) == pytest.approx(0.875)
    assert share_of_tokens(5.6, parts, [5.5, 5.7, 5.3]) == 0.5  # noise: a shorter one was good enough


def test_a_diverged_rate_is_never_the_best():
    runs = [
        one("Muon", 4, loss, rate=rate) for rate, loss in ((1e-2, 5.0), (2e-2, float("nan")), (5e-3, 5.1))
    ]
    assert best_rate([*runs, one("AdamW", 4, 1.0, rate=7.0)], "Muon") == 1e-2


def test_rows_are_of_seeds_that_are_done():
    runs = [one("AdamW", 100, 5.6), one("Muon", 50, 6.0, cpu=2.0), one("Muon", 100, 5.2, cpu=2.0)]
    (row,) = summary([*runs, one("AdamW", 100, 5.0, seed=1)], 100)
    assert row["seed"] == 0 and row["share_of_tokens"] == pytest.approx(0.75) and not row["share_is_bound"]
    text = muon_vs_adamw._verdict([row])
    assert (
        "75% of the tokens (25% fewer)" in text
        and "2.00 times the CPU time" in text
        and "1.50 times AdamW" in text
    )
    bound = summary([one("AdamW", 100, 6.5), *runs[1:]], 100)
    assert bound[0]["share_is_bound"] and "at most 50%" in muon_vs_adamw._verdict(bound)
    missed = summary([one("AdamW", 100, 5.0), *runs[1:]], 100)
    assert "did not reach" in muon_vs_adamw._verdict(missed)
    assert muon_vs_adamw._verdict([]) == ""


def test_earlier_trainings_are_known_by_what_they_were(tmp_path):
    options = muon_vs_adamw.Options(out=tmp_path / "study.json")
    record = {"options": {"evaluate_every": 20, "validation_batches": 6}}
    record |= {"tuning": [one("AdamW", 40, 6.0, seed=1000)], "runs": [one("Muon", 80, 5.0)]}
    options.out.write_text(json.dumps(record))
    assert set(muon_vs_adamw.earlier(options)) == {("AdamW", 1e-3, 40, 1000), ("Muon", 1e-3, 80, 0)}
    with pytest.raises(ValueError, match="evaluate_every and validation_batches"):
        muon_vs_adamw.earlier(dataclasses.replace(options, evaluate_every=1, validation_batches=2))


@pytest.mark.slow
def test_a_short_study_writes_everything(tmp_path):
    options = muon_vs_adamw.Options(
        seeds=(0,),
        steps=3,
        parts=(0.34,),
        tuning_steps=1,
        adamw_rates=(1e-3, 4e-3),
        muon_rates=(1e-2,),
        evaluate_every=1,
        validation_batches=1,
        out=tmp_path / "study.json",
    )
    recipe = dataclasses.replace(muon_vs_adamw.QUICKSTART, corpus_bytes=1_000_000)
    muon_vs_adamw.main(options, recipe)
    record = json.loads(options.out.read_text())
    assert [one["steps"] for one in record["runs"]] == [3, 1, 3]
    assert [point["tokens"] for point in record["runs"][0]["points"]] == [1024, 2048, 3072]
    assert options.out.with_suffix(".png").stat().st_size > 1000
    assert "| 0 |" in options.out.with_suffix(".md").read_text()
