"""A decode step over a stack of layers at the widths of V4-Flash, compiled for a TPU that is not here.

Weights are as official checkpoints store them. What the compiled program makes of them is what a step pays
for beyond reading each weight once.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.config import layer_stacks, v4_flash
from dsv4_jax.inspection.native_shapes import native_shapes
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import parameters
from tests.kernels.ahead_of_time import compile_for

BATCH, CAPACITY = 8, 2**15
# Four repeats of the unit (HCA, CSA): a scanned stack. Few experts and a small vocabulary: their number makes
# no other program.
CONFIG = dataclasses.replace(
    v4_flash(),
    attention_kinds=("hca", "csa") * 4,
    router_kinds=("learned",) * 8,
    num_nextn_predict_layers=0,
    n_routed_experts=8,
    vocab_size=4096,
)
POLICY = Policy.of("bfloat16", kernels="pallas", cache="fp8+mxfp4")


def program() -> str:
    network = Network(CONFIG, POLICY)
    stored = (jnp.bfloat16, 8, POLICY.row_dtype, POLICY.cache_format, False)
    cache = jax.eval_shape(lambda: new_cache(CONFIG, BATCH, CAPACITY, *stored))
    arguments = (native_shapes(CONFIG), cache, jax.ShapeDtypeStruct((BATCH, 1), jnp.int32))
    leaves, tree = jax.tree.flatten(arguments)

    def step(*leaves):
        weights, cache, tokens = jax.tree.unflatten(tree, leaves)
        span = spans.appended(tokens, cache.length, jnp.ones((BATCH,), jnp.int32))
        after = network.holding(weights)(span, cache)
        return after.streams, after.cache

    return compile_for("v6e", step, *leaves).as_text()


def copies_of_weights(text: str) -> list[str]:
    """What a program makes that is as large as an FP8 matrix of the model, or holds one in a wider format."""
    matrices = {p.stored for p in parameters(CONFIG).values() if p.matrix is not None and p.role != "expert"}
    made = re.findall(
        r"^\s*(?:ROOT )?\S+ = (f8e4m3fn|bf16|f32)\[([\d,]+)\]\S* (copy|fusion|dynamic-slice|slice|convert)\(",
        text,
        re.M,
    )
    found = []
    for dtype, shape, operation in made:
        sizes = tuple(map(int, shape.split(",")))
        held = dtype == "f8e4m3fn" and sizes[-2:] in matrices
        # wo_a of all groups, in any arrangement of its axes
        decoded = dtype != "f8e4m3fn" and math.prod(sizes) == 8192 * 4096
        if held or decoded:
            found.append(f"{operation} {dtype}[{shape}]")
    return found


@pytest.mark.slow
def test_fp8_weights_are_read_where_they_lie():
    (stack,) = layer_stacks(CONFIG)
    assert stack.repeats == 4
    assert not copies_of_weights(program())
