"""Each variant changes what it says, and the arithmetic of the table is right; a whole run when slow."""

import json

import numpy as np
import pytest

from dsv4_jax.training.recipe import QUICKSTART
from experiments import ablations


def test_variants_change_what_they_say():
    recipes = {name: ablations.recipe_of(name, ablations.Options()) for name in ablations.VARIANTS}
    assert recipes["base"].config == QUICKSTART.config and recipes["base"].policy == QUICKSTART.policy
    assert recipes["one stream"].config.hc_mult == 1
    assert recipes["no MTP"].config.num_nextn_predict_layers == 0
    assert recipes["FP8"].policy.weights == "fp8" and not recipes["FP8"].policy.simulates("expert_fp4")
    assert recipes["FP4 QAT"].policy.simulates("expert_fp4")
    assert all(recipe.policy.param_dtype == np.float32 for recipe in recipes.values())


def test_load_spread_is_of_learned_layers_alone():
    loads = np.array([[100.0, 0.0], [3.0, 1.0], [2.0, 2.0]])
    assert ablations.load_spread(loads, 1) == pytest.approx(0.25)  # (1 / 2 and 0) / 2


def test_differences_are_within_a_seed():
    rows = [
        {"variant": name, "seed": seed, "held_out": loss}
        for name, seed, loss in (("base", 0, 4.0), ("base", 1, 5.0), ("FP8", 0, 4.1), ("FP8", 1, 5.3))
    ]
    assert ablations.differences(rows) == {"FP8": pytest.approx([0.1, 0.3])}
    assert ablations.differences(rows[1:]) == {"FP8": pytest.approx([0.3])}


@pytest.mark.slow
def test_the_ablations_run(tmp_path):
    out = tmp_path / "ablations.json"
    ablations.main(
        ablations.Options(
            seeds=(0,), only=("base", "no balance"), steps=2, validation_batches=1, long=(512,), long_steps=1,
            out=out,
        )
    )  # fmt: skip
    record = json.loads(out.read_text())
    base, without = record["rows"]
    assert base["losses"][0] == without["losses"][0] and base["losses"][1] != without["losses"][1]
    assert [row["attention"] for row in record["long"]] == ["sparse", "dense"]
    assert out.with_suffix(".png").stat().st_size > 10_000
