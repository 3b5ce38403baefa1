"""Goodput and the paired comparison of the engine's benchmark, and a whole run on a tiny model when slow."""

import json

import pytest

from dsv4_jax.config import tiny
from dsv4_jax.serving.load import Load, Seen
from experiments import bench_engine


def test_goodput_counts_complete_answers_within_both_limits():
    good = Seen(0.0, (0.5, 0.6, 0.7), 4, 0, "length")
    late = Seen(0.0, (3.0, 3.1), 4, 0, "length")
    slow = Seen(0.0, (0.5, 1.5), 4, 0, "length")
    left = Seen(0.0, (0.5, 0.6), 4, 0, None)
    assert bench_engine.goodput([good, late, slow, left], 2.0, 1.0, 0.2) == pytest.approx(0.5)


def test_pairs_count_equal_answers():
    answers = iter([[[1, 2], [3, 4]], [[1, 2], [3, 5]]])
    found = bench_engine.paired(1, lambda: next(answers), lambda: next(answers))
    assert (found["equal"], found["answers"], found["tokens"]) == (1, 2, 4)
    assert found["wall"]["ratio"] > 0


def test_medians_are_of_the_rounds_ratios():
    def one(rate):
        return {"output_tokens_per_second": rate}

    rows = bench_engine.medians({"one client": [one(1.0), one(2.0)], "many": [one(4.0), one(4.0)], "no": []})
    assert rows["many"]["times_one_client"] == pytest.approx(3.0) and "no" not in rows


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch):
    out = tmp_path / "engine.json"
    one = Load(num_requests=2, prompt_tokens=8, answer_tokens=4, at_once=1)
    monkeypatch.setattr(bench_engine, "LOADS", {"one client": one})
    monkeypatch.setattr(
        bench_engine, "QUICKSTART", bench_engine.dataclasses.replace(bench_engine.QUICKSTART, config=tiny(4))
    )
    bench_engine.main(rounds=1, slots=4, lanes=2, max_length=256, answer_tokens=4, out=out)
    record = json.loads(out.read_text())
    assert [pair["equal"] for pair in record["pairs"]] == [16, 16, 1, 16]
    assert out.with_suffix(".png").stat().st_size > 10_000
