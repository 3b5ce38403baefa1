"""Gradients: ours against torch autograd, and packed rows against separate ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from tests.parity.cases import SECTION_16, shallow
from tests.parity.oracle import Oracle

FLOAT32 = Policy.of("float32")
CONFIG: ModelConfig = shallow(SECTION_16)
WIDTH = 40
# Documents start off the block grid of the row, one is a single token, and padding lies between.
PACKING = ((0, 9), (11, 24), (24, 25), (25, 37))

TOLERANCE = 1e-5
"""Between our own two forms, relative to the largest entry of a parameter's gradient (at least 1)."""

TORCH_TOLERANCE = 1e-4
"""Against torch, likewise: other summation orders in every product of forward and backward."""


@functools.cache
def gradients() -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]:
    """Of the same weighted log-probabilities: (packed row, separate rows, torch one document at a time)."""
    rng = np.random.default_rng(7)
    ids = rng.integers(0, CONFIG.vocab_size, (1, WIDTH))
    weights = rng.normal(size=(WIDTH, CONFIG.vocab_size)).astype(np.float32)
    segments = np.zeros((1, WIDTH), np.int32)
    row_ids = rng.integers(0, CONFIG.vocab_size, (len(PACKING), WIDTH))  # padding: any tokens
    packed_weights = np.zeros((1, *weights.shape), np.float32)
    row_weights = np.zeros((len(PACKING), *weights.shape), np.float32)
    for b, (start, stop) in enumerate(PACKING):
        segments[0, start:stop] = 1 + b % 2
        row_ids[b, : stop - start] = ids[0, start:stop]
        packed_weights[0, start:stop] = row_weights[b, : stop - start] = weights[start:stop]

    oracle = Oracle(CONFIG, seed=5)
    network = Network(CONFIG, FLOAT32)
    # The MTP block takes no part; any values do.
    parameters = oracle.params() | {"mtp": jax.tree.map(jnp.zeros_like, network.shapes()["mtp"])}

    @jax.jit
    def gradient(parameters, span, weights):
        def loss(parameters):
            net = network.holding(parameters)
            return (jax.nn.log_softmax(net.logits(net.hidden(net(span).streams))) * weights).sum()

        return jax.grad(loss, allow_int=True)(parameters)

    lengths = jnp.array([stop - start for start, stop in PACKING], jnp.int32)
    packed = gradient(
        parameters, spans.packed(jnp.asarray(ids, jnp.int32), jnp.asarray(segments)), packed_weights
    )
    separate = gradient(parameters, spans.from_start(jnp.asarray(row_ids, jnp.int32), lengths), row_weights)

    oracle.model.zero_grad()
    for start, stop in PACKING:
        logits = oracle.model(torch.as_tensor(ids[:, start:stop]), use_cache=False).logits
        (torch.log_softmax(logits, -1)[0] * torch.as_tensor(weights[start:stop])).sum().backward()
    return jax.device_get(packed), jax.device_get(separate), gradient_tree(oracle)


def gradient_tree(oracle: Oracle) -> dict[Any, Any]:
    """The oracle's gradients in the shape of our tree: the extraction, run on a model that holds them."""
    holder = Oracle(oracle.config)
    with torch.no_grad():
        pairs = zip(holder.model.named_parameters(), oracle.model.named_parameters(), strict=True)
        for (name, target), (same, source) in pairs:
            assert name == same
            target.copy_(torch.zeros_like(target) if source.grad is None else source.grad)
        for name, buffer in holder.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()  # biases choose experts; no gradient reaches them
    return holder.params()


def terms_of(path: tuple[Any, ...], gradient: dict[Any, Any]) -> float:
    """How large the terms are that add up to a scale of the hyper-connections; 0 for other parameters.

    A scale sums z times what its base sums, over all tokens and rows, and the terms cancel: token by token
    they come to 65 where their sum is 0.1. Rounding follows the terms, and so does the base's gradient.
    """
    *above, last = (key.key for key in path)
    if last != "scale":
        return 0.0
    for key in above:
        gradient = gradient[key]
    return float(np.abs(gradient["base"]).max())


def compare(got: dict[Any, Any], want: dict[Any, Any], tolerance: float) -> tuple[int, float]:
    """Checks every float leaf of `want`; returns how many are not all zero, and the worst difference."""
    compared, worst = 0, 0.0
    for path, right in jax.tree_util.tree_leaves_with_path(want):
        left: Any = got
        for key in path:
            left = left[key.key]
        if left.dtype == jax.dtypes.float0:
            continue
        name, size = jax.tree_util.keystr(path), np.abs(right).max()
        assert np.isfinite(left).all() and np.isfinite(right).all(), name
        difference = np.abs(left - right).max() / max(size, terms_of(path, want), 1.0)
        assert difference <= tolerance, (name, size)
        compared, worst = compared + bool(size > 0), max(worst, float(difference))
    return compared, worst


def test_packed_gradients_equal_separate_gradients(record_property):
    packed, separate, _ = gradients()
    compared, worst = compare(packed, separate, TOLERANCE)
    record_property("max_relative_difference", worst)
    assert compared >= 30, "most parameters must receive a gradient for this to mean anything"


@pytest.mark.parametrize("form", ["packed", "separate"])
def test_gradients_equal_torch(form, record_property):
    packed, separate, torchs = gradients()
    compared, worst = compare(packed if form == "packed" else separate, torchs, TORCH_TOLERANCE)
    record_property("max_relative_difference", worst)
    assert compared >= 30
