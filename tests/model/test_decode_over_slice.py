"""A decode step at the full width of V4-Flash over sixteen chips that are not here: what moves between them.

One CSA layer, which has every kind of weight and cache. `experiments/decode_step.py` compiles all layers.
"""

import dataclasses
import re

import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.inspection.movement import traffic
from dsv4_jax.planning.described import placement_on
from dsv4_jax.planning.program_text import collectives, result_bytes
from dsv4_jax.planning.slices import Slice
from dsv4_jax.planning.step_shapes import lowered_serving, serving_shapes
from sharding.rules import DECODE
from tests.kernels.ahead_of_time import compiled, devices

CONFIG = dataclasses.replace(
    v4_flash(), attention_kinds=("csa",), router_kinds=("learned",), num_nextn_predict_layers=0
)
BATCH, CONTEXT, MESH = 64, 2**16, "expert=8,tensor=2"
PARTS = 16


@pytest.fixture(scope="module")
def program():
    """The step that `LanguageModel.extend` runs, and its placement."""
    devices("v6e 4x4")  # skips without libtpu
    placement = placement_on(Slice("v6e", (4, 4)), MESH, DECODE)
    held = serving_shapes(CONFIG, placement, BATCH, CONTEXT)
    return compiled(lowered_serving(held, BATCH)).as_text(), placement


def test_no_weight_cache_or_query_is_gathered_whole(program):
    """Nothing that is moved is larger than all rows of the streams, or a device's part of the logits; nothing
    has the type of a stored weight or a cache; and all of it is what the formula says."""
    text, placement = program
    moved = collectives(text)
    rows, logits = 4 * BATCH * CONFIG.hidden_size, 4 * BATCH * CONFIG.vocab_size // PARTS
    names = {cost.instruction.opcode.removesuffix("-start") for cost in moved}
    assert {"all-gather", "all-to-all"} <= names
    total = 0.0
    for cost in moved:
        shape, opcode = cost.instruction.shape, cost.instruction.opcode.removesuffix("-start")
        assert result_bytes(shape) <= (logits if "score" in cost.instruction.scope else rows), shape
        assert not re.search(r"(f8\w*|[su]8|u32|s4|u4)\[\d+,", shape), shape
        share = {"all-reduce": 2 * (1 - 1 / PARTS), "collective-permute": 1}.get(opcode, 1 - 1 / PARTS)
        total += cost.runs * share * result_bytes(shape)
    formula = sum(each.rows_bytes * each.layers for each in traffic(CONFIG, placement, BATCH, native=True))
    assert total <= 1.1 * formula
    heads = CONFIG.num_attention_heads * CONFIG.head_dim
    queries = [cost for cost in moved if f"{CONFIG.head_dim}]" in cost.instruction.shape]
    assert {result_bytes(cost.instruction.shape) for cost in queries} == {2 * BATCH * heads // PARTS}


def kernels_under_way(text):
    """Names of the kernels that run, in the order of the compiled program, while an exchange is under way."""
    under_way, found = set(), []
    for line in text.splitlines():
        made = re.match(r"\s+(?:ROOT )?%([\w.-]+) = .*? ([a-z][\w-]*)\(%?([\w.-]*)", line)
        if made is None:
            under_way = set() if line.startswith("}") else under_way  # the end of a computation
        elif made[2] == "all-to-all-start":
            under_way.add(made[1])
        elif made[2] == "all-to-all-done":
            under_way.discard(made[3])
        elif "tpu_custom_call" in line and under_way:
            found.append(made[1])
    return found


def test_exchanges_run_while_kernels_do(program):
    """With the options that the step is compiled with on TPUs; without them every exchange is synchronous."""
    text, _ = program
    starts = text.count(" all-to-all-start(")
    assert starts >= 5 and starts == text.count(" all-to-all-done(")
    assert text.count(" all-to-all(") < starts
    assert kernels_under_way(text)
