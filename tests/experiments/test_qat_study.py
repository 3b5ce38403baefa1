"""What is rounded in the harsher setting, and the arithmetic of the table; the whole study when slow."""

import json

import jax
import numpy as np
import pytest

from dsv4_jax.model.initial import initial_parameters
from dsv4_jax.numerics import qat
from experiments import qat_study


def test_every_matrix_of_the_sublayers_is_rounded_and_nothing_else(monkeypatch):
    monkeypatch.setattr(qat, "fake_mxfp4", lambda leaf: leaf + 1)  # which leaves; not to what
    before = initial_parameters(qat_study.PLAIN.config, qat_study.PLAIN.policy, seed=0)
    after = jax.tree_util.tree_map_with_path(qat_study._in_fp4, before)
    changed = set()
    for (path, old), new in zip(
        jax.tree_util.tree_flatten_with_path(before)[0], jax.tree.leaves(after), strict=True
    ):
        names = "/".join(str(key.key) for key in path)
        if not np.array_equal(old, new):
            changed.add(names.partition("blocks/")[2] or names)
    attention = {"wq_a", "wq_b", "wkv", "wo_a", "wo_b"}
    for name in attention:
        assert f"0/attn/{name}" in changed
    assert "0/attn/compressor/wgate" in changed and "0/attn/indexer/wq_b" in changed
    assert {"0/ffn/experts/gate_up", "0/ffn/experts/down", "0/ffn/shared/down"} <= changed
    assert "mtp/0/block/ffn/experts/down" in changed
    for left_out in ("embed", "head", "0/ffn/gate/weight", "0/attn/q_norm", "0/hc_attn/fn", "mtp/0/e_proj"):
        assert left_out not in changed


def runs(plain, rounded, trained_rounded, trained_plain):
    return [
        {"seed": 3, "trained_with": "plain", "losses": [{}, {"plain": plain, "experts": rounded}]},
        {
            "seed": 3,
            "trained_with": "experts",
            "losses": [{}, {"plain": trained_plain, "experts": trained_rounded}],
        },
    ]


def test_summary():
    (row,) = qat_study.summary(runs(4.0, 4.2, 4.05, 4.01))
    assert row["gap"] == pytest.approx(0.2) and row["recovered"] == pytest.approx(0.75)
    assert row["training_noise"] == pytest.approx(0.01) and row["seed"] == 3
    assert row["rounding_cost_with"] == pytest.approx(0.04)
    assert "75% of the mean gap" in qat_study.means([row])


def test_a_gap_within_the_noise_gives_no_share():
    rows = qat_study.summary(runs(4.0, 4.005, 4.004, 4.01))
    assert "no share" in qat_study.means(rows)
    options = {"base_steps": 1, "more_steps": 1, "more_learning_rate": 1e-3, "validation_batches": 1}
    stamp = dict.fromkeys(("date", "machine", "jax", "command"), "x")
    assert "gap too small" in qat_study.markdown(stamp | {"options": options, "rows": rows})


@pytest.mark.slow
def test_the_study_runs(tmp_path):
    out = tmp_path / "results" / "study.json"
    qat_study.main(
        qat_study.Options(
            seeds=(0,), base_steps=2, more_steps=2, evaluate_every=1, validation_batches=1, out=out
        )
    )
    record = json.loads(out.read_text())
    assert [row["setting"] for row in record["rows"]] == ["experts", "every matrix"]
    plain, experts, every = (run["losses"] for run in record["runs"])
    # All start from the same base, and rounding does something.
    assert plain[0]["experts"] == experts[0]["experts"] != plain[0]["plain"] == every[0]["plain"]
    assert [point["step"] for point in experts] == [0, 1, 2]
    assert out.with_suffix(".png").stat().st_size > 10_000
