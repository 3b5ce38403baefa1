"""Drafts that are wrong are given up, drafts that are right are tried to the end, and no answer changes."""

import dataclasses

import numpy as np
import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference.drafters import widths_for
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.widths import FIRST_PAUSE, LONGEST_PAUSE, LOOK_STEPS, DraftWidths
from tests.inference.test_speculative import with_memory
from tests.models import compressed_kinds
from tests.serving.test_core import nothing_compiled
from tests.serving.test_machine import DSPARK, MTP, SIZES, V, model, oracle, prompt

SECONDS = {0: 1.0, 2: 1.2, 3: 1.3, 4: 1.4, 7: 1.7}


def chooser(widths=(0, 3, 7)):
    made = DraftWidths(widths)
    made.seconds = {width: SECONDS[width] for width in widths}
    return made


def used(widths, steps, right):
    """The widths of so many steps of two rows, if `right` says how many drafts of a step are right."""
    found = []
    for step in range(steps):
        width = widths.next()
        widths.add(width, [min(right(step), width)] * 2)
        found.append(width)
    return found


def test_without_measured_times_the_widest_is_used():
    assert used(DraftWidths((0, 3, 7)), 40, lambda step: 0) == [7] * 40


def test_drafts_that_are_always_right_are_tried_to_the_end():
    assert used(chooser(), 500, lambda step: 7) == [7] * 500


def test_drafts_that_are_always_wrong_are_given_up_but_for_ever_rarer_looks():
    widths = chooser()
    found = used(widths, 20_000, lambda step: 0)
    assert 0 in found[:40] and set(found[40:]) == {0, 7}
    # The last looks are LONGEST_PAUSE steps apart, and none leads to more than its own steps.
    assert found[-LONGEST_PAUSE:].count(7) <= LOOK_STEPS
    time = sum(SECONDS[width] for width in found)
    assert time < 1.01 * len(found)


def test_what_pays_depends_on_places():
    """Two of seven drafts right: the middle width pays, the widest does not."""
    found = used(chooser(), 2000, lambda step: 2)
    assert found[-50:].count(3) >= 50 - LOOK_STEPS and set(found[100:]) == {3, 7}
    # (1 + 2) / 1.3 > (1 + 2) / 1.7, and > 1 / 1.0


def test_times_decide_as_well():
    slow = DraftWidths((0, 7))
    slow.seconds = {0: 1.0, 7: 9.0}  # eight tokens for nine times the time
    assert set(used(slow, 50, lambda step: 7)) == {0}


def test_drafts_that_become_right_are_found_again():
    widths = chooser()
    used(widths, 300, lambda step: 0)
    assert widths.best() == 0
    found = used(widths, 4 * FIRST_PAUSE, lambda step: 7)
    assert found[-10:] == [7] * 10
    assert widths.steps.total() == 300 + 4 * FIRST_PAUSE


def test_widths_of_drafters():
    assert widths_for(None, MTP) == (0,) and widths_for("mtp", MTP) == (0, 1)
    assert widths_for("lookup", MTP) == (0, 3, 7) and widths_for("dspark", DSPARK) == (0, 2, 4)


@pytest.mark.parametrize(
    "draft, widths", [("lookup", (3, 0)), ("lookup", (0, 8)), ("mtp", (0, 2)), (None, (1,)), ("mtp", ()),
                      ("lookup", (-1, 3)), ("lookup", (3, 3))]
)  # fmt: skip
def test_widths_that_cannot_be(draft, widths):
    with pytest.raises(ProblemsError, match="draft_widths"):
        EngineCore(model(None), dataclasses.replace(SIZES, draft=draft, draft_widths=widths))


# ---- in the engine ---------------------------------------------------------------------------------


def served(core, prompts, sampling):
    """Tokens of each."""
    numbers = [core.add(ids, sampling) for ids in prompts]
    got = {number: [] for number in numbers}
    while core.has_work:
        for number, output in core.step():
            got[number] += output.token_ids
    return list(got.values())


def warm_core(draft, **changes):
    core = EngineCore(model(draft), dataclasses.replace(SIZES, draft=draft, **changes))
    core.warm_up()
    return core


@pytest.mark.parametrize("draft, right", [("dspark", True), ("dspark", False), ("mtp", False)])
def test_an_engine_settles_at_what_pays(draft, right, monkeypatch):
    """The answers are those without drafts; every width is compiled and measured by the warm-up."""
    core = warm_core(draft)
    widths = core.widths.widths
    assert set(core.widths.seconds) == set(widths) and not core.widths.steps
    assert all(0 < seconds < 60 for seconds in core.widths.seconds.values())
    assert core.widths.survival == [1.0] * widths[-1] and core.acceptance.guesses == 0
    core.widths.seconds = {width: SECONDS.get(width, 1.1) for width in widths}
    sampling = Sampling(max_tokens=10, temperature=0.0, ignore_eos=True)
    prompts = [prompt(family % 3, 30, 5) for family in range(24)]
    if right:  # the answer repeats one token, and the head knows it
        sampling = dataclasses.replace(sampling, max_tokens=60, logit_bias={7: 100.0})
        prompts = [(5, 6)] * 12
    if draft == "dspark":
        memory = dict.fromkeys(range(V), 7) if right else {}
        monkeypatch.setattr(core.lm, "parameters", with_memory(core.lm.parameters, memory))
    with nothing_compiled():
        got = served(core, prompts, sampling)
    if right:
        assert got == [[7] * 60] * 12
        assert core.widths.best() == widths[-1] == 4 and set(core.widths.steps) == {4}
    else:
        assert got == [oracle(ids, sampling) for ids in prompts]
        assert core.widths.best() == 0
        assert core.widths.steps[0] > core.widths.steps[widths[-1]] > 0


def test_one_width_is_kept():
    core = warm_core("lookup", draft_widths=(3,))
    served(core, [prompt(0, 30, 5)] * 3, Sampling(max_tokens=10, temperature=0.0, ignore_eos=True))
    assert set(core.widths.steps) == {3} and not core.widths.seconds


def test_with_one_width_bfloat16_answers_do_not_depend_on_company():
    """Logprobs bit for bit: alone, and beside rows that are much longer, from a later slot."""
    config = compressed_kinds(vocab_size=V, initializer_range=0.3)
    lm = LanguageModel.random(config, Policy.of("bfloat16"))
    sizes = dataclasses.replace(
        SIZES, max_length=640, chunk=64, num_pages=0, draft="lookup", draft_widths=(3,)
    )
    core = EngineCore(lm, sizes)
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=1, ignore_eos=True, logprobs=2)
    repeating = dataclasses.replace(sampling, logit_bias={7: 100.0})
    rng = np.random.default_rng(0)
    long = tuple(rng.integers(0, V, 610).tolist())

    def answers(*requests):
        numbers = [core.add(ids, how) for ids, how in requests]
        got = {number: [] for number in numbers}
        while core.has_work:
            for number, output in core.step():
                got[number] += output.logprobs
        return [got[number] for number in numbers]

    for how in (sampling, repeating):
        (alone,) = answers((prompt(0, 20, 5), how))
        *_, together = answers((long, sampling), (long[::-1], how), (prompt(0, 20, 5), how))
        assert len(alone) == 20 and together == alone
