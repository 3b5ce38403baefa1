"""The engine against `generate`: the same tokens in any company, slot and order, and nothing compiled."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.models import compressed_kinds

V = 300
SIZES = EngineSettings(
    max_length=64, num_slots=3, num_lanes=2, chunk=4, num_pages=64, num_states=40, state_interval=8
)
ENDLESS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.random(compressed_kinds(initializer_range=0.3), Policy.of("float32"))


@pytest.fixture(scope="module")
def warm(lm):
    core = EngineCore(lm, SIZES)
    core.warm_up()
    return core


@pytest.fixture
def core(lm, warm):
    """A fresh engine; its programs are those of `warm`."""
    return EngineCore(lm, SIZES)


def prompt(length, seed=0):
    return tuple(np.random.default_rng((seed, length)).integers(0, V, length).tolist())


def run(core, *requests):
    """Serves (prompt, Sampling) pairs together: tokens of each, and all outputs of each."""
    numbers = [core.add(ids, sampling) for ids, sampling in requests]
    outputs = {number: [] for number in numbers}
    while core.has_work:
        for number, output in core.step():
            outputs[number].append(output)
    every = [outputs[number] for number in numbers]
    return [[token for output in one for token in output.token_ids] for one in every], every


def alone(lm, ids, sampling, stops=()):
    """The same request through `generate`."""
    got = lm.generate(
        [list(ids)],
        sampling.max_tokens,
        temperature=sampling.temperature,
        seed=[sampling.seed],
        stop_token_ids=stops,
        top_p=sampling.top_p,
    )
    return np.asarray(got)[0].tolist()


@contextlib.contextmanager
def nothing_compiled():
    events = []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not events


MIXED = [
    (prompt(length), Sampling(max_tokens=9, temperature=heat, top_p=mass, seed=length, **ENDLESS))
    for length, heat, mass in [
        (1, 0, 1),
        (3, 1, 1),
        (4, 0.7, 0.5),
        (5, 0, 1),
        (17, 1, 0.9),
        (33, 0, 1),
        (40, 2, 1),
    ]
]


def test_tokens_are_those_of_generate_in_any_order_and_after_prefix_hits(lm, core):
    wanted = [alone(lm, *request) for request in MIXED]
    with nothing_compiled():
        first, _ = run(core, *MIXED)
        second, outputs = run(core, *MIXED[::-1])
    assert first == wanted
    assert second[::-1] == wanted
    cached = [max(output.cached_tokens for output in one) for one in outputs[::-1]]
    assert cached == [(len(ids) - 1) // 4 * 4 for ids, _ in MIXED]
    core.prefixes.check()


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9, 31, 32, 33])
def test_logits_after_a_hit_are_those_of_a_cold_run_bit_for_bit(core, length):
    """Also when only a part of the prompt is known, and with an unlike sequence in the lane before."""

    def logits_after(ids):
        number = core.add(ids, Sampling(max_tokens=8, **ENDLESS))
        while core._sequences[number].stage != "running":
            core.step()
        bits = np.asarray(core._slots.logits)[core._sequences[number].slot].view(np.int32)
        core.abort(number)
        while core.has_work:
            core.step()
        return bits

    ids = prompt(length)
    cold = logits_after(ids)
    logits_after(prompt(40, seed=1))
    hits = core.prefixes.hits
    np.testing.assert_array_equal(logits_after(ids), cold)
    assert core.prefixes.hits - hits == (length - 1) // 4 * 4
    parting = (*ids[:-1], (ids[-1] + 1) % V)
    warm = logits_after(parting)
    core.prefixes.clear()
    np.testing.assert_array_equal(logits_after(parting), warm)


def test_a_preempted_request_goes_on_bit_for_bit(lm, core):
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=3, presence_penalty=1.5, **ENDLESS)
    (wanted,), _ = run(core, (prompt(9), sampling))
    with nothing_compiled():
        number = core.add(prompt(9), sampling)
        got, taken = [], 0
        while core.has_work:
            interrupted = core.preempt(number)
            taken += interrupted
            if interrupted and taken % 2:  # another one gets the slot in between
                core.add(prompt(5, seed=taken), Sampling(max_tokens=2, **ENDLESS))
            got += [token for each, output in core.step() if each == number for token in output.token_ids]
    assert got == wanted
    assert core.scheduler.num_preemptions == taken >= 5


def test_important_requests_interrupt_others(lm, core):
    sampling = Sampling(max_tokens=10, temperature=0, **ENDLESS)
    common = [core.add(prompt(5, seed=seed), sampling, priority=1) for seed in range(4)]
    before = [each for _ in range(3) for each in core.step()]
    urgent = core.add(prompt(6), sampling, priority=0)
    ended, tokens = [], {number: [] for number in (*common, urgent)}
    while core.has_work:
        outputs, before = [*before, *core.step()], []
        for number, output in outputs:
            tokens[number] += output.token_ids
            if output.finish_reason:
                ended.append(number)
    assert ended.index(urgent) <= 2 and core.scheduler.num_preemptions == 1
    assert tokens[urgent] == alone(lm, prompt(6), sampling)
    for seed, number in enumerate(common):
        assert tokens[number] == alone(lm, prompt(5, seed=seed), sampling)


def test_prefixes_are_shared_within_a_salt_only(core):
    sampling = Sampling(max_tokens=1, **ENDLESS)

    def cached(salt):
        number = core.add(prompt(20), sampling, salt=salt)
        outputs = []
        while core.has_work:
            outputs += [output for each, output in core.step() if each == number]
        return max(output.cached_tokens for output in outputs)

    assert [cached(b"a"), cached(b"b"), cached(b"a"), cached(b"")] == [0, 0, 16, 0]


def test_a_shared_beginning_is_found_from_the_third_request_on(core):
    shared = prompt(30)
    ends = [prompt(7, seed=seed) for seed in range(5)]
    cached = []
    for end in ends:
        _, ((output,),) = run(core, ((*shared, *end), Sampling(max_tokens=1, **ENDLESS)))
        cached.append(output.cached_tokens)
    # The first leaves states every 8 tokens; the second one where it parts from the first.
    assert cached == [0, 24, 28, 28, 28]


def test_an_engine_without_a_prefix_cache(lm, core):
    bare = EngineCore(lm, dataclasses.replace(SIZES, num_pages=0))
    for _ in range(2):
        got, ((first, *_),) = run(bare, MIXED[4])
        assert got == [alone(lm, *MIXED[4])] and first.cached_tokens == 0


# ---- sampling parameters --------------------------------------------------------------------------


def test_each_request_by_its_own_parameters(lm, core):
    ids = prompt(6)
    greedy = Sampling(max_tokens=6, temperature=0, **ENDLESS)
    plain = alone(lm, ids, greedy)
    change = dataclasses.replace
    requests = [
        change(greedy, temperature=1.0, top_k=1),
        change(greedy, temperature=1.0, min_p=1.0),
        change(greedy, logit_bias={plain[0]: -100.0}),
        change(greedy, logit_bias={7: 100.0}),
        change(greedy, logit_bias={7: 100.0}, frequency_penalty=2.0, presence_penalty=2.0),
        change(greedy, ignore_eos=False, stop_token_ids=(plain[2],)),
        change(greedy, ignore_eos=False, stop_token_ids=(plain[0],), min_tokens=3),
        greedy,
    ]
    with nothing_compiled():
        got, outputs = run(core, *((ids, sampling) for sampling in requests))
    assert got[0] == got[1] == got[7] == plain
    assert got[2][0] != plain[0]
    assert got[3] == [7] * 6
    assert got[4][0] == 7
    end = plain.index(plain[2]) + 1
    assert got[5] == plain[:end] and outputs[5][-1].finish_reason == "stop"
    assert plain[0] not in got[6][:3]
    assert outputs[7][-1].finish_reason == "length"


def test_logprobs_are_those_of_the_whole_forward(lm, core):
    ids = prompt(7)
    sampling = Sampling(max_tokens=5, temperature=1.0, seed=1, logprobs=3, presence_penalty=1.0, **ENDLESS)
    (tokens,), (outputs,) = run(core, (ids, sampling))
    scores = jax.nn.log_softmax(lm.logits(jnp.array([[*ids, *tokens]]))[0], axis=-1)
    for step, output in enumerate(outputs):
        (found,) = output.logprobs
        row = np.asarray(scores[len(ids) + step - 1])
        assert found.token_id == tokens[step]
        np.testing.assert_allclose(found.logprob, row[tokens[step]], rtol=1e-4, atol=1e-5)
        assert [token for token, _ in found.likeliest] == np.argsort(-row, kind="stable")[:3].tolist()
        np.testing.assert_allclose([value for _, value in found.likeliest], np.sort(row)[::-1][:3], rtol=1e-4)


def test_logits_that_are_no_numbers_end_one_request_alone(lm, core):
    bad = 17
    parameters = jax.tree.map(lambda leaf: leaf, lm.parameters)
    parameters["embed"] = lm.parameters["embed"].at[bad].set(jnp.nan)
    broken = EngineCore(LanguageModel(lm.config, lm.policy, parameters), SIZES)
    good = tuple(token for token in prompt(9) if token != bad)
    sampling = Sampling(max_tokens=4, temperature=0, logit_bias={bad: -100.0}, **ENDLESS)
    tokens, outputs = run(broken, ((1, bad, 2), sampling), (good, sampling), (good, sampling))
    assert outputs[0][-1].finish_reason == "error" and "position 3" in outputs[0][-1].error
    assert tokens[1] == tokens[2] == run(core, (good, sampling))[0][0]


@pytest.mark.parametrize(
    "ids, sampling, words",
    [
        ((), {}, ["at least one token"]),
        ((1, V), {"max_tokens": 0}, [f"[{V}]", "max_tokens=0"]),
        (prompt(60), {"max_tokens": 5}, ["60 prompt tokens", "65", "64"]),
        ((1,), {"temperature": -1, "top_k": -2, "seed": -1}, ["temperature=-1", "top_k=-2", "seed=-1"]),
        ((1,), {"min_p": 2.0, "repetition_penalty": 0}, ["min_p=2.0", "repetition_penalty=0"]),
        ((1,), {"logit_bias": {V: 1.0, 2: 101.0}}, [str(V), "logit_bias[2]=101.0"]),
        ((1,), {"logprobs": 21}, ["logprobs=21"]),
        ((1,), {"stop": ("",)}, ["0 characters"]),
        ((1,), {"stop": ("x",)}, ["tokenizer.json"]),
        ((1,), {"stop_token_ids": (V,)}, [f"={V}"]),
        ((1,), {"frequency_penalty": float("nan")}, ["frequency_penalty=nan"]),
    ],
)
def test_refusals_name_every_problem(core, ids, sampling, words):
    with pytest.raises(ProblemsError) as refused:
        core.add(ids, Sampling(**sampling))
    for word in words:
        assert word in str(refused.value)
    assert not core.has_work


def test_sizes_that_cannot_work(lm):
    with pytest.raises(ProblemsError, match="(?s)num_slots=0.*chunk=6 must be a multiple of 4"):
        EngineCore(lm, EngineSettings(num_slots=0, chunk=6))
