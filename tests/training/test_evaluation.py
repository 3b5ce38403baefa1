"""Scores of text against the model's own logits, and needles that are where they should be."""

import math

import jax
import numpy as np
import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.evaluation import NeedleCase, NeedleError, needle_cases, needle_results, text_score
from dsv4_jax.training.tokenizer import BOS, train_tokenizer
from tests.models import compressed_kinds

SEQ_LEN = 16


@pytest.fixture(scope="module")
def model():
    return LanguageModel.random(
        compressed_kinds(bos_token_id=0, eos_token_id=1, initializer_range=0.2), Policy.of("float32"), seed=2
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a needle in a haystack "] * 2, 300)


def test_every_token_is_scored_once_behind_what_its_piece_shows(model, tokenizer):
    texts = ["a haystack and a needle, and more hay than fits into one row", "", "hay", f"x{BOS}y"]
    score = text_score(model.network, model.parameters, tokenizer, texts, SEQ_LEN, batch_size=3)
    nats, count = 0.0, 0
    for text in texts:
        ids = [0, *tokenizer.encode(text.replace(BOS, "")).ids]
        if BOS in text:  # its name is spelt by ordinary tokens
            tokenizer.encode_special_tokens = True
            ids = [0, *tokenizer.encode(text).ids]
            tokenizer.encode_special_tokens = False
        for start in range(0, len(ids) - 1, SEQ_LEN - 1):
            piece = ids[start : start + SEQ_LEN]
            row = np.zeros((1, SEQ_LEN), np.int32)
            row[0, : len(piece)] = piece
            logits = model.logits(row, num_valid=np.array([len(piece)], np.int32))
            logp = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)[0]
            nats -= sum(logp[t, piece[t + 1]] for t in range(len(piece) - 1))
            count += len(piece) - 1
    assert score.tokens == count > 3 * SEQ_LEN and score.num_bytes == sum(len(t.encode()) for t in texts)
    np.testing.assert_allclose(score.nats, nats, rtol=1e-5)
    np.testing.assert_allclose(score.perplexity, math.exp(nats / count), rtol=1e-5)
    np.testing.assert_allclose(score.bits_per_byte, nats / math.log(2) / score.num_bytes, rtol=1e-5)


def test_scores_that_cannot_be_are_refused(model, tokenizer):
    with pytest.raises(ProblemsError) as error:
        text_score(model.network, model.parameters, tokenizer, [""], 1, 0)
    assert len(error.value.problems) == 3


def test_a_needle_is_at_its_depth_and_the_case_has_its_length(tokenizer):
    filler = "hay and straw " * 30
    cases = needle_cases(tokenizer, 0, filler, (120, 200), (0.0, 0.5, 1.0), trials=2, seed=4)
    assert [(case.length, case.depth) for case in cases] == [
        (n, d) for n in (120, 200) for d in (0.0, 0.5, 1.0) for _ in range(2)
    ]
    for case in cases:
        assert case.tokens.dtype == np.int32 and len(case.tokens) == case.length and case.tokens[0] == 0
        text = tokenizer.decode(case.tokens.tolist())
        answer = tokenizer.decode(case.tokens[-case.answer :].tolist()).strip()
        assert 10**6 <= int(answer) < 10**7 and text.count(answer) == 2
        start = text.index("\nThe number of")
        end = text.index(f" is {answer}.\n") + len(f" is {answer}.\n")
        behind = text.rindex("\nThe number of") - end
        assert abs(start / (start + behind) - case.depth) < 0.05
        assert text[:start] in filler * 2 and text[end : end + behind] in filler * 2
    assert len({tuple(case.tokens) for case in cases}) == len(cases)
    again = needle_cases(tokenizer, 0, filler, (120,), (0.0,), trials=2, seed=4)
    np.testing.assert_array_equal(again[1].tokens, cases[1].tokens)


def test_cases_that_cannot_be_made_are_named(tokenizer):
    with pytest.raises(NeedleError, match="length=20 is too short: needle and question take"):
        needle_cases(tokenizer, 0, "hay", (20, 200))
    with pytest.raises(NeedleError) as error:
        needle_cases(tokenizer, 0, "", (0,), (1.5,), trials=0)
    assert len(error.value.problems) == 4


def test_found_is_what_greedy_decoding_writes(model):
    prompt = np.random.default_rng(0).integers(2, 300, 20).astype(np.int32)
    written = np.asarray(
        model.generate([prompt.tolist()], max_new_tokens=3, stop_token_ids=())[0][-3:], np.int32
    )
    other = written.copy()
    other[-1] = (other[-1] + 1) % 300
    cases = [
        NeedleCase(23, 0.5, np.concatenate([prompt, end]).astype(np.int32), 3) for end in (written, other)
    ]
    found, missed = needle_results(model.network, model.parameters, cases)
    assert (found.found, missed.found) == (True, False)
    logits = np.asarray(jax.nn.log_softmax(model.logits(cases[0].tokens[None]), axis=-1), np.float64)[0]
    expected = -np.mean([logits[19 + i, token] for i, token in enumerate(written)])
    np.testing.assert_allclose(found.nats, expected, rtol=1e-4)
    assert missed.nats > found.nats
