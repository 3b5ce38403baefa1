"""The study of transports, on the smallest layer there is."""

import json
import os
import subprocess
import sys

import numpy as np

from experiments.bench_dispatch import SIDES, Options, fullest, routing
from sharding.expert_parallel import Cut, Travel
from sharding.transports import Group, Plan, dense


def test_routing_is_distinct_and_as_skewed_as_it_says():
    options = Options(experts=16, top_k=4)
    drawn = {
        kind: np.asarray(routing(np.random.default_rng(0), kind, 500, options))
        for kind in ("uniform", "skewed")
    }
    assert all(len(set(row)) == 4 for ids in drawn.values() for row in ids)
    whole = Travel(Cut((), (), (), ()), "gather", None)
    apart = Travel(Cut(("expert",), (), (), ()), "gather", Plan(Group(("expert",), 4, 4, ()), dense, 1))
    assert fullest(drawn["uniform"], 16, whole) == 1
    assert fullest(drawn["uniform"], 16, apart) < 1.2 < 1.6 < fullest(drawn["skewed"], 16, apart)


def test_every_side_is_measured(tmp_path):
    out = tmp_path / "bench.json"
    sizes = "--tokens 9 --runs 1 --experts 8 --top-k 2 --hidden 16 --width 8 --no-backward --out"
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.bench_dispatch", *sizes.split(), str(out)],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Infinity" not in out.read_text()  # is no JSON
    record = json.loads(out.read_text())
    assert [row["routing"] for row in record["rows"]] == ["uniform", "skewed"]
    for row in record["rows"]:
        assert set(row["milliseconds"]) == set(row["costs"]) == set(SIDES)
        assert row["over_gather"]["gather"] == 1 and min(row["milliseconds"].values()) > 0
        assert row["all_costs"]["ragged"]["seconds"] is None
    assert out.with_suffix(".md").read_text().count("| 9 |") == 2
