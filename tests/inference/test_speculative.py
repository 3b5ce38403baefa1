"""Drafts change how many steps a generation takes, and nothing else."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from dsv4_jax.checkpoint.load import nested
from dsv4_jax.checkpoint.save import flattened
from dsv4_jax.config import DSpark
from dsv4_jax.inference import drafters, steps
from dsv4_jax.inference.drafters import ENOUGH, looked_up, width_for
from dsv4_jax.inference.sampling import request_keys
from dsv4_jax.inference.speculative import Acceptance
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.placing import placement_of
from tests.model.telling_weights import telling_parameters
from tests.models import compressed_kinds

VOCAB, NEW, CAPACITY = 40, 24, 64
MTP = compressed_kinds(vocab_size=VOCAB, max_position_embeddings=CAPACITY, hc_sinkhorn_iters=3)
DSPARK = dataclasses.replace(MTP, num_nextn_predict_layers=0, dspark=DSpark(4, VOCAB - 1, (1, 0), VOCAB))
FLOAT32 = Policy.of("float32")
DRAFTS = ["lookup", "mtp", "dspark"]


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 1 to 40 tokens, some of which repeat themselves; what follows the longest fills its cache."""
    rng = np.random.default_rng(seed)
    lengths = [CAPACITY - NEW, 1, *rng.integers(1, CAPACITY - NEW, count - 2)]
    period = rng.integers(1, 30, count)
    return [np.resize(rng.integers(0, VOCAB, p), n).tolist() for p, n in zip(period, lengths, strict=True)]


PROMPTS = random_prompts(32)


def with_memory(parameters, successors: dict[int, int]):
    """A Markov table that remembers which token followed which: a random head is then often right."""
    w1, w2 = np.eye(VOCAB, dtype=np.float32), np.zeros((VOCAB, VOCAB), np.float32)
    for token, following in successors.items():
        w2[following, token] = 100.0
    return parameters | {"dspark": parameters["dspark"] | {"markov_w1": w1, "markov_w2": w2}}


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    """The same backbone with either head."""
    mtp = LanguageModel(MTP, FLOAT32, telling_parameters(MTP, 3))
    out = mtp.generate(PROMPTS, NEW, stop_token_ids=())
    lines = [[prompt[-1], *row] for prompt, row in zip(PROMPTS, out.tolist(), strict=True)]
    successors = {a: b for line in lines for a, b in zip(line, line[1:], strict=False)}
    head = telling_parameters(DSPARK, 4)["dspark"]
    backbone = {name: tree for name, tree in mtp.parameters.items() if name != "mtp"}
    parameters = with_memory(backbone | {"dspark": head}, successors)
    return {"mtp": mtp, "lookup": mtp, "dspark": LanguageModel(DSPARK, FLOAT32, parameters)}


HOW = [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_p": 0.8, "seed": list(range(32))}]


@pytest.fixture(scope="module")
def plain(models) -> list[np.ndarray]:
    """Without drafts, for each of HOW."""
    return [models["mtp"].generate(PROMPTS, NEW, stop_token_ids=(), **how) for how in HOW]


@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_are_those_without_drafts(models, plain, draft):
    lm, accepted, drafted, lengths = models[draft], 0, 0, set()
    for how, want in zip(HOW, plain, strict=True):
        np.testing.assert_array_equal(lm.generate(PROMPTS, NEW, stop_token_ids=(), draft=draft, **how), want)
        for row in lm.last_acceptance:
            # The first token comes with the prompt, and each step brings one more than were accepted.
            assert 1 + len(row) + sum(row) == NEW
            lengths |= set(row)
        by_position = lm.acceptance.by_position()
        accepted += by_position[0][0]
        drafted += by_position[0][1]
    assert 0 < accepted < drafted
    assert lengths >= ({0, 1} if draft == "mtp" else {0, 1, 2, 3})
    assert lm.generate(PROMPTS, NEW, stop_token_ids=()).tolist() == plain[0].tolist()
    assert lm.last_acceptance is None


@pytest.mark.parametrize("draft", DRAFTS)
def test_stop_tokens_and_budgets_inside_a_draft(models, plain, draft):
    lm = models[draft]
    lm.generate(PROMPTS, NEW, stop_token_ids=(), draft=draft)
    # A row that accepted a draft: its token at a place inside the accepted run stops it.
    row = max(range(32), key=lambda b: max(lm.last_acceptance[b]))
    step = int(np.argmax(lm.last_acceptance[row]))
    inside = 1 + step + sum(lm.last_acceptance[row][:step])
    assert lm.last_acceptance[row][step] > 0
    stops = [int(plain[0][row, inside])]
    want = lm.generate(PROMPTS, NEW, stop_token_ids=stops)
    np.testing.assert_array_equal(lm.generate(PROMPTS, NEW, stop_token_ids=stops, draft=draft), want)
    assert (want[row, inside:] == stops[0]).all() and (want != plain[0]).any()
    for new in (0, 1, 2, inside + 1):
        got = lm.generate(PROMPTS, new, stop_token_ids=(), draft=draft)
        np.testing.assert_array_equal(got, plain[0][:, :new])
        assert all(1 + len(steps) + sum(steps) == new for steps in lm.last_acceptance if new)


def test_a_row_alone_is_the_row_of_a_batch(models, plain):
    lm, draft = models["dspark"], "dspark"
    for row in (0, 1, 7):  # row 0 fills its cache to the last position
        got = lm.generate(PROMPTS[row : row + 1], NEW, stop_token_ids=(), draft=draft)
        np.testing.assert_array_equal(got[0], plain[0][row])
        alone = lm.generate(PROMPTS[row : row + 1], NEW, 0.7, [row], (), 0.8, draft)
        np.testing.assert_array_equal(alone[0], plain[2][row])


def programs() -> dict[str, int]:
    kept = (steps.verify, steps.draw, steps.draft_further, steps.draft_block, steps.prefill)
    return {step.__name__: step._cache_size() for step in kept}


def test_nothing_is_compiled_for_other_prompts_seeds_lengths_and_stops(models):
    for draft in DRAFTS:
        models[draft].generate(PROMPTS, NEW, stop_token_ids=(), draft=draft)
    before = programs()
    for seed in (1, 2):
        for draft in DRAFTS:
            how = {"temperature": seed / 2, "seed": seed, "stop_token_ids": [seed], "draft": draft}
            models[draft].generate(random_prompts(32, seed), NEW - seed, **how)
    assert programs() == before


def compared(cache, slots: np.ndarray):
    """Every array of a cache where rows of these lengths can be seen: rings by position, entries that are
    whole."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(cache)[0]:
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 3:
            continue
        for row, length in enumerate(slots):
            size = leaf.shape[2]
            length -= ".mtp.layer" in name  # its last row waits for the next token
            if ".entries" in name:
                ratio = (
                    DSPARK.csa_ratio if leaf.shape[2] >= CAPACITY // DSPARK.csa_ratio else DSPARK.hca_ratio
                )
                seen = np.arange(length // ratio)
            else:
                seen = np.arange(max(0, length - size + cache.max_rewind), length) % size
            found[name, row] = np.asarray(leaf)[:, row, seen]
    return found


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
def test_rejected_drafts_leave_no_trace(models, draft):
    """A cache that never saw a draft is the same, bit for bit, where it can be seen; so is what follows."""
    lm, prompts = models[draft], PROMPTS[:3]
    drawing = request_keys(0, 3), np.zeros(3, np.float32), np.ones(3, np.float32)

    def after(*rounds):
        cache = lm.new_cache(3, CAPACITY, mtp=draft == "mtp", dspark=draft == "dspark")
        ids = np.zeros((3, 16), np.int32)
        for line, prompt in zip(ids, prompts, strict=True):
            line[: len(prompt[:16])] = prompt[:16]
        _, cache = lm.extend(cache, ids, [min(len(prompt), 16) for prompt in prompts])
        token, drawn = np.array([3, 4, 5], np.int32), None
        for drafts, num_drafts in rounds:
            what = np.array(drafts, np.int32), np.array(num_drafts, np.int32)
            drawn, accepted, token, cache = steps.verify(
                lm.network, lm.parameters, cache, token, *what, *drawing
            )
            assert (np.asarray(accepted) == 0).all()
        return drawn, cache

    none = [[0] * 7] * 3
    first, _ = after((none, [0] * 3))
    wrong = (np.asarray(first)[:, :1] + np.arange(1, 8)) % VOCAB
    drawn, clean = after(*[(none, [0] * 3)] * 4)
    drawn_too, used = after((wrong, [7, 1, 3]), (none, [0] * 3), *[(none, [0] * 3)] * 2)
    np.testing.assert_array_equal(np.asarray(drawn)[:, 0], np.asarray(drawn_too)[:, 0])
    lengths = np.asarray(clean.length)
    np.testing.assert_array_equal(lengths, np.asarray(used.length))
    ours, theirs = compared(clean, lengths), compared(used, lengths)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=str(name))


def test_a_row_that_rests_is_left_alone(models):
    lm = models["dspark"]
    drawing = request_keys(0, 3), np.zeros(3, np.float32), np.ones(3, np.float32)
    cache = lm.new_cache(3, CAPACITY, dspark=True)
    _, cache = lm.extend(cache, np.ones((3, 16), np.int32), [2, 2, 2])
    before = jax.tree.map(np.asarray, cache)
    token, drafts = np.array([3, 4, -2], np.int32), np.full((3, 7), 6, np.int32)
    *_, cache = steps.verify(
        lm.network, lm.parameters, cache, token, drafts, np.array([-1, 0, -1], np.int32), *drawing
    )
    assert cache.length.tolist() == [2, 3, 2]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        if old.ndim > 1:
            np.testing.assert_array_equal(old[:, [0, 2]], np.asarray(new)[:, [0, 2]])


@pytest.mark.parametrize("draft", ["lookup", "dspark"])
def test_generation_ends_where_logits_are_no_numbers(models, plain, draft):
    lm = models[draft]
    token = int(plain[0][2, 9])
    broken = dict(lm.parameters) | {"embed": np.array(lm.parameters["embed"])}
    broken["embed"][token] = np.nan
    prompts = [[t for t in prompt if t != token] or [0] for prompt in PROMPTS]
    broken = LanguageModel(lm.config, FLOAT32, broken)

    def run(**how):
        columns = []
        with pytest.raises(FloatingPointError) as raised:
            for column in broken.stream(prompts, NEW, stop_token_ids=(), **how):
                columns.append(column)
        return np.stack(columns, axis=1), str(raised.value)

    (want, said), (got, said_too) = run(), run(draft=draft)
    np.testing.assert_array_equal(got, want)
    assert said == said_too


def test_a_quantised_cache(models):
    lm = LanguageModel(DSPARK, Policy.of("float32", cache="fp8+mxfp4"), models["dspark"].parameters)
    want = lm.generate(PROMPTS, NEW, stop_token_ids=())
    np.testing.assert_array_equal(lm.generate(PROMPTS, NEW, stop_token_ids=(), draft="dspark"), want)
    assert lm.acceptance.by_position()[0][0] > 0


def test_on_a_mesh(models, plain):
    """Rows over two devices, the vocabulary and the experts over two: the Markov tables are split as well."""
    placement = placement_of("data=2,expert=2", None)
    shardings = parameter_shardings(DSPARK, placement.mesh, placement.table.parameters, "a test")
    assert not shardings["dspark", "markov_w2"].is_fully_replicated
    flat = flattened(models["dspark"].parameters).items()
    placed = nested({path: jax.device_put(leaf, shardings[path]) for path, leaf in flat})
    lm = LanguageModel(DSPARK, FLOAT32, placed, placement=placement)
    np.testing.assert_array_equal(lm.generate(PROMPTS, NEW, stop_token_ids=(), draft="dspark"), plain[0])
    assert lm.acceptance.by_position()[0][0] > 0


def test_drafts_that_a_model_cannot_have(models):
    plain = LanguageModel(dataclasses.replace(MTP, num_nextn_predict_layers=0), FLOAT32, {})
    for lm, draft, said in [
        (plain, "mtp", "no MTP block"),
        (plain, "dspark", "no DSpark draft head"),
        (models["dspark"], "mtp", "no MTP block"),
        (models["mtp"], "eagle", "draft='eagle' must be one of 'mtp', 'dspark', 'lookup', or None"),
    ]:
        with pytest.raises(ValueError, match=said):
            lm.generate([[1]], 2, draft=draft)


# ---- acceptance ------------------------------------------------------------------------------------


def test_acceptance_by_position():
    acceptance = Acceptance([[0, 2, 1], [3, 0]], [[2, 2, 3], [3, 0]])
    assert acceptance.by_position() == [(3, 4), (2, 3), (1, 1)]
    assert Acceptance.of(2).by_position() == []


@pytest.mark.parametrize("draft", DRAFTS)
def test_low_acceptance_is_said_once(models, draft, caplog):
    lm = models[draft]
    if draft == "dspark":  # a head that does not fit: no error, only slow
        lm = LanguageModel(DSPARK, FLOAT32, with_memory(lm.parameters, {}))
    with caplog.at_level(logging.WARNING):
        lm.generate(PROMPTS, NEW, stop_token_ids=(), draft=draft)
    first = lm.acceptance.by_position()[0]
    if draft == "lookup":
        assert not caplog.records
    else:
        assert first[1] > ENOUGH and first[0] < 0.4 * first[1]
        (record,) = caplog.records
        assert (
            f"draft='{draft}'" in record.getMessage() and "first drafts were accepted" in record.getMessage()
        )


def test_a_head_that_fits_gives_no_warning(models, caplog, monkeypatch):
    monkeypatch.setitem(drafters.FLOORS, "dspark", 0.15)
    with caplog.at_level(logging.WARNING):
        models["dspark"].generate(PROMPTS, NEW, stop_token_ids=(), draft="dspark")
    first = models["dspark"].acceptance.by_position()[0]
    assert first[1] > ENOUGH and first[0] >= 0.15 * first[1] and not caplog.records


# ---- lookup ----------------------------------------------------------------------------------------


def longest_match(tokens: list[int], most: int) -> list[int]:
    """By trying every earlier end."""
    best, length = None, drafters.SHORTEST_MATCH - 1
    for end in range(1, len(tokens)):
        n = 0
        while n < min(end, drafters.LONGEST_MATCH) and tokens[end - 1 - n] == tokens[len(tokens) - 1 - n]:
            n += 1
        if n >= max(length, drafters.SHORTEST_MATCH):
            best, length = end, n
    return [] if best is None else tokens[best : best + most]


def test_lookup_finds_the_longest_latest_match():
    rng = np.random.default_rng(0)
    found = 0
    for length in range(1, 60):
        for kinds in (1, 2, 3, 9):
            tokens = rng.integers(0, kinds, length).tolist()
            assert looked_up(tokens, 5) == longest_match(tokens, 5), tokens
            found += bool(looked_up(tokens, 5))
    assert found > 50
    assert looked_up([1, 2, 3, 1, 2], 7) == [3, 1, 2] and looked_up([1, 2, 3, 1, 2], 1) == [3]
    assert looked_up([1, 2, 3, 1, 2], 0) == looked_up([1, 2, 3, 1, 2], -1) == looked_up([5], 3) == []


def test_widths():
    assert [width_for(n) for n in range(8)] == [0, 3, 3, 3, 7, 7, 7, 7]


# ---- longer ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_thousand_prompts(models, draft):
    lm = models[draft]
    for seed in range(32):
        prompts = random_prompts(32, 100 + seed)
        want = models["mtp"].generate(prompts, NEW, stop_token_ids=())
        np.testing.assert_array_equal(lm.generate(prompts, NEW, stop_token_ids=(), draft=draft), want)


@pytest.mark.slow
def test_sampled_tokens_have_the_distribution_of_the_model(models):
    """Chi-square of the second and third token of 32,000 requests, by what came before."""
    lm, prompt = models["dspark"], [7, 3, 9]
    counts: dict[tuple[int, ...], np.ndarray] = {}
    for seed in range(1000):
        out = lm.generate([prompt] * 32, 3, 1.0, seed, (), draft="dspark")
        for row in out.tolist():
            for size in (1, 2):
                counts.setdefault(tuple(row[:size]), np.zeros(VOCAB))[row[size]] += 1
    assert sum(map(sum, lm.last_acceptance)) > 0
    worst = 0.0
    for before, seen in counts.items():
        if seen.sum() < 500:
            continue
        logits = np.asarray(lm.logits([prompt + list(before)]))[0, -1].astype(np.float64)
        expected = np.exp(logits - logits.max())
        expected *= seen.sum() / expected.sum()
        rare = expected < 5
        pairs = [(seen[~rare], expected[~rare]), ([seen[rare].sum()], [max(expected[rare].sum(), 1e-9)])]
        statistic = sum(((np.asarray(o) - e) ** 2 / e).sum() for o, e in pairs)
        freedom = (~rare).sum()
        worst = max(worst, (statistic - freedom) / np.sqrt(2 * freedom))
    assert 0 < worst < 4.5
