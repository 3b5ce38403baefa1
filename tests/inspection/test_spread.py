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


def traffic_of(mesh, rules, rows, **more):
    found = spread(v4_flash(), mesh, rules, batch=rows, **more)
    assert len({(each.name, each.axes, each.layers) for each in found.traffic}) == len(found.traffic)
    return {(each.name, each.axes[-1]): each for each in found.traffic}, found


def test_what_split_weights_move():
    """Flash on sixteen devices with 64 rows: D = 4096, Q = 1024, 64 heads of 512, 8 groups of O = 1024."""
    found, _ = traffic_of("expert=8,tensor=2", "decode", 64)
    assert {each.chosen for each in found.values()} == {"rows"}
    share, rows = 15 / 16, 64
    heads = found["attn/wq_b", "tensor"]
    elements, scales = 64 * 512 * 1024, 64 * 512 * 1024 / 128**2
    assert (heads.layers, heads.parts) == (43, 16) and heads.weight_bytes == share * (elements + scales)
    assert heads.rows_bytes == share * rows * 2 * (1024 + 64 * 512 / 16)
    assert found["attn/wo_a", "tensor"].rows_bytes == share * rows * 2 * 8 * 512
    assert found["attn/wo_b", "tensor"].rows_bytes == share * rows * 4 * 4096
    assert found["ffn/shared/gate_up", "tensor"].rows_bytes == share * rows * 2 * 4096
    assert found["head", "tensor"].rows_bytes == share * rows * (2 * 4096 + 4 * 129280 / 16)
    assert found["embed", "tensor"].rows_bytes == share * rows * 2 * 4096
    # 4 tokens of every device go to the other 15, and the sums of 16 devices come back in float32.
    experts = [found[f"ffn/experts/{name}", "tensor"] for name in ("gate_up", "down")]
    assert sum(each.rows_bytes for each in experts) == 15 * 4 * (4096 * (2 + 4) + 8 * 6)
    assert experts[0].layers == 43


def test_weights_that_are_gathered_and_rows_that_are_whole():
    """Under the rules for training fsdp gathers, and tensor adds up float32 sums on every device."""
    found, all_of_it = traffic_of("fsdp=8,tensor=4", "train", 32, context=1024)
    assert all_of_it.tokens == 32 * 1024
    assert found["attn/wq_b", "tensor"].rows_bytes == 0  # heads stay where they are
    assert found["attn/wo_b", "tensor"].rows_bytes == 3 / 4 * 32 * 1024 / 8 * 4 * 4096 * 2
    gathered = found["attn/wkv", "fsdp"]
    assert gathered.chosen == gathered.cheaper == "weights" and gathered.parts == 8
    # Logits of a split head stay where they are; with very many tokens the gradients of hidden states, which
    # are then summed, would be more than the head, and the loss brings it to every device.
    head = found["head", "tensor"]
    assert head.chosen == head.cheaper == "rows" and head.rows_bytes == 0
    many, _ = traffic_of("fsdp=8,tensor=4", "train", 32, context=131_072)
    assert many["head", "tensor"].chosen == "weights"
    assert "head is gathered" in many["head", "tensor"].remark(1)
    # A device has a quarter of the width, of which it gathers all rows of D.
    assert found["ffn/shared/down", "fsdp"].weight_bytes == pytest.approx(7 / 8 * 4096 * 2048 / 4, rel=1e-3)
    few, _ = traffic_of("fsdp=8,tensor=4", "train", 32)
    assert few["attn/wkv", "fsdp"].cheaper == "rows"
    assert "attn/wkv is gathered" in few["attn/wkv", "fsdp"].remark(32)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(table_of(name))
