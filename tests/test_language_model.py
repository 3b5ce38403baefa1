"""The face: generation, argument checks, counts. Equalities between paths are in tests/model."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsv4_jax.checkpoint import storage
from dsv4_jax.inference.generate import PREFILL_CHUNKS, chunks
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.loading import load
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.numerics.qat import SWITCHES
from tests.checkpoint.synthetic import smallest_config, write_checkpoint
from tests.models import compressed_kinds

CONFIG = compressed_kinds()


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.random(CONFIG, Policy.of("float32"), seed=3)


def test_greedy_generation_is_the_argmax_of_the_full_forward(lm):
    prompt = np.arange(7)[None] * 11
    new = lm.generate(prompt, 9, stop_token_ids=())
    tokens = np.concatenate([prompt, new], axis=1)
    scored = np.asarray(lm.logits(np.pad(tokens, ((0, 0), (0, 4))), num_valid=np.array([16])))
    np.testing.assert_array_equal(scored[0, 6:15].argmax(-1), new[0])


def test_ragged_prompts_generate_what_each_generates_alone(lm):
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    together = lm.generate(prompts, 6, stop_token_ids=())
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(together[row], lm.generate([prompt], 6, stop_token_ids=())[0])


def test_a_seed_reproduces_and_another_differs(lm):
    draw = lambda seed: lm.generate([[1, 2]], 12, temperature=1.0, seed=seed, stop_token_ids=())  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


def test_a_stopped_row_is_padded_with_its_stop_token(lm):
    free = lm.generate([[1, 2], [9, 8]], 8, stop_token_ids=())
    stop = int(free[0, 2])
    stopped = lm.generate([[1, 2], [9, 8]], 8, stop_token_ids=[stop])
    first = int(np.argmax(free[0] == stop))
    assert (stopped[0, first:] == stop).all()
    np.testing.assert_array_equal(stopped[0, :first], free[0, :first])
    assert stopped.shape == (2, 8)


def test_zero_new_tokens(lm):
    assert lm.generate([[1]], 0).shape == (1, 0)


def test_text_needs_a_tokenizer(lm):
    with pytest.raises(ValueError, match="no tokenizer"):
        lm.generate("hello", 3)


def test_text_streams_whole_characters(lm):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = LanguageModel(CONFIG, lm.policy, lm.parameters, tokenizer)
    pieces = list(named.stream_text("héllo", 12, temperature=1.0, stop_token_ids=()))
    text = named.generate("héllo", 12, temperature=1.0, stop_token_ids=())
    assert "".join(pieces) == text and all(pieces)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 300]], r"\[300\] are outside the vocabulary 0..299"),
        ([[-1]], r"\[-1\] are outside"),
        ([1, 2], r"shape \(2,\) must be \[B, T\]"),
        (np.zeros((1, 0), int), "B, T >= 1"),
        ([[1.5]], "must be integers"),
    ],
)
def test_bad_tokens_are_named(lm, tokens, message):
    with pytest.raises(ValueError, match=message):
        lm.logits(tokens)


def test_a_full_cache_refuses_by_row(lm):
    cache = lm.new_cache(2, 8)
    with pytest.raises(ValueError, match="row 0 would hold 9 tokens.*max_length=8"):
        lm.extend(cache, np.zeros((2, 9), int))


def test_rows_and_counts_must_fit(lm):
    with pytest.raises(ValueError, match="3 rows, the cache 2"):
        lm.extend(lm.new_cache(2, 8), np.zeros((3, 1), int))
    with pytest.raises(ValueError, match="num_valid"):
        lm.logits(np.zeros((2, 3), int), num_valid=[4, 0])


def test_cache_sizes_are_checked_together(lm):
    with pytest.raises(ValueError, match="batch=0.*max_length=0.*max_rewind=-1"):
        lm.new_cache(0, 0, max_rewind=-1)


def test_rewinding_too_far_names_the_row(lm):
    cache = lm.new_cache(2, 32, max_rewind=3)
    _, cache = lm.extend(cache, np.zeros((2, 9), int), np.array([9, 2]))
    with pytest.raises(ValueError, match="row 0: rewinding 4 of 9"):
        cache.rewind(4)
    with pytest.raises(ValueError, match="row 0.*back to length 6"):
        cache.rewind(2).rewind(2)
    with pytest.raises(ValueError, match="row 1"):
        cache.rewind(3)
    assert cache.rewind(np.array([3, 2])).length.tolist() == [6, 0]


def test_prefill_chunks_cover_the_prompt_once():
    for length in (1, 31, 32, 33, 127, 128, 700, 5000):
        plan = chunks(length)
        assert sum(plan) >= length > sum(plan) - PREFILL_CHUNKS[-1]


def test_more_than_the_model_holds_is_refused(lm):
    with pytest.raises(ValueError, match="max_position_embeddings=65536"):
        next(lm.stream([[1]], 70000))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_layer_that_is_not_there(lm, index):
    streams = np.zeros((1, 3, lm.config.hc_mult, lm.config.hidden_size), np.float32)
    with pytest.raises(ValueError, match=f"index={index} must be an integer in 0..1"):
        lm.layer(index, streams, [[1, 2, 3]])


def test_experts_on_the_fp4_grid_are_not_rounded_again(tmp_path):
    config = smallest_config(attention_kinds=("csa",), router_kinds=("learned",))
    write_checkpoint(tmp_path / "model", config, storage.PREVIEW)
    lm = load(tmp_path / "model", dtype="float32", numerics="qat")
    assert lm.policy.switches == SWITCHES.keys() - {"expert_fp4"}
    tokens = np.arange(12)[None] % lm.config.vocab_size
    again = LanguageModel(lm.config, Policy.of("float32", "qat"), lm.parameters)
    np.testing.assert_array_equal(lm.logits(tokens), again.logits(tokens))
    write_checkpoint(tmp_path / "plain", config)
    assert load(tmp_path / "plain", dtype="float32", numerics="qat").policy.switches == SWITCHES.keys()
