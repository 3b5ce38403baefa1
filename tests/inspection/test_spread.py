"""What each device would hold: golden tables for the released models, and the sums that are shown."""

import json
import pathlib

import jax
import pytest

from dsv4_jax.command_line import main as cli
from dsv4_jax.config import v4_flash, v4_pro
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inspection.spread import spread
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from sharding.report import lines, total
from tests.models import all_kinds

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "spread"
MODELS = {"flash": v4_flash, "pro": v4_pro}
CASES = {
    # sixteen by two chips of a v6e 4x8
    "flash-decode-v6e-4x8": ("flash", "expert=16,tensor=2", "decode", "native", 64, 65536),
    "pro-decode-v6e-4x8": ("pro", "expert=16,tensor=2", "decode", "native", 64, 65536),
    "flash-decode-tpu7x-4x4x4": ("flash", "data=2,expert=32", "decode", "native", 256, 65536),
    "pro-decode-tpu7x-4x4x4": ("pro", "expert=32,tensor=2", "decode", "native", 64, 65536),
    "flash-train-v5p-8x8x4": ("flash", "fsdp=32,expert=8", "train", "bfloat16", None, None),
    "pro-train-v5p-8x8x4": ("pro", "fsdp=32,expert=8", "train", "bfloat16", None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_golden_tables(case):
    """`python -m tests.inspection.test_spread` writes them anew; look at what changed."""
    assert (GOLDEN / f"{case}.txt").read_text() == table_of(case)


def table_of(case):
    model, mesh, rules, weights, batch, context = CASES[case]
    found = spread(MODELS[model](), mesh, rules, weights, batch, context)
    rows = (*found.parameters, *found.cache)
    return "\n".join([f"{model} {mesh} {rules} {weights}", *lines(rows), f"total {total(rows)}", ""])


@pytest.mark.parametrize("mesh", ["expert=4,tensor=2", "data=2,fsdp=2,expert=2"])
def test_the_rows_are_what_devices_hold(mesh):
    """Of a model that is really placed: parameters and cache, array by array."""
    config = all_kinds(num_nextn_predict_layers=1)
    found = spread(config, mesh, "decode", "float32", batch=8, context=64, cache="plain")
    lm = LanguageModel.random(config, Policy.of("float32"), mesh=mesh)
    for rows, tree in ((found.parameters, lm.parameters), (found.cache, lm.new_cache(8, 64))):
        leaves = jax.tree.leaves(tree)
        assert sorted(row.bytes_a_device for row in rows) == sorted(
            leaf.addressable_shards[0].data.nbytes for leaf in leaves
        )
    once = sum(amounts[0] for amounts in found.by_part().values())
    assert once == sum(leaf.nbytes for leaf in jax.tree.leaves((lm.parameters, lm.new_cache(8, 64))))


def test_the_command_prints_and_refuses(capsys):
    assert cli.run(["inspect", "flash", "--mesh", "expert=16,tensor=2", "--context", "1024", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["mesh"]
    assert shown["mesh"]["expert"] == 16 and shown["batch"] == 32
    assert shown["bytes_a_device"] == sum(part["bytes_a_device"] for part in shown["parts"].values())
    assert cli.run(["inspect", "flash", "--mesh", "expert=16,tensor=2"]) == 0
    assert "On 32 devices, expert=16,tensor=2" in capsys.readouterr().out
    assert cli.run(["inspect", "flash", "--mesh", "expert=24"]) == 2
    assert "E = 256 cannot be split 24 ways (mesh axis expert); 16, 32" in capsys.readouterr().err
    with pytest.raises(ProblemsError, match="no rules 'fast'"):
        spread(v4_flash(), "expert=2", "fast")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(table_of(name))
