"""The comparison of two trees: medians of ratios, and children that say what they cannot do."""

from pathlib import Path

import pytest

from experiments import bench_trees

ROOT = Path(__file__).resolve().parents[2]


def test_ratios_are_of_pairs():
    pairs = [([2.0, 1.0], [1.0, 1.0]), ([9.0, 3.0], [3.0, 1.0]), ([1.0, 2.0], [1.0, 1.0])]
    row = bench_trees.row_of("decode-1", pairs)
    assert row["wall"] == {"ratio": 2.0, "range": [1.0, 3.0], "seconds": [2.0, 1.0]}
    assert row["cpu"]["ratio"] == 2.0


def test_a_child_uses_its_own_tree_and_says_what_fails(tmp_path):
    with bench_trees.Tree(ROOT) as tree, pytest.raises(RuntimeError, match="ValueError"):
        tree.measure("prefill-many")
    with bench_trees.Tree(tmp_path) as empty, pytest.raises(RuntimeError, match="ended"):
        empty.measure("prefill-8")
