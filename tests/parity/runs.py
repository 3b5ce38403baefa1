"""One case run by transformers and by us, computed once and shared by all tests that look at it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from tests.parity.cases import CASES
from tests.parity.oracle import Oracle
from tests.parity.recorder import Capture
from tests.parity.torch_mtp import TorchMtp

FLOAT32 = Policy.of("float32")
TAPS = frozenset({"streams", "experts", "selected"})


class Run(NamedTuple):
    """What both made of the same tokens; our parameters are the oracle's."""

    oracle: Oracle
    parameters: dict[Any, Any]
    ids: np.ndarray
    theirs: Capture
    their_mtp_logits: np.ndarray
    logits: np.ndarray
    mtp_logits: np.ndarray
    taps: list[dict[str, np.ndarray]]


@functools.partial(jax.jit, static_argnums=0)
def forward(network, parameters, span):
    """Logits, MTP logits and taps of one call."""
    model = network.holding(parameters)
    out = model(span, collect=TAPS)
    further, *_ = model.predict_further(out.streams, span)
    return model.logits(model.hidden(out.streams)), model.logits(further), out.taps


@functools.cache
def run(name: str) -> Run:
    """Builds the models of `CASES[name]` and runs both."""
    case = CASES[name]
    oracle, mtp = Oracle(case.config, case.seed), TorchMtp(case.config, case.seed)
    parameters = oracle.params() | {"mtp": {0: mtp.params()}}
    shape = (case.batch, case.length)
    ids = np.random.default_rng(case.seed).integers(0, case.config.vocab_size, shape)
    span = spans.from_start(jnp.asarray(ids, jnp.int32), jnp.full(case.batch, case.length, jnp.int32))
    logits, mtp_logits, taps = jax.device_get(forward(Network(case.config, FLOAT32), parameters, span))
    theirs = oracle.capture(ids)
    their_mtp_logits = mtp(oracle, theirs.streams[-1], ids)
    return Run(oracle, parameters, ids, theirs, their_mtp_logits, logits, mtp_logits, taps)
