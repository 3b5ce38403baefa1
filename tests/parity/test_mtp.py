"""Multi-token prediction against an independent torch composition of transformers' parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.config import ModelConfig
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import graph_of
from dsv4_jax.numerics.policy import Policy
from tests.parity import float64_equations
from tests.parity.cases import IRREGULAR, SECTION_16
from tests.parity.oracle import Oracle
from tests.parity.torch_mtp import TorchMtp

TOLERANCE = 1e-4
FLOAT32 = Policy.of("float32")


def shallow(config: ModelConfig) -> ModelConfig:
    """Two layers under the MTP block: its own block is what is tested here."""
    return dataclasses.replace(config, attention_kinds=("csa", "hca"), router_kinds=("hash", "learned"))


CONFIGS = {"section16": shallow(SECTION_16), "irregular": shallow(IRREGULAR)}


@functools.cache
def models(name: str) -> tuple[Oracle, TorchMtp, LanguageModel]:
    config = CONFIGS[name]
    oracle, block = Oracle(config, seed=3), TorchMtp(config, seed=3)
    return oracle, block, LanguageModel(config, FLOAT32, oracle.params() | {"mtp": {0: block.params()}})


@pytest.mark.parametrize("name", CONFIGS)
def test_mtp_logits(name, record_property, capsys):
    oracle, block, model = models(name)
    ids = np.random.default_rng(3).integers(0, oracle.config.vocab_size, (2, 37))
    want = block(oracle, oracle.capture(ids).streams[-1], ids)
    got = np.asarray(model.mtp_logits(ids))
    worst = float(np.abs(got - want).max())
    record_property("max_abs_logit_difference", worst)
    with capsys.disabled():
        print(f"\nMTP {name}: max |logit difference| {worst:.2e} on logits up to {np.abs(want).max():.1f}")
    assert got.shape == (2, 36, oracle.config.vocab_size)
    assert np.abs(want).max() > 3
    assert worst <= TOLERANCE
    exact = float64_equations.forward(model.parameters, oracle.config, ids[1])
    assert np.abs(exact.mtp_logits - got[1]).max() <= TOLERANCE


def test_mtp_of_packed_rows_equals_separate_rows():
    """A document's last token has no successor of its own, and nothing else of a neighbour is seen."""
    oracle, block, model = models("section16")
    graph = graph_of(oracle.config, FLOAT32)[0]

    @jax.jit
    def predict(parameters, span):
        net = nnx.merge(graph, parameters)
        return net.logits(net.predict_further(net(span).streams, span)[0])

    lengths, width = (11, 1, 17, 5), 37
    ids = np.random.default_rng(4).integers(0, oracle.config.vocab_size, (1, width))
    segments, documents, at = np.zeros((1, width), np.int32), [], 0
    for index, length in enumerate(lengths):
        documents.append(slice(at, at + length))
        segments[0, documents[-1]] = index + 1
        at += length
    span = spans.packed(jnp.asarray(ids, jnp.int32), jnp.asarray(segments))
    got = np.asarray(predict(model.parameters, span))[0]
    for here in documents:
        if here.stop - here.start > 1:
            own = ids[:, here]
            want = block(oracle, oracle.capture(own).streams[-1], own)[0]
            assert np.abs(got[here][:-1] - want).max() <= TOLERANCE


def test_mtp_is_refused_where_there_is_none():
    config = dataclasses.replace(CONFIGS["section16"], num_nextn_predict_layers=0)
    model = LanguageModel.random(config, FLOAT32)
    with pytest.raises(ValueError, match="no MTP block"):
        model.mtp_logits(np.zeros((1, 5), int))
    _, _, with_block = models("section16")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        with_block.mtp_logits(np.zeros((1, 1), int))
