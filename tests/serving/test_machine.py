"""Anything that can happen to an engine, in any order, against an oracle that computes every request anew.

One machine an engine: without drafts and with each drafter. The oracle knows no drafts, so every machine asks
for the same tokens, at any temperature; and nothing may be compiled after the warm-up or stay behind.
"""

import dataclasses
import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsv4_jax.config import DSpark
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.inference.test_speculative import with_memory
from tests.model.telling_weights import telling_parameters
from tests.models import compressed_kinds
from tests.serving.test_core import nothing_compiled

SIZES = EngineSettings(
    max_length=64, num_slots=3, num_lanes=2, chunk=4, num_pages=12, num_states=4, state_interval=8
)
MOST = 10  # tokens of an answer
V = 40
MTP = compressed_kinds(vocab_size=V, hc_sinkhorn_iters=3, num_nextn_predict_layers=1)
DSPARK = dataclasses.replace(MTP, num_nextn_predict_layers=0, dspark=DSpark(4, V - 1, (1, 0), V))
FLOAT32 = Policy.of("float32")
DRAFTS = [None, "lookup", "mtp", "dspark"]

RULES = [
    {},
    {"logit_bias": {7: 100.0}},  # repeats itself: lookup is right
    {"logit_bias": {7: 60.0, 8: 60.0}, "frequency_penalty": 2.0, "presence_penalty": 0.5},
    {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.5},
    {"stop_token_ids": (7, 11, 13, 17, 19, 23), "ignore_eos": False, "min_tokens": 2},
]


@functools.cache
def backbone():
    return LanguageModel(MTP, FLOAT32, telling_parameters(MTP, 3))


@functools.cache
def model(draft):
    """The same backbone, with the head that a drafter needs."""
    mtp = backbone()
    if draft != "dspark":
        return mtp
    # A Markov table that remembers greedy answers: a random head would hardly ever be right.
    lines = [oracle(prompt(family, 30, 5), greedy()) for family in range(3)]
    successors = {a: b for line in lines for a, b in zip(line, line[1:], strict=False)}
    head = telling_parameters(DSPARK, 4)["dspark"]
    tree = {name: each for name, each in mtp.parameters.items() if name != "mtp"}
    return LanguageModel(DSPARK, FLOAT32, with_memory(tree | {"dspark": head}, successors))


def greedy(**changes):
    return Sampling(**{"max_tokens": MOST, "temperature": 0.0, "ignore_eos": True} | changes)


def prompt(family, shared, length):
    """Prompts of a family share their beginning."""
    common = np.random.default_rng(family).integers(0, V, 30)[:shared]
    own = np.random.default_rng((family, shared, length)).integers(0, V, length)
    return (*common.tolist(), *own.tolist())


@functools.cache
def plain_engine():
    return EngineCore(backbone(), dataclasses.replace(SIZES, num_slots=1, num_lanes=1, num_pages=0))


@functools.cache
def _answer(ids, rules, heat, seed):
    """Of `generate`, or where it lacks the parameters, of an engine that serves nothing else."""
    if not RULES[rules]:
        got = backbone().generate([list(ids)], MOST, temperature=heat, seed=[seed], stop_token_ids=())
        return np.asarray(got)[0].tolist()
    core = plain_engine()
    core.add(ids, greedy(temperature=heat, seed=seed, **RULES[rules]))
    tokens = []
    while core.has_work:
        tokens += [token for _, output in core.step() for token in output.token_ids]
    return tokens


def oracle(ids, sampling, rules=0):
    """All tokens of the longest answer."""
    return _answer(ids, rules, sampling.temperature, sampling.seed)


@functools.cache
def warm(draft):
    """An engine whose programs are compiled; those of the same model and sizes are then as well."""
    core = EngineCore(model(draft), dataclasses.replace(SIZES, draft=draft))
    core.warm_up()
    return core


class Machine(RuleBasedStateMachine):
    """Requests come, wait, run, are interrupted, aborted and finished."""

    draft = None

    def __init__(self):
        super().__init__()
        warm(self.draft)
        self.core = EngineCore(model(self.draft), dataclasses.replace(SIZES, draft=self.draft))
        self.requests = {}  # number -> (prompt, sampling, rules, tokens so far)

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 30),
        length=st.integers(1, 9),
        count=st.integers(1, MOST),
        heat=st.sampled_from([0.0, 1.0]),
        rules=st.integers(0, len(RULES) - 1),
        priority=st.integers(0, 1),
        salt=st.sampled_from([b"", b"x"]),
    )
    def add(self, family, shared, length, count, heat, rules, priority, salt):
        ids = prompt(family, shared, length)
        sampling = greedy(max_tokens=count, temperature=heat, seed=family, **RULES[rules])
        with nothing_compiled():
            number = self.core.add(ids, sampling, salt=salt, priority=priority)
        self.requests[number] = (ids, sampling, rules, [])

    @rule(count=st.integers(1, 6), width=st.integers(0, 2))
    def step(self, count, width):
        widths = self.core.widths.widths
        self.core.widths.forced = widths[width % len(widths)]  # measured times might choose any
        for _ in range(count):
            self.take(self.stepped())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        number = data.draw(st.sampled_from(sorted(self.requests)))
        with nothing_compiled():
            self.core.abort(number)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def preempt(self, data):
        number = data.draw(st.sampled_from(sorted(self.requests)))
        with nothing_compiled():
            self.core.preempt(number)

    @rule()
    def forget(self):
        self.core.prefixes.clear()

    def stepped(self):
        with nothing_compiled():
            return self.core.step()

    def take(self, outputs):
        for number, output in outputs:
            ids, sampling, rules, tokens = self.requests[number]
            tokens += output.token_ids
            whole = oracle(ids, sampling, rules)
            assert tokens == whole[: len(tokens)]
            assert output.cached_tokens < len(ids) and output.error is None
            if output.finish_reason == "length":
                assert len(tokens) == sampling.max_tokens
            if output.finish_reason == "stop":
                assert tokens == whole and tokens[-1] in sampling.stop_token_ids
            if output.finish_reason is not None:
                del self.requests[number]

    @invariant()
    def nothing_leaks(self):
        core, scheduler = self.core, self.core.scheduler
        core.prefixes.check()
        assert len(core.prefixes) + core.prefixes.num_free == SIZES.num_pages
        held = [each for each in (*scheduler.slots, *scheduler.lanes) if each is not None]
        assert all(each.stage in ("prefilling", "running") for each in held)
        assert {each.id for each in held} <= set(core._sequences)
        assert len({each.id for each in scheduler.slots if each}) == scheduler.num_running
        # A row is kept for those alone that were interrupted and wait.
        assert all(each.stage == "waiting" for each in core._sequences.values() if each.kept is not None)
        assert set(core._sequences) <= set(self.requests)
        for kept, tried in core.acceptance.by_place():
            assert kept <= tried

    def teardown(self):
        for _ in range(500):
            if not self.core.has_work:
                break
            self.take(self.stepped())
        assert not self.core.has_work and not self.requests and not self.core._sequences
        scheduler = self.core.scheduler
        assert scheduler.num_running == scheduler.num_waiting == 0 and not any(scheduler.lanes)
        assert not np.asarray(self.core._slots.running).any()


class WithLookup(Machine):
    draft = "lookup"


class WithMtp(Machine):
    draft = "mtp"


class WithDSpark(Machine):
    draft = "dspark"


HOW = settings(max_examples=15, stateful_step_count=25, deadline=None)
FEWER = settings(max_examples=5, stateful_step_count=25, deadline=None)
TestMachine = Machine.TestCase
TestMachine.settings = HOW
TestWithLookup, TestWithMtp, TestWithDSpark = (each.TestCase for each in (WithLookup, WithMtp, WithDSpark))
TestWithLookup.settings = TestWithMtp.settings = TestWithDSpark.settings = FEWER


@pytest.mark.parametrize("draft", DRAFTS[1:])
def test_the_machines_keep_and_reject_drafts(draft):
    """What the machines prove would be little if no draft were ever right, or none wrong."""
    core = EngineCore(model(draft), dataclasses.replace(SIZES, draft=draft))
    wanted = {}
    for family in range(3):
        for rules in range(len(RULES)):
            for heat in (0.0, 1.0):
                ids, sampling = (
                    prompt(family, 30, 5),
                    greedy(temperature=heat, seed=family, **RULES[rules]),
                )
                wanted[core.add(ids, sampling)] = oracle(ids, sampling, rules)
    got = {number: [] for number in wanted}
    while core.has_work:
        for number, output in core.step():
            got[number] += output.token_ids
    assert got == wanted
    kept, tried = core.acceptance.by_place()[0]
    assert 0 < kept < tried
