"""What the compiled steps share: one program for all caches whose lengths lie between two powers of two."""

import chex
import jax
import numpy as np
import pytest

from dsv4_jax.config import tiny
from dsv4_jax.inference import steps
from dsv4_jax.inference.generate import padded_stops
from dsv4_jax.inference.sampling import request_keys
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import cache_rows
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.cache_rows import put, reset, take
from dsv4_jax.model.geometry import allocated_length
from dsv4_jax.numerics.policy import Policy

CONFIG = tiny(
    4,
    vocab_size=50,
    attention_kinds=("csa", "hca"),
    router_kinds=("hash", "learned"),
    csa_ratio=4,
    hca_ratio=8,
    sliding_window=4,
    index_topk=3,
    max_position_embeddings=200,
)

JITTED = {
    (steps, "empty_cache"): {
        "static_argnums": tuple(range(9)),
        "static_argnames": ("stream_dtype", "dspark"),
    },
    (steps, "extend"): {"static_argnums": 0, "donate_argnums": 2},
    (steps, "extend_further"): {"static_argnums": 0, "donate_argnums": 2},
    (steps, "draft"): {"static_argnums": 0},
    (steps, "verify"): {"static_argnums": 0, "donate_argnums": 2},
    (steps, "prefill"): {"static_argnums": 0, "donate_argnums": (2, 5)},
    (steps, "decode"): {"static_argnums": 0, "donate_argnums": (2, 3)},
    (cache_rows, "_take"): {},
    (cache_rows, "_put"): {"donate_argnums": 0},
    (cache_rows, "_reset"): {"donate_argnums": 0},
}
"""Everything that takes or makes a cache, as it is jitted."""


@pytest.fixture
def traced_once(monkeypatch) -> None:
    """Every step anew, with an AssertionError at its second trace."""
    chex.clear_trace_counter()
    for (module, name), options in JITTED.items():
        function = getattr(module, name).__wrapped__
        counted = chex.assert_max_traces(function, n=1)
        monkeypatch.setattr(module, name, jax.jit(counted, **options))


def used(lm: LanguageModel, max_length: int) -> Cache:
    """A cache of that length after every kind of step."""
    model = lm.network, lm.parameters
    cache = lm.new_cache(2, max_length, max_rewind=3, mtp=True)
    token, one = np.ones((2, 1), np.int32), np.ones(2, np.int32)
    _, cache = lm.extend(cache, token)
    _, _, cache = steps.extend_further(*model, cache, token, one)
    scores = steps.draft(*model, cache, one)
    scores, cache = steps.prefill(*model, cache, token, one, scores)
    how = request_keys(0, 2), np.zeros(2, np.float32), np.ones(2, np.float32)
    stopped = np.full(2, steps.RUNNING, np.int32)
    *_, cache = steps.decode(*model, cache, scores, *how, stopped, padded_stops([1]))
    drafts = np.full((2, 2), -1, np.int32)  # never accepted
    *_, cache = steps.verify(*model, cache, one, drafts, np.full(2, 2, np.int32), *how)
    return reset(put(cache, [1, 0], take(cache, [0, 1])), [1])


def test_lengths_between_two_powers_of_two_share_all_programs(traced_once):
    lm = LanguageModel.random(CONFIG, Policy.of("float32"), 1)
    for max_length in (33, 40, 64):
        cache = used(lm, max_length)
        assert cache.max_length.tolist() == [max_length] * 2 and cache.length.tolist() == [5, 0]
        with pytest.raises(ValueError, match=f"row 0 would hold {max_length + 1} .*max_length={max_length}"):
            lm.extend(cache, np.zeros((2, max_length - 4), np.int32))
    with pytest.raises(AssertionError, match="traced"):
        lm.new_cache(2, 65, max_rewind=3, mtp=True)


@pytest.mark.parametrize(
    ("max_length", "allocated"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (129, 200), (200, 200)]
)
def test_what_is_allocated(max_length, allocated):
    """The next power of two, but no more than the model's positions."""
    assert allocated_length(CONFIG, max_length) == allocated
