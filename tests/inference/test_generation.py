"""Stop tokens by row, seeds that differ, text through the model, and what a new call must not compile."""

import gc
import os

import jax
import numpy as np
import pytest

from dsv4_jax.inference import steps
from dsv4_jax.inference.generate import PREFILL_CHUNKS, STOPS_GROUP, padded_stops
from dsv4_jax.inference.sampling import key_of
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.tokenizer import BOS, train_tokenizer
from tests.models import compressed_kinds

CONFIG = compressed_kinds(num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def lm():
    model = LanguageModel.random(CONFIG, Policy.of("float32"), seed=3)
    model.tokenizer = train_tokenizer(["hello world, wörld 你好 🙂\n" * 9], CONFIG.vocab_size)
    return model


def test_every_row_is_filled_with_the_stop_token_it_drew(lm):
    prompts = [[1, 2], [9, 8], [40, 41, 42]]
    free = lm.generate(prompts, 10, temperature=1.0, stop_token_ids=())
    stops = [int(free[2, 4]), int(free[0, 2]), int(free[1, 3])]  # in another order than the rows
    assert len(set(stops)) == 3
    got = lm.generate(prompts, 10, temperature=1.0, stop_token_ids=stops)
    filled = set()
    for row in range(3):
        end = next(i for i in range(10) if free[row, i] in stops)
        np.testing.assert_array_equal(got[row, : end + 1], free[row, : end + 1])
        assert (got[row, end:] == free[row, end]).all()
        filled.add(int(free[row, end]))
    assert len(filled) > 1  # so that one token for all rows would be seen
    assert got.shape == (3, 10)


@pytest.mark.parametrize("count", [0, 1, STOPS_GROUP - 1, STOPS_GROUP, STOPS_GROUP + 1])
def test_stop_ids_are_padded_with_what_no_row_draws(count):
    stops = padded_stops(tuple(range(count)))
    assert stops.shape[0] % STOPS_GROUP == 0 and stops.shape[0] > count
    assert [int(i) for i in stops if i >= 0] == list(range(count))


SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1]


def test_no_two_seeds_mean_the_same():
    keys = {tuple(jax.random.key_data(key_of(seed)).tolist()) for seed in SEEDS}
    assert len(keys) == len(SEEDS)
    drawn = {initial_parameters(CONFIG, Policy.of("float32"), seed)["head"].tobytes() for seed in SEEDS}
    assert len(drawn) == len(SEEDS)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_small_seeds_draw_as_the_keys_of_jax(seed):
    expected = jax.random.key_data(jax.random.key(np.uint32(seed), impl="threefry2x32"))
    assert jax.random.key_data(key_of(seed)).tolist() == expected.tolist()


def test_high_bits_of_a_seed_change_the_draws(lm):
    draw = lambda seed: lm.generate([[1, 2]], 12, temperature=1.0, seed=seed, stop_token_ids=()).tolist()  # noqa: E731
    assert draw(5) != draw(5 + 2**32)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_has_its_tokens_in_any_slot(lm, temperature):
    prompts, seeds = [[1, 2], [9, 8, 7], [40]], [3, 4, 5]
    how = dict(temperature=temperature, top_p=0.95, stop_token_ids=())
    together = lm.generate(prompts, 8, seed=seeds, **how)
    turned = lm.generate(prompts[::-1], 8, seed=seeds[::-1], **how)
    np.testing.assert_array_equal(turned[::-1], together)
    np.testing.assert_array_equal(lm.generate(prompts[1:2], 8, seed=4, **how)[0], together[1])


def test_a_prompt_of_text_is_one_bos_and_its_ids(lm, monkeypatch):
    seen = []
    stream = LanguageModel.stream
    monkeypatch.setattr(LanguageModel, "stream", lambda self, t, *a: seen.append(t) or stream(self, t, *a))
    plain, written = (lm.generate(text, 8, stop_token_ids=()) for text in ("hello", BOS + "hello"))
    assert plain == written
    assert seen[0] == seen[1] and seen[0][0].count(CONFIG.bos_token_id) == 1


def test_ids_and_text_of_one_prompt_agree(lm):
    ids = list(lm.stream_ids("hello", 20, temperature=1.0, seed=4))
    assert lm.generate("hello", 20, temperature=1.0, seed=4) == lm.tokenizer.decode(ids)
    assert list(lm.stream_ids([0, *lm.tokenizer.encode("hello").ids], 20, 1.0, 4)) == ids


def test_ids_end_before_the_stop_token(lm):
    free = list(lm.stream_ids([1, 2], 8, stop_token_ids=()))
    assert list(lm.stream_ids([1, 2], 8, stop_token_ids=[free[3]])) == free[: free.index(free[3])]


def test_text_of_ids_is_refused(lm):
    with pytest.raises(ValueError, match="for ids use stream_ids"):
        next(lm.stream_text([1, 2], 4))


def programs() -> dict[str, int]:
    """How many programs each step of a generation has."""
    return {step.__name__: step._cache_size() for step in (steps.prefill, steps.decode, steps.empty_cache)}


def test_nothing_is_compiled_for_other_seeds_temperatures_lengths_and_stops(lm):
    lm.generate([[1, 2, 3]], 3, stop_token_ids=())
    before = programs()
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed, temperature, top_p, length, new, stops in [
            (1, 0.5, 1.0, 1, 9, (1,)),
            (2**40, 1.5, 0.9, PREFILL_CHUNKS[-1], 20, (1, 2, 3)),
            (3, 0.0, 0.1, 7, 31, range(STOPS_GROUP - 1)),
        ]:
            prompt = [list(range(1, length + 1))]
            lm.generate(prompt, new, temperature, seed, list(stops), top_p)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert programs() == before
    assert compiled == []


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the resident size from /proc")
def test_memory_is_flat_over_many_generations(lm):
    """300 calls with text, ids, other seeds and lengths: no array, program or page is kept for them."""

    def calls(count: int) -> None:
        for number in range(count):
            prompt = [[1 + number % 7] * (1 + number % 30), [2]]
            lm.generate(prompt, 1 + number % 12, temperature=0.5 + number / 300, seed=number)
            lm.generate("hello" * (1 + number % 5), 4, temperature=1.0, seed=number)

    calls(40)
    gc.collect()
    before = len(jax.live_arrays()), programs(), resident_bytes()
    calls(300)
    gc.collect()
    arrays, kept, resident = len(jax.live_arrays()), programs(), resident_bytes()
    print(f"resident {before[2] / 1e6:.1f} MB before, {resident / 1e6:.1f} MB after; {arrays} arrays; {kept}")
    assert (arrays, kept) == before[:2]
    assert resident - before[2] < 8e6


def with_broken_embedding(lm, token: int) -> LanguageModel:
    """The model, whose logits are NaN from the token on in every row that holds it."""
    broken = np.array(lm.parameters["embed"])
    broken[token] = np.nan
    return LanguageModel(lm.config, lm.policy, lm.parameters | {"embed": broken}, lm.tokenizer)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_generation_ends_where_logits_are_no_numbers(lm, how):
    prompts = [[1, 2], [9, 8, 7], [40]]
    free = lm.generate(prompts, 6, stop_token_ids=(), **how)
    token = int(free[0, 2])
    assert all(token not in prompt for prompt in prompts)
    first = {row: int(np.argmax(free[row] == token)) for row in range(3) if token in free[row]}
    earliest = min(first.values())
    last = [row for row, step in first.items() if step == earliest]
    places = "; ".join(f"row {row}, position {len(prompts[row]) + earliest + 1}" for row in last)
    broken, columns = with_broken_embedding(lm, token), []
    with pytest.raises(FloatingPointError, match=f"not finite numbers.*: {places}$"):
        for column in broken.stream(prompts, 6, stop_token_ids=(), **how):
            columns.append(column)
    np.testing.assert_array_equal(np.stack(columns, axis=1), free[:, : earliest + 1])
    # A row that has ended goes on with its stop token and with logits that nobody reads.
    ended = broken.generate(prompts, 6, stop_token_ids=[token], **how)
    np.testing.assert_array_equal(ended, lm.generate(prompts, 6, stop_token_ids=[token], **how))


def test_a_prompt_whose_logits_are_no_numbers_is_refused_at_the_first_token(lm):
    with pytest.raises(FloatingPointError, match="row 1, position 2$"):
        with_broken_embedding(lm, 5).generate([[1, 2, 3], [4, 5]], 3)
