"""The benchmark of training steps runs, compares like with like, and takes the right medians."""

import json

import pytest

from experiments import bench_train


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    out = tmp_path / "bench.json"
    bench_train.main(bench_train.Options(sizes=("tiny",), repeats=2, muon=False, out=out))
    (row,) = json.loads(out.read_text())["rows"]
    assert len(row["repeats"]) == 2 and row["wall"]["ratio"] > 0
    taken = row["repeats"][0]["their_parts"]
    assert sum(taken[part][0] for part in bench_train.PARTS) <= row["repeats"][0]["theirs"][0]
    assert "| tiny | 2 x 32 |" in out.with_suffix(".md").read_text()


def test_different_losses_are_refused():
    bench_train.check_same(5.0, 5.00004)
    with pytest.raises(RuntimeError, match="different losses"):
        bench_train.check_same(5.0, 5.0001)


def test_the_ratio_is_the_median_of_the_repeats_ratios():
    repeats = [
        {
            "peak": (1e9, 1e9),
            "ours": (ours, ours),
            "theirs": (theirs, 2 * theirs),
            "our_parts": {"forward": (0.1, 0.1), "forward and backward": (0.3, 0.3)},
            "their_parts": dict.fromkeys(bench_train.PARTS, (0.2, 0.2)),
        }
        for ours, theirs in ((1.0, 2.0), (1.0, 3.0), (10.0, 10.0))
    ]
    row = bench_train.summary("tiny", bench_train.SIZES["tiny"], repeats, flops=5e8)
    assert row["wall"]["ratio"] == 2.0 and row["wall"]["ratio_range"] == [1.0, 3.0]
    assert row["cpu"]["ratio"] == 4.0
    assert row["wall"]["our_parts"] == pytest.approx({"forward": 0.1, "backward": 0.2, "optimizer": 0.7})
    assert row["share_of_peak"]["ours"] == pytest.approx(0.5)
    assert row["tokens_per_second"]["ours"] == pytest.approx(64)
