"""The engine with drafts: the same answers, fewer steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import ModelConfig
from dsv4_jax.inference import drafters
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.acceptance import DraftAcceptance
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.decode import looked_up
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.models import compressed_kinds
from tests.serving.test_core import nothing_compiled

SIZES = EngineSettings(
    max_length=64, num_slots=3, num_lanes=2, chunk=4, num_pages=64, num_states=40, state_interval=8
)


def config(**changes) -> ModelConfig:
    return compressed_kinds(initializer_range=0.3, num_nextn_predict_layers=1, **changes)


def served(core, requests):
    """Tokens, logprobs and finish reasons of each request."""
    numbers = [core.add(ids, sampling) for ids, sampling in requests]
    tokens, scores, reasons = ({number: [] for number in numbers} for _ in range(3))
    interrupted = False
    while core.has_work:
        interrupted = interrupted or core.preempt(numbers[0])
        for number, output in core.step():
            tokens[number] += output.token_ids
            scores[number] += [one.logprob for one in output.logprobs]
            reasons[number].append(output.finish_reason)
    core.prefixes.check()
    return [(tokens[number], reasons[number][-1]) for number in numbers], [scores[n] for n in numbers]


def requests(vocab_size=300):
    rng = np.random.default_rng(0)
    plain = Sampling(max_tokens=11, temperature=0, ignore_eos=True, logprobs=1)
    change = dataclasses.replace
    repeating = (7, 8, 9, 10) * 5
    return [
        (repeating, plain),
        (repeating, change(plain, logit_bias={7: 50.0, 8: 50.0}, frequency_penalty=2.0)),
        (repeating, change(plain, logit_bias={8: 100.0})),  # draws 8 again and again: drafts are right
        (repeating, change(plain, logit_bias={8: 100.0}, max_tokens=1)),
        (
            repeating,
            change(plain, logit_bias={8: 100.0}, ignore_eos=False, stop_token_ids=(8,), min_tokens=4),
        ),
        (tuple(rng.integers(0, vocab_size, 30).tolist()), change(plain, temperature=1.0, seed=5)),
        ((3,), change(plain, temperature=0.8, seed=6, top_k=5)),
        (tuple(rng.integers(0, vocab_size, 9).tolist()), change(plain, max_tokens=40)),
    ]


@pytest.mark.parametrize("draft", ["lookup", "mtp"])
def test_answers_do_not_depend_on_drafts(draft):
    lm = LanguageModel.random(config(), Policy.of("float32"))
    without, scores = served(EngineCore(lm, SIZES), requests())
    core = EngineCore(lm, dataclasses.replace(SIZES, draft=draft))
    core.warm_up()
    with nothing_compiled():
        for _ in range(2):
            got, others = served(core, requests())
            assert got == without
            for one, other in zip(scores, others, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    if draft == "lookup":
        kept, tried = core.acceptance.by_place()[0]
        assert 0 < kept < tried


def test_guesses_behind_the_end_of_an_answer_do_not_count():
    """The stop token is the third guess and right: what lookup guesses behind it was never tried."""
    lm = LanguageModel.random(config(), Policy.of("float32"))
    prompt = (5, 8, 8, 8, 9, 6, 5)
    for bias in np.arange(60.0, 100.0, 0.5):  # the penalty makes 9 the likeliest after three times 8
        rules = {"logit_bias": {8: 100.0, 9: float(bias)}, "frequency_penalty": 2.0, "temperature": 0}
        sampling = Sampling(max_tokens=12, stop_token_ids=(9,), **rules)
        core = EngineCore(lm, dataclasses.replace(SIZES, draft="lookup"))
        (answer,), _ = served(core, [(prompt, sampling)])
        if answer[0] == [8, 8, 8, 9]:
            break
    assert answer == ([8, 8, 8, 9], "stop")
    assert core.acceptance.by_place() == ((1, 1), (1, 1), (1, 1))


def test_lookup_on_the_device_is_lookup_on_the_host():
    rng = np.random.default_rng(1)
    size, most = 24, 7
    lines = [rng.integers(0, high, int(rng.integers(1, size - 1))).tolist() for high in (2, 3, 9) * 40]
    lines += [[1], [1, 1], [1, 2, 1, 2], [5] * 20]
    history = np.full((len(lines), size), 99, np.int32)
    for row, line in zip(history, lines, strict=True):
        row[: len(line) - 1] = line[:-1]
    length = np.array([len(line) - 1 for line in lines], np.int32)
    token = np.array([line[-1] for line in lines], np.int32)
    on_device = jax.jit(looked_up, static_argnums=3)
    guesses, counts = map(np.asarray, on_device(jnp.asarray(history), length, token, most))
    for line, guess, count in zip(lines, guesses, counts, strict=True):
        assert guess[:count].tolist() == drafters.looked_up(line, most)


def test_acceptance_by_place_and_a_warning(caplog):
    counts = DraftAcceptance("dspark")
    for tried, kept in ((3, 3), (3, 1), (2, 0), (0, 0)):
        counts.add(tried, kept)
    assert counts.by_place() == ((2, 3), (1, 2), (1, 1))
    for _ in range(100):
        counts.add(3, 0)
    assert caplog.text.count("first guesses were right") == 1
    caplog.clear()
    lookup = DraftAcceptance("lookup")
    for _ in range(100):
        lookup.add(3, 0)
    assert not caplog.text
