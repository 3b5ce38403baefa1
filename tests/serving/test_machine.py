"""Anything that can happen to an engine, in any order, against an oracle that computes every request anew."""

import functools

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.models import compressed_kinds

SIZES = EngineSettings(
    max_length=64, num_slots=3, num_lanes=2, chunk=4, num_pages=12, num_states=4, state_interval=8
)
MOST = 10  # tokens of an answer


@functools.cache
def model():
    return LanguageModel.random(compressed_kinds(initializer_range=0.3), Policy.of("float32"))


def prompt(family, shared, length):
    """Prompts of a family share their beginning."""
    common = np.random.default_rng(family).integers(0, 300, 30)[:shared]
    own = np.random.default_rng((family, shared, length)).integers(0, 300, length)
    return (*common.tolist(), *own.tolist())


@functools.cache
def oracle(ids, seed, heat):
    got = model().generate([list(ids)], MOST, temperature=heat, seed=[seed], stop_token_ids=())
    return np.asarray(got)[0].tolist()


class Machine(RuleBasedStateMachine):
    """Requests come, wait, run, are interrupted, aborted and finished."""

    def __init__(self):
        super().__init__()
        self.core = EngineCore(model(), SIZES)
        self.requests = {}  # number -> (prompt, sampling, tokens so far)
        self.salts = {}

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 30),
        length=st.integers(1, 9),
        count=st.integers(1, MOST),
        heat=st.sampled_from([0.0, 1.0]),
        priority=st.integers(0, 1),
        salt=st.sampled_from([b"", b"x"]),
    )
    def add(self, family, shared, length, count, heat, priority, salt):
        ids = prompt(family, shared, length)
        sampling = Sampling(max_tokens=count, temperature=heat, seed=family, ignore_eos=True)
        number = self.core.add(ids, sampling, salt=salt, priority=priority)
        self.requests[number] = (ids, sampling, [])

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.take(self.core.step())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        number = data.draw(st.sampled_from(sorted(self.requests)))
        self.core.abort(number)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def preempt(self, data):
        self.core.preempt(data.draw(st.sampled_from(sorted(self.requests))))

    @rule()
    def forget(self):
        self.core.prefixes.clear()

    def take(self, outputs):
        for number, output in outputs:
            ids, sampling, tokens = self.requests[number]
            tokens += output.token_ids
            assert tokens == oracle(ids, sampling.seed, sampling.temperature)[: len(tokens)]
            assert output.cached_tokens < len(ids)
            if output.finish_reason == "length":
                assert len(tokens) == sampling.max_tokens
            if output.finish_reason is not None:
                del self.requests[number]

    @invariant()
    def nothing_leaks(self):
        self.core.prefixes.check()
        scheduler = self.core.scheduler
        held = [each for each in (*scheduler.slots, *scheduler.lanes) if each is not None]
        assert all(each.stage in ("prefilling", "running") for each in held)
        assert {each.id for each in held} <= set(self.core._sequences)
        assert len({each.id for each in scheduler.slots if each}) == scheduler.num_running

    def teardown(self):
        for _ in range(500):
            if not self.core.has_work:
                break
            self.take(self.core.step())
        assert not self.core.has_work and not self.requests
        assert self.core.scheduler.num_running == self.core.scheduler.num_waiting == 0
        assert not np.asarray(self.core._slots.running).any()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
