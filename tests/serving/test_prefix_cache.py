"""Which prefixes are kept: against a plain record of everything that was ever inserted."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dsv4_jax.serving.prefix_cache import PrefixCache

BLOCK = 4


def filled(cache, ids, salt=b"", states=()):
    """Inserts every block of a prompt; returns the pages, None where nothing is to copy."""
    keys = cache.keys(ids, salt)
    pages = [cache.insert(keys, number) for number in range(len(keys))]
    for number in states:
        cache.attach(keys[number - 1], (tuple(ids[: number * BLOCK]), salt))
    return keys, pages


def test_a_hit_needs_a_state_and_the_longest_one_counts():
    cache = PrefixCache(8, 8, BLOCK, b"model")
    ids = list(range(14))
    keys, pages = filled(cache, ids)
    assert len(keys) == 3 and pages == [0, 1, 2]
    assert cache.longest(keys, 14) is None
    cache.attach(keys[0], "one")
    cache.attach(keys[1], "two")
    assert cache.longest(keys, 14) == (2, (0, 1), "two")
    assert cache.longest(keys[:1], 14) == (1, (0,), "one")
    other = cache.keys([0, 1, 2, 3, 4, 5, 6, 99], b"")
    assert cache.longest(other, 8) == (1, (0,), "one")
    assert (cache.queries, cache.hits) == (14 * 3 + 8, 16)


def test_keys_depend_on_every_token_before_the_salt_and_the_model():
    one, two = (PrefixCache(1, 1, BLOCK, model) for model in (b"a", b"b"))
    ids = list(range(8))
    every = [
        one.keys(ids),
        one.keys([9, *ids[1:]]),
        one.keys(ids, b"tenant"),
        two.keys(ids),
        one.keys([*ids[:7], 2**31]),
    ]
    first, second = zip(*every, strict=True)
    assert len(set(second)) == 5
    assert len(set(first)) == 4  # the last prompt shares its first block with the first one
    assert one.keys(ids[:3]) == []


@pytest.mark.parametrize("pages, states", [(1, 0), (1, 1), (2, 1)])
def test_a_chain_longer_than_the_cache_does_not_evict_itself(pages, states):
    cache = PrefixCache(pages, states, BLOCK, b"")
    keys, got = filled(cache, list(range(20)), states=(1,))
    assert [page is None for page in got] == [number >= pages for number in range(5)]
    cache.check()
    assert (cache.longest(keys, 20) is not None) == bool(states)
    filled(cache, list(range(50, 54)))
    cache.check()
    assert cache.known(keys) == pages - 1


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3]])
def test_prompts_shorter_than_a_block_have_no_keys(ids):
    assert PrefixCache(1, 1, BLOCK, b"").keys(ids) == []


class Against(RuleBasedStateMachine):
    """Every hit is a prefix of that prompt in that tenant's space, with its own pages and state."""

    def __init__(self):
        super().__init__()
        self.cache = PrefixCache(5, 3, BLOCK, b"model")
        self.content: dict[int, tuple] = {}  # page -> (prefix, salt) that was last copied there

    prompts = st.builds(
        lambda seed, shared, size: [
            *([7] * shared),
            *np.random.default_rng(seed).integers(0, 2, size).tolist(),
        ],
        st.integers(0, 3),
        st.integers(0, 9),
        st.integers(0, 12),
    )
    salts = st.sampled_from([b"", b"x"])

    @rule(ids=prompts, salt=salts, states=st.sets(st.integers(1, 6)))
    def insert(self, ids, salt, states):
        keys = self.cache.keys(ids, salt)
        for number in range(len(keys)):
            page = self.cache.insert(keys, number)
            if page is not None:
                self.content[page] = (tuple(ids[: (number + 1) * BLOCK]), salt)
            if number + 1 in states:
                self.cache.attach(keys[number], (tuple(ids[: (number + 1) * BLOCK]), salt))

    @rule(ids=prompts, salt=salts)
    def look(self, ids, salt):
        hit = self.cache.longest(self.cache.keys(ids, salt), len(ids))
        if hit is not None:
            assert hit.state == (tuple(ids[: hit.num_blocks * BLOCK]), salt)
            for number, page in enumerate(hit.pages, start=1):
                assert self.content[page] == (tuple(ids[: number * BLOCK]), salt)

    @rule()
    def clear(self):
        self.cache.clear()
        assert len(self.cache) == 0 and self.cache.num_free == 5 and self.cache.num_states == 0

    @invariant()
    def adds_up(self):
        self.cache.check()
        assert len(self.cache) + self.cache.num_free == 5


TestAgainst = Against.TestCase
TestAgainst.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
