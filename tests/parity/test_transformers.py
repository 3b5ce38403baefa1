"""Float32 parity with transformers' DeepSeek-V4: logits, streams, choices, greedy tokens, gradients.

Measured differences are attached to the test report (`record_property`) and printed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import graph_of
from dsv4_jax.numerics.policy import Policy
from tests.parity import float64_equations
from tests.parity.cases import CASES, SECTION_16
from tests.parity.oracle import Oracle
from tests.parity.recorder import Capture
from tests.parity.torch_mtp import TorchMtp

LOGIT_TOLERANCE = 1e-4
FLOAT32 = Policy.of("float32")
TAPS = frozenset({"streams", "experts", "selected"})


class Run(NamedTuple):
    """One case, run by both."""

    oracle: Oracle
    parameters: dict[Any, Any]
    ids: np.ndarray
    theirs: Capture
    logits: np.ndarray
    taps: list[dict[str, np.ndarray]]


def whole_parameters(oracle: Oracle, seed: int) -> dict[Any, Any]:
    """The oracle's weights plus an MTP block's, as one tree."""
    return oracle.params() | {"mtp": {0: TorchMtp(oracle.config, seed).params()}}


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, parameters, span):
    model = nnx.merge(graph, parameters)
    out = model(span, collect=TAPS)
    return model.logits(model.hidden(out.streams)), out.taps


@functools.cache
def run(name: str) -> Run:
    case = CASES[name]
    oracle = Oracle(case.config, case.seed)
    parameters = whole_parameters(oracle, case.seed)
    shape = (case.batch, case.length)
    ids = np.random.default_rng(case.seed).integers(0, case.config.vocab_size, shape)
    span = spans.from_start(jnp.asarray(ids, jnp.int32), jnp.full(case.batch, case.length, jnp.int32))
    logits, taps = jax.device_get(forward(graph_of(case.config, FLOAT32)[0], parameters, span))
    return Run(oracle, parameters, ids, oracle.capture(ids), logits, taps)


every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_nothing_in_the_oracle_is_degenerate(name):
    """A wrong comb orientation, a missing clamp or an idle part could not hide behind these weights."""
    theirs, config = run(name).theirs, CASES[name].config
    combs = theirs.combs
    assert np.abs(combs - combs.swapaxes(-1, -2)).mean() > 0.1
    assert np.abs(combs - 1 / config.hc_mult).mean() > 0.1
    for part, shares in theirs.swiglu.items():
        assert (shares > 0.03).all(), f"{part}: gate, up, -up beyond the limit in {shares}"
    assert np.abs(theirs.logits).max() > 4
    for layer, picks in theirs.picks.items():
        assert picks.sum(-1).max() == config.index_topk < picks.shape[-1], f"layer {layer} must choose"
    assert theirs.routing_margin > 1e-5 and theirs.pick_margin > 1e-6, "choices must not be ties"


@every_case
def test_logits_and_streams(name, record_property, capsys):
    ours = run(name)
    streams = [
        float(np.abs(tap["streams"] - want).max())
        for tap, want in zip(ours.taps, ours.theirs.streams[1:], strict=True)
    ]
    worst = float(np.abs(ours.logits - ours.theirs.logits).max())
    record_property("max_abs_logit_difference", worst)
    record_property("max_abs_stream_difference_by_layer", streams)
    with capsys.disabled():
        size = np.abs(ours.theirs.logits).max()
        print(
            f"\n{name}: max |logit difference| {worst:.2e} on logits up to {size:.1f}; streams by layer "
            + " ".join(f"{x:.1e}" for x in streams)
        )
    assert worst <= LOGIT_TOLERANCE
    # Streams are about as large as the logits and pass the same layers.
    assert max(streams) <= LOGIT_TOLERANCE * max(1.0, max(np.abs(s).max() for s in ours.theirs.streams) / 10)


@every_case
def test_routing_and_selected_entries_are_identical(name):
    ours = run(name)
    assert sorted(ours.theirs.routing) == list(range(len(ours.taps)))
    for layer, want in ours.theirs.routing.items():
        np.testing.assert_array_equal(np.sort(ours.taps[layer]["experts"], -1), want, f"layer {layer}")
    selected = {layer: tap["selected"] for layer, tap in enumerate(ours.taps) if "selected" in tap}
    assert sorted(selected) == sorted(ours.theirs.picks)
    for layer, want in ours.theirs.picks.items():
        np.testing.assert_array_equal(selected[layer], want, f"layer {layer}")


@pytest.mark.parametrize("name", ["section16", "irregular"])
def test_float64_equations_agree_with_both(name):
    """Three implementations; a shared misreading of the equations would have to be made three times."""
    ours, config = run(name), CASES[name].config
    exact = float64_equations.forward(ours.parameters, config, ours.ids[0])
    assert np.abs(exact.logits - ours.theirs.logits[0]).max() <= LOGIT_TOLERANCE / 4
    assert np.abs(exact.logits - ours.logits[0]).max() <= LOGIT_TOLERANCE / 4
    for layer, picks in exact.picks.items():
        assert [set(np.flatnonzero(row)) for row in ours.taps[layer]["selected"][0]] == picks


# A prompt that ends before the first HCA entry exists and is continued past it, and one of a single token.
GREEDY = {"flash": (100, 1), "pro": (120, 1)}
NEW_TOKENS = 40


@pytest.mark.parametrize("name", GREEDY)
def test_forty_greedy_tokens(name, record_property):
    """A ragged batch through our cache against transformers' `generate` and its forward without a cache."""
    ours = run(name)
    prompts = [ours.ids[0, :length].tolist() for length in GREEDY[name]]
    model = LanguageModel(ours.oracle.config, FLOAT32, ours.parameters)
    got = model.generate(prompts, NEW_TOKENS, stop_token_ids=())
    assert got.shape == (len(prompts), NEW_TOKENS)
    for prompt, tokens in zip(prompts, got.tolist(), strict=True):
        want = ours.oracle.greedy_choices(prompt, tokens)
        record_property("smallest_margin", want.margin)
        assert want.margin > 2 * LOGIT_TOLERANCE, "the oracle's own choices must be clear"
        assert tokens == want.tokens
        assert tokens == ours.oracle.greedy_cached(prompt, NEW_TOKENS)
        assert len(set(tokens)) > 15, "a repeating continuation proves little"


@pytest.mark.parametrize("name", ["section16", "pro"])
def test_transformers_cache_agrees_with_its_full_forward(name):
    """Otherwise only the forward without a cache could serve as the oracle of generation."""
    ours = run(name)
    length = ours.ids.shape[1]
    single_steps = [1] * length if length < 50 else [length - 8] + [1] * 8
    for plan in (single_steps, [7, 1, 1, length - 12, 3]):
        assert np.abs(ours.oracle.logits_cached(ours.ids, plan) - ours.theirs.logits).max() <= 5e-5


def test_gradients():
    """Gradients of a random projection of the log-probabilities, parameter by parameter, against autograd."""
    case, ours = CASES["section16"], run("section16")
    rng = np.random.default_rng(7)
    weights = rng.normal(size=ours.logits.shape).astype(np.float32)
    model = ours.oracle.model
    model.zero_grad()
    scores = torch.log_softmax(model(torch.as_tensor(ours.ids), use_cache=False).logits, -1)
    (scores * torch.as_tensor(weights)).sum().backward()
    want = gradient_tree(ours.oracle)

    graph = graph_of(case.config, FLOAT32)[0]
    span = spans.from_start(jnp.asarray(ours.ids, jnp.int32), jnp.full(case.batch, case.length, jnp.int32))

    @jax.jit
    def gradient(parameters):
        def loss(parameters):
            net = nnx.merge(graph, parameters)
            return (jax.nn.log_softmax(net.logits(net.hidden(net(span).streams))) * weights).sum()

        return jax.grad(loss, allow_int=True)(parameters)

    got = jax.device_get(gradient(ours.parameters))
    compared = 0
    for path, theirs in jax.tree_util.tree_leaves_with_path(want):
        name = jax.tree_util.keystr(path)
        leaf: Any = got
        for key in path:
            leaf = leaf[key.key]
        if leaf.dtype == jax.dtypes.float0:
            continue
        size = np.abs(theirs).max()
        assert np.abs(leaf - theirs).max() <= 2e-4 * max(size, 1.0), (name, size)
        compared += bool(size > 0)
    assert compared > 90


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
                buffer.zero_()  # biases choose, they are not trained by gradients
    return holder.params()


def test_every_case_covers_what_it_claims():
    kinds = {kind for case in CASES.values() for kind in case.config.attention_kinds}
    assert kinds == {"window", "csa", "hca"}
    assert SECTION_16.router_kinds.count("hash") == 3
