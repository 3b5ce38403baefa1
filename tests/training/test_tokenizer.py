"""The tokenizer: exact round trips, fixed special ids, the same result every time."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.errors import ConfigError
from dsv4_jax.training.tokenizer import BOS, BOS_ID, EOS, EOS_ID, encode_documents, train_tokenizer

TEXTS = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def test_special_tokens_have_the_official_ids(tokenizer):
    assert tokenizer.token_to_id(BOS) == BOS_ID == 0
    assert tokenizer.token_to_id(EOS) == EOS_ID == 1
    assert tokenizer.get_vocab_size() <= 400


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_round_trips_and_never_makes_a_special_token(tokenizer, text):
    (ids,) = encode_documents(tokenizer, [text])
    assert ids.dtype == np.int32 and ids[0] == BOS_ID and ids[-1] == EOS_ID
    assert ids[1:-1].min(initial=2) >= 2
    assert tokenizer.decode(ids.tolist()) == text


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    (ids,) = encode_documents(tokenizer, [f"a{BOS}b{EOS}"])
    assert ids[1:-1].min() >= 2
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == f"a{BOS}b{EOS}"
    # The public tokenizer keeps its usual meaning afterwards.
    assert tokenizer.encode(BOS, add_special_tokens=False).ids == [BOS_ID]


def test_training_is_deterministic_and_learns_merges(tokenizer):
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.to_str() == tokenizer.to_str()
    assert json.loads(again.to_str())["model"]["merges"]
    assert len(tokenizer.encode(TEXTS[3]).ids) < len(TEXTS[3]) / 2


def test_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match="257.*258"):
        train_tokenizer(TEXTS, 257)
    assert train_tokenizer(TEXTS, 258).get_vocab_size() == 258


@pytest.mark.parametrize("size", [257, 400.0, True])
def test_a_vocabulary_too_small_or_no_integer_is_refused(size):
    with pytest.raises(ConfigError, match=r"vocab_size=.* must be an integer of at least 258"):
        train_tokenizer(TEXTS, size)
