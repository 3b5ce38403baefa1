"""Multi-token prediction against an independent torch composition of transformers' parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from tests.parity import float64_equations
from tests.parity.cases import CASES, SECTION_16
from tests.parity.oracle import Oracle
from tests.parity.runs import FLOAT32, run
from tests.parity.torch_mtp import TorchMtp

pytestmark = pytest.mark.as_users_compile

TOLERANCE = 1e-4

# The block under test has layers of its own; one below it gives it streams that differ.
SHALLOW = dataclasses.replace(SECTION_16, attention_kinds=("csa",), router_kinds=("hash",))


@pytest.mark.parametrize("name", CASES)
def test_mtp_logits(name, record_property, capsys):
    ours = run(name)
    want = ours.their_mtp_logits
    worst = float(np.abs(ours.mtp_logits - want).max())
    record_property("max_abs_logit_difference", worst)
    with capsys.disabled():
        print(f"\nMTP {name}: max |logit difference| {worst:.2e} on logits up to {np.abs(want).max():.1f}")
    assert want.shape == (ours.ids.shape[0], ours.ids.shape[1] - 1, ours.oracle.config.vocab_size)
    assert np.abs(want).max() > 3
    assert worst <= TOLERANCE


@pytest.mark.parametrize("name", ["section16", "irregular"])
def test_float64_equations_agree(name):
    ours = run(name)
    exact = float64_equations.forward(ours.parameters, ours.oracle.config, ours.ids[1])
    assert np.abs(exact.mtp_logits - ours.mtp_logits[1]).max() <= TOLERANCE / 4


def test_mtp_of_packed_rows_equals_separate_rows():
    """A document's last token has no successor of its own, and nothing else of a neighbour is seen."""
    oracle, block = Oracle(SHALLOW, seed=3), TorchMtp(SHALLOW, seed=3)
    network = Network(SHALLOW, FLOAT32)

    @jax.jit
    def predict(parameters, span):
        net = network.holding(parameters)
        return net.logits(net.predict_further(net(span).streams, span)[0])

    lengths, width = (11, 1, 17, 5), 37
    ids = np.random.default_rng(4).integers(0, SHALLOW.vocab_size, (1, width))
    segments, documents, at = np.zeros((1, width), np.int32), [], 0
    for index, length in enumerate(lengths):
        documents.append(slice(at, at + length))
        segments[0, documents[-1]] = index + 1
        at += length
    span = spans.packed(jnp.asarray(ids, jnp.int32), jnp.asarray(segments))
    got = np.asarray(predict(oracle.params() | {"mtp": {0: block.params()}}, span))[0]
    for here in documents:
        if here.stop - here.start > 1:
            own = ids[:, here]
            want = block(oracle, oracle.capture(own).streams[-1], own)[0]
            assert np.abs(got[here][:-1] - want).max() <= TOLERANCE


def test_mtp_is_refused_where_there_is_none():
    without = LanguageModel(dataclasses.replace(SHALLOW, num_nextn_predict_layers=0), FLOAT32, {})
    with pytest.raises(ValueError, match="no MTP block"):
        without.mtp_logits(np.zeros((1, 5), int))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        LanguageModel(SHALLOW, FLOAT32, {}).mtp_logits(np.zeros((1, 1), int))
