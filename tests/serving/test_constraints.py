"""Masks in the engine, with a grammar of the test's own: nothing that happens beside it changes an answer."""

import dataclasses

import numpy as np
import pytest

from dsv4_jax.config import DSpark
from dsv4_jax.inference.drafters import widths_for
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import NO_WAY, EngineCore
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.models import compressed_kinds
from tests.serving.test_core import nothing_compiled

SIZES = EngineSettings(max_length=64, num_slots=3, num_lanes=2, chunk=4, num_pages=64, num_states=40)
STOP, GATE = 1, 8


class Counted:
    """`count` tokens, the k-th from a set of its own, then the end; or, if it is `stuck`, nothing more."""

    def __init__(self, opens_after=None, count=6, stuck=False):
        self.opens_after, self.count, self.stuck = opens_after, count, stuck

    def sets(self, place):
        return {20 + place, 100 + place, 299 - place}

    def begin(self):
        return Place(self)


class Place:
    def __init__(self, grammar):
        self.grammar, self.place = grammar, 0

    def allowed(self, words):
        words[:] = 0
        if self.place < self.grammar.count:
            for token in self.grammar.sets(self.place):
                words[token // 32] |= np.uint32(1 << token % 32)

    def may_end(self):
        return self.place == self.grammar.count and not self.grammar.stuck

    def take(self, token):
        ok = self.place < self.grammar.count and token in self.grammar.sets(self.place)
        self.place += 1
        return ok


def requests():
    plain = Sampling(max_tokens=30, temperature=0)
    prompt = (7, GATE, 9, 10) * 5
    change = dataclasses.replace
    return [
        (prompt, change(plain, grammar=Counted())),
        (prompt, change(plain, grammar=Counted(), temperature=1.0, top_k=2, top_p=0.9, seed=3)),
        # Free, with guesses of lookup, to the token that opens the grammar.
        (prompt, change(plain, grammar=Counted(GATE), logit_bias={GATE: 3.0}, temperature=1.0, seed=4)),
        (prompt, change(plain, grammar=Counted(GATE), logit_bias={GATE: 100.0})),
        (prompt, change(plain, ignore_eos=True, max_tokens=25, logit_bias={GATE: 100.0})),
        (prompt, change(plain, grammar=Counted(), max_tokens=3)),
    ]


def served(core, asked, preempting=False):
    numbers = [core.add(ids, sampling) for ids, sampling in asked]
    tokens, last = {number: [] for number in numbers}, {}
    step = 0
    while core.has_work:
        step += 1
        if preempting:
            core.preempt(numbers[step % len(numbers)])
        for number, output in core.step():
            tokens[number] += output.token_ids
            last[number] = output
    return [(tokens[number], last[number].finish_reason) for number in numbers]


@pytest.fixture(scope="module")
def lm():
    lm = LanguageModel.random(
        compressed_kinds(initializer_range=0.3, num_nextn_predict_layers=1), Policy.of("float32")
    )
    assert STOP in lm.stop_token_ids
    return lm


@pytest.fixture(scope="module")
def lm_with_dspark():
    """One whose DSpark head guesses blocks of the token that opens a grammar."""
    config = compressed_kinds(initializer_range=0.3)
    size = config.vocab_size
    config = dataclasses.replace(config, num_nextn_predict_layers=0, dspark=DSpark(4, size - 1, (1, 0), size))
    parameters = LanguageModel.random(config, Policy.of("float32")).parameters
    w1, w2 = np.eye(size, dtype=np.float32), np.zeros((size, size), np.float32)
    w2[GATE] = 100.0
    head = parameters["dspark"] | {"markov_w1": w1, "markov_w2": w2}
    return LanguageModel(config, Policy.of("float32"), parameters | {"dspark": head})


@pytest.mark.parametrize("draft", [None, "lookup", pytest.param("mtp", marks=pytest.mark.slow), "dspark"])
def test_answers_keep_their_grammars_whatever_happens(request, draft):
    lm = request.getfixturevalue("lm_with_dspark" if draft == "dspark" else "lm")
    alone = [served(EngineCore(lm, SIZES), [each])[0] for each in requests()]
    # The widest step alone: whether guesses pay on this machine is not the question.
    widths = draft and widths_for(draft, lm.config)[-1:]
    core = EngineCore(lm, dataclasses.replace(SIZES, draft=draft, draft_widths=widths))
    core.warm_up()
    with nothing_compiled():
        assert served(core, requests()) == alone
        assert served(core, requests(), preempting=True) == alone
    if draft in ("lookup", "dspark"):
        kept, tried = core.acceptance.by_place()[0]
        assert 0 < kept <= tried, "rows without a grammar, and those before it, are guessed"
    for (tokens, reason), (_, sampling) in zip(alone, requests(), strict=True):
        grammar = sampling.grammar
        if grammar is None or sampling.max_tokens == 3:
            assert reason == "length"
            continue
        assert reason == "stop" and tokens[-1] == STOP
        begin = 0 if grammar.opens_after is None else tokens.index(GATE) + 1
        under = tokens[begin:-1]
        assert len(under) == grammar.count
        assert all(token in grammar.sets(place) for place, token in enumerate(under))


def test_a_place_without_a_token_is_an_error_and_harms_nobody(lm):
    core = EngineCore(lm, SIZES)
    plain = Sampling(max_tokens=9, temperature=0)
    stuck = core.add((5, 6), dataclasses.replace(plain, grammar=Counted(count=2, stuck=True)))
    fine = core.add((5, 6), dataclasses.replace(plain, grammar=Counted(count=4)))
    gone = core.add((5, 6), dataclasses.replace(plain, grammar=Counted(count=8)))
    last = {}
    for step in range(60):
        if step == 4:
            core.abort(gone)
        for number, output in core.step():
            last[number] = output
    assert last[stuck].finish_reason == "error" and last[stuck].is_stuck and last[stuck].error == NO_WAY
    assert last[fine].finish_reason == "stop" and last[gone].finish_reason == "aborted"
    assert not core.has_work and core.scheduler.num_running == 0
