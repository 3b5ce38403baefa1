"""The whole model with its kernels, compiled for TPUs that are not here, at the widths of V4-Flash."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.step import forward_losses
from tests.kernels.ahead_of_time import CHIPS, compile_for

LENGTH = 2048
# Every layer kind and both routers, and more entries than the indexer chooses. Few experts and a small
# vocabulary: their number changes no kernel.
CONFIG = dataclasses.replace(
    v4_flash(),
    attention_kinds=("window", "csa", "hca"),
    router_kinds=("hash", "learned", "learned"),
    num_nextn_predict_layers=0,
    n_routed_experts=8,
    vocab_size=4096,
    index_topk=256,
)
NETWORK = Network(CONFIG, Policy.of("bfloat16", kernels="pallas"))
TOKENS = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)


def compiled(chip, function):
    leaves, tree = jax.tree.flatten(NETWORK.shapes())
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    flat = lambda tokens, *leaves: function(jax.tree.unflatten(tree, leaves), tokens)  # noqa: E731
    return compile_for(chip, flat, TOKENS, *shapes)


def streams(parameters, tokens):
    span = spans.from_start(tokens, jnp.full((1,), LENGTH, jnp.int32))
    return NETWORK.holding(parameters)(span).streams


def gradients(parameters, tokens):
    segments = np.ones((1, LENGTH), np.int32)

    def loss(parameters):
        return forward_losses(NETWORK.holding(parameters), Batch(tokens, segments))[0].total()

    return jax.grad(loss, allow_int=True)(parameters)


@pytest.mark.slow
def test_forward():
    program = compiled("v6e", streams).as_text()
    # Each layer: pre, post_pre, post, attention, experts (gate and up, down); the compressors of CSA (two)
    # and HCA, and the selection.
    assert program.count('custom_call_target="tpu_custom_call"') == (4 + 2) * 3 + 3 + 1
    # The kernels keep streams outermost, the model tokens: inside the program that must cost no copies, but
    # one where the streams start and one where they leave.
    whole = r"= bf16\[(1,2048,4|4,2048),4096\]\S* (copy|transpose)\("
    assert len(re.findall(whole, program)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_backward(chip):
    program = compiled(chip, gradients).as_text()
    assert program.count('custom_call_target="tpu_custom_call"') > 2 * 16
