"""Float32 parity with transformers' DeepSeek-V4: logits, streams, choices, greedy tokens.

Measured differences are attached to the test report (`record_property`) and printed.
"""

import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from tests.parity import float64_equations
from tests.parity.cases import CASES, SECTION_16
from tests.parity.runs import FLOAT32, run

pytestmark = pytest.mark.as_users_compile

LOGIT_TOLERANCE = 1e-4


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


# By default once: that a cache gives what whole sequences give is shown in `test_properties.py`.
@pytest.mark.parametrize("name", ["flash", pytest.param("pro", marks=pytest.mark.slow)])
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


def test_every_case_covers_what_it_claims():
    kinds = {kind for case in CASES.values() for kind in case.config.attention_kinds}
    assert kinds == {"window", "csa", "hca"}
    assert SECTION_16.router_kinds.count("hash") == 3
